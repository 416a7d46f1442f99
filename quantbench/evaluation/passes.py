"""Quality of a setting: perplexity, and token by token against a reference. Never inside a timed region."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from quantbench import machine
from quantbench.evaluation.logits import NonFiniteLogits, Values, evaluate, forward
from quantbench.evaluation.pairing import figures
from quantbench.evaluation.scores import Quality
from quantbench.evaluation.windows import CONTEXT, Plan, Window, make_plan
from quantbench.loading import LoadedModel, StandInTokenizer
from quantbench.quantisers import QUANTISERS

DISK_BYTES = 2 * 10**9  # of a reference's log-probabilities: 3,000 tokens of the largest vocabularies


def quality(lm: LoadedModel, reference: LoadedModel | Reference | None = None, text: str | None = None,
            tokens: int | None = None, *, context: int = CONTEXT, stride: int | None = None,
            stepwise: bool | None = None, progress: bool = True) -> Quality:
    """Perplexity of `lm` on the first `tokens` tokens of `text`, and how it differs from `reference`, token by token.

    `text` is None for the bundled one, "wikitext-2", or a text (see `windows.find_text`); windows of `context` tokens
    begin every `stride` (default: context // 2), see `windows.Plan`; the figures are explained in `scores.Quality`.
    `reference` is the same model under another setting, FP32 where it fits: loaded, and both run window by window; or
    what `qb.reference` made, on whose text and windows `lm` is then run. `stepwise` runs each window as generation
    does, token by token after a prompt; None: only where the setting's quantiser needs it, because it is slow.

    Memory, besides the models: the logits of one window's scored tokens, as much again for the reference's, some five
    times 32 MiB, and a forward pass. A model that was not loaded, runs out of memory, or gives logits that are not
    finite, gives a `Quality` that says so. Raises ValueError for random weights, which have no quality, and for what
    cannot be evaluated or compared.
    """
    whose = _whose(lm)
    if lm.status != "ok":
        return Quality(**whose, status=lm.status, reason=lm.reason)
    _check(lm)
    plan, base, known = _against(lm, reference, text, tokens, context, stride)
    stepwise = _needs_steps(lm) if stepwise is None else stepwise
    on = _on(plan, reference, stepwise)
    try:
        found, cost = _evaluate(lm, plan, stepwise, progress, base)
        return Quality(**whose, **on, **figures(found | known, plan), **cost)
    except NonFiniteLogits as error:
        return Quality(**whose, **on, status="failed", reason=str(error))
    except (RuntimeError, MemoryError) as error:
        if (reason := machine.out_of_memory(error)) is None:
            raise
    gc.collect()  # not in the except clause: the traceback holds what was allocated
    machine.release(lm.device)
    return Quality(**whose, **on, status="out_of_memory", reason=reason)


def reference(lm: LoadedModel, text: str | None = None, tokens: int | None = None, *, context: int = CONTEXT,
              stride: int | None = None, folder: str | Path | None = None, progress: bool = True) -> Reference:
    """Evaluate `lm` once and keep its log-probabilities on disk, for other settings to be compared with: `lm` can be
    closed afterwards. The arguments are `quality`'s; `folder` is where the file goes (default: the system's temporary
    folder). Raises ValueError as `quality` does, and where the file would be over 2 GB or the free disk;
    NonFiniteLogits for a model that can be no reference.
    """
    _check(lm)
    return Reference(lm, make_plan(lm, text, tokens, context, stride), folder, progress)


class Reference:
    """What `qb.reference` made: a text's log-probabilities on disk, and the reference's own `quality`.

    Float16 [tokens, vocabulary] in one file. They are normalised again when they are read, which leaves of the
    rounding a KL of the order of 1e-7. A context manager: leaving it, or `close`, deletes the file.
    """

    def __init__(self, lm: LoadedModel, plan: Plan, folder: str | Path | None, progress: bool) -> None:
        self.name, self.revision, self.weights, self.setting = lm.name, lm.revision, lm.weights, lm.setting
        self.plan = plan
        _need_disk(plan.tokens, lm.model.config.get_text_config().vocab_size, folder or tempfile.gettempdir())
        self._folder = tempfile.TemporaryDirectory(prefix="quantbench-", dir=folder, ignore_cleanup_errors=True)
        self.file = Path(self._folder.name) / "log-probabilities.f16"
        try:
            with self.file.open("wb") as file:
                found, cost = _evaluate(lm, plan, _needs_steps(lm), progress,
                                        keep=lambda rows: file.write(rows.half().cpu().numpy().tobytes()))
        except BaseException:
            self.close()
            raise
        self.known = {"base_nll": found["nll"], "base_top": found["top"]}  # exact; only KL needs the file
        itself = found | self.known | {"kl": torch.zeros_like(found["nll"])}
        self.quality = Quality(**_whose(lm), **_on(plan, self, _needs_steps(lm)), **figures(itself, plan), **cost)

    def log_probs(self, window: Window) -> torch.Tensor:
        """Of one window's scored tokens, mapped from the file [scored, vocabulary]."""
        everything = torch.from_file(str(self.file), size=self.file.stat().st_size // 2, dtype=torch.float16)
        return everything.view(self.plan.tokens, -1)[window.end - window.scored - 1:window.end - 1]

    def close(self) -> None:
        """Delete the file."""
        self._folder.cleanup()

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{self.name} · {self.setting.label}: reference for {self.plan.tokens} tokens of {self.plan.text}"


def _check(lm: LoadedModel) -> None:
    """Raise ValueError for a model whose figures would mean nothing."""
    if lm.status != "ok" or lm.model is None:
        raise ValueError(f"{lm!r}: quality needs a loaded model")
    if lm.weights == "random":
        raise ValueError(f"{lm.name} has random weights here ({lm.revision}): its text is noise, and its quality would "
                         "be a number about nothing. Take a model with real weights, such as 'smollm2-135m'")
    if isinstance(lm.tokenizer, StandInTokenizer):
        raise ValueError(f"{lm.name} has no tokenizer in its folder: its tokens would not be those it was trained on")


def _against(lm: LoadedModel, reference: LoadedModel | Reference | None, text: str | None, tokens: int | None,
             context: int, stride: int | None) -> tuple:
    """The plan, what gives the reference's logits of a batch, and what is known of it exactly."""
    if reference is not None and (reference.name, reference.revision, reference.weights) != (
            lm.name, lm.revision, lm.weights):
        raise ValueError(f"quality is paired with the same model under another setting, not {reference!r}")
    if not isinstance(reference, Reference):
        plan = make_plan(lm, text, tokens, context, stride)
        if reference is None:
            return plan, None, {}
        _check(reference)
        return plan, partial(forward, reference, plan=plan, stepwise=_needs_steps(reference)), {}
    if (text, tokens, context, stride) != (None, None, CONTEXT, None):
        raise ValueError("the reference was made with its text, tokens, context and stride: they hold here too")
    if not reference.file.is_file():
        raise ValueError(f"{reference!r} is closed: make it again")
    return reference.plan, reference.log_probs, reference.known


def _needs_steps(lm: LoadedModel) -> bool:
    return QUANTISERS[lm.setting.quantisation].stepwise


def _evaluate(lm: LoadedModel, plan: Plan, stepwise: bool, progress: bool, base=None, keep=None) -> tuple[Values, dict]:
    """The values per token (see `logits.evaluate`), and what the pass cost."""
    held, has_peak = machine.held_bytes(lm.device), machine.reset_peak(lm.device)
    start = time.perf_counter()
    found = evaluate(lm, plan, stepwise, base, keep, progress)
    seconds = time.perf_counter() - start  # the values are on the CPU by now
    return found, {"eval_s": seconds, "eval_tokens_per_s": plan.tokens / seconds,
                   "peak_bytes": max(machine.peak_bytes(lm.device) - held, 0) if has_peak else None}


def _whose(lm: LoadedModel) -> dict:
    return {"model": lm.name, "revision": lm.revision, "weights": lm.weights, "setting": lm.setting.key,
            "machine": machine.facts(), "versions": machine.versions()}


def _on(plan: Plan, reference: LoadedModel | Reference | None, stepwise: bool) -> dict:
    return {"text": plan.text, "text_sha256": plan.sha256, "tokens": plan.tokens, "context": plan.context,
            "stride": plan.stride, "windows": len(plan.windows), "stepwise": stepwise,
            "reference": None if reference is None else reference.setting.key}


def _need_disk(tokens: int, vocab_size: int, folder: str | Path) -> None:
    need, limit = 2 * tokens * vocab_size, min(DISK_BYTES, shutil.disk_usage(folder).free)
    if need > limit:
        raise ValueError(f"the reference's log-probabilities would take {need / 1e9:.1f} GB on disk, over the "
                         f"{limit / 1e9:.1f} GB there are: give tokens={limit // (2 * vocab_size)}, or the loaded "
                         "model itself as the reference, which needs no disk")
