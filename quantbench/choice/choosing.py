"""Which setting to take under a person's limits: judged by intervals and shared rounds, measured where it must be."""

import os
import threading
from collections.abc import Callable, Iterable
from math import inf

import quantbench as qb
from quantbench.choice.weighing import Choice, judged
from quantbench.results import Run
from quantbench.settings import BASELINES, SETTINGS, Workload, amount, many

BELIEVED = 1.03  # times a limit: an estimate beyond that is not measured


def choose(model_or_run: str | os.PathLike | Run, vram_gb: float | None = None, ram_gb: float | None = None,
           min_tokens_per_s: float | None = None, ttft_s: float | None = None, keep: float | None = 0.99,
           prompt_tokens: int | None = None, batch_size: int = 1, max_new_tokens: int = 64,
           settings: str | Iterable[str] | None = None, engine: str | Iterable[str] = "eager", run: Run | None = None,
           price_per_hour: float | None = None, stop: threading.Event | None = None, progress: object = True) -> Choice:
    """The fastest setting that surely meets the limits: at most `vram_gb` or `ram_gb` (peak, 1e9 bytes) and `ttft_s`
    seconds to the first token, at least `min_tokens_per_s`, and `keep` of the reference's accuracy. None: any will do.

    Of a Run it judges what is there, of one model, at this workload or what most rows have. A model's name is measured
    into `run`, in rounds, where estimates allow and the run lacks it; then quality, the fastest first, until that
    cannot change the answer. Faster is told by shared rounds; a tie goes to the smaller, if by 5%, then to the lower
    KL. What a limit's interval leaves open is never named, but in how many rounds it would be told. `settings`: of
    these alone, and the baseline. `engine`: what measures, one or several (see `generate`). `price_per_hour` of the
    machine, in any currency, adds that of a million tokens. `stop` and `progress` are `sweep`'s: once stopped, what is
    there is judged. Raises ValueError for several models or machines, and for a mistake in an argument."""
    given = {"vram_gb": vram_gb, "ram_gb": ram_gb, "ttft_s": ttft_s, "min_tokens_per_s": min_tokens_per_s, "keep": keep,
             "price_per_hour": price_per_hour}
    asked = {name: (0 if name in ("min_tokens_per_s", "keep") else inf) if limit is None else
             amount(name, limit, 1 if name == "keep" else inf) for name, limit in given.items()}
    work = {"prompt_tokens": prompt_tokens, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    Workload(**work)  # a mistake in it is said now
    settings = None if settings is None else [SETTINGS.find(key).key for key in many("settings", settings)]
    if not isinstance(model_or_run, (str, os.PathLike)):
        return judged(Run.of(model_or_run), asked, work, settings, {})
    from quantbench.weights import check_name
    name, run = check_name(model_or_run), Run.given(run)
    base, wanted, ruled_out = _plan(name, asked, batch_size, settings, run)
    stop = stop or threading.Event()
    list(qb.sweep(name, wanted, engine=engine, run=run, stop=stop, progress=progress, **work))
    here = {"model": name, "machine_name": qb.Measurement(
        model=name, setting="-", max_new_tokens=1, machine=qb.facts()).machine_name}  # a run may have other machines'
    return _with_quality(name, base, run, stop, lambda: judged(run.only(**here), asked, work, wanted, ruled_out))


def _plan(name: str, asked: dict, batch_size: int, settings: list[str] | None,
          run: Run) -> tuple[str | None, list[str], dict[str, str]]:
    """The baseline, what to measure (the baseline with it), and what estimates rule out: setting -> why."""
    from quantbench.choice.fitting import estimates
    found, ruled_out = {one.setting.key: one for one in estimates(name, None, run)}, {}
    base = next((key for key in BASELINES if key in found and not found[key].why), None)
    device = SETTINGS[base].device if base else "cuda" if qb.facts().get("gpu") else "cpu"
    wanted = settings or [key for key, one in found.items() if one.setting.device == device]
    for one in (found[key] for key in wanted if key in found):
        held_in = "vram_gb" if one.setting.device == "cuda" and not one.setting.offload else "ram_gb"
        limit, rate = asked[held_in], batch_size / one.floor_s
        if one.why or one.weights / 1e9 > BELIEVED * limit or BELIEVED * rate < asked["min_tokens_per_s"]:
            ruled_out[one.setting.key] = one.why or (f"by estimate, {one.weights / 1e9:.3g} GB of weights" +
                                                     f" and at most {rate:.3g} tokens/s" * (rate == rate))
    ruled_out.pop(base, None)  # measured all the same: ratios are to it
    return base, [key for key in dict.fromkeys([base, *wanted]) if key and key not in ruled_out], ruled_out


def _with_quality(name: str, base: str | None, run: Run, stop: threading.Event, judge: Callable[[], Choice]) -> Choice:
    """Evaluate the settings whose quality could change the answer, one by one, against the baseline."""
    choice, reference, tried = judge(), None, set()
    while base and not stop.is_set() and (todo := [key for key in choice.unread if key not in tried]):
        try:
            if reference is None:
                with qb.load(name, base) as lm:
                    reference = qb.reference(lm)
                run.add(reference.quality)
            with qb.load(name, todo[0]) as lm:
                run.add(qb.quality(lm, reference))
        except ValueError as error:  # no tokenizer, too few positions
            choice.why.append(f"Quality cannot be told: {error}.")
            return choice
        tried.add(todo[0])
        choice = judge()
    return choice
