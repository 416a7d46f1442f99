"""Timed generation: one cell's samples, taken the way docs and README say they are."""

import time
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from quantbench import machine
from quantbench.decode import Unavailable, find_engine, inputs_of, why_no_cache
from quantbench.inspection import cache_bytes, held_in
from quantbench.loading import LoadedModel
from quantbench.records import Measurement
from quantbench.settings import CACHES, PROMPT, Workload, expect
from quantbench.tokens import check_length, context_length

REPEATS = (3, 10)  # at least, at most
CLOSE_ENOUGH = 0.03  # stop repeating when half the range is within this share of the median
CPU_WARM_UP_TOKENS = 16  # on a GPU the warm-up has full length: kernels are chosen and memory is grown by then
SAMPLE = ("latencies_s", "first_token_s", "energy_j", "sampled_at", "rounds")


def generate(lm: LoadedModel, prompt: str = PROMPT, max_new_tokens: int = 128, *, batch_size: int = 1,
             prompt_tokens: int | None = None, depth: int = 0, cache: str = "default", repeats: int | None = None,
             budget_s: float = 30.0, engine: str = "eager", clock: Callable[[], float] = time.perf_counter,
             progress: bool = True) -> Measurement:
    """Greedy generation of exactly `max_new_tokens` tokens for `batch_size` copies of `prompt`, timed at once.

    After a warm-up, 3 to 10 repeats: until half their range is within 3% of the median or `budget_s` seconds are
    spent; `repeats` fixes their number. Each repeat also times a `generate` of one token, the time to first token.
    `prompt_tokens` asks for a prompt of exactly so many tokens, `depth` for as many in the KV cache before it, `cache`
    for a kind of it (see `Workload`). `clock` returns seconds. Nothing but generation runs between two readings of it.
    The row is compared with no other one: what two settings differ by is measured side by side, in rounds, by `sweep`.

    `engine` is a key of `ENGINES`: "eager" (transformers' generate), "graph" (one captured decode step) or "compile"
    (compiled, then captured); the text of the last two is held against eager's.

    A model that could not be loaded, or that runs out of memory, gives a row that says so. Raises ValueError for a
    workload that cannot run or is over the context length, RuntimeError for a closed model or a wrong token count."""
    expect(lm, LoadedModel, "generate takes what qb.load returns")
    workload = Workload(prompt, max_new_tokens, batch_size, repeats, budget_s, prompt_tokens, depth, cache)
    cell = Timed(lm, workload, engine, clock)
    told = f"{lm.name} · {lm.setting.label} · {workload.max_new_tokens} tokens"
    with tqdm(total=workload.repeats or REPEATS[1], desc=told, unit="repeat", leave=False, disable=not progress) as bar:
        while not cell.ended and not cell.enough():
            cell.sample()
            bar.update()
        bar.total = bar.n  # fewer than 10 were enough: a notebook would paint the bar red
    return cell.measurement()


class Timed:
    """One cell, ready to be sampled: its engine is made and warmed up when this is. `ended` says why there will be no
    (more) sample: then `sample` does nothing, and `measurement` is a row with that status and reason."""

    def __init__(self, lm: LoadedModel, workload: Workload, engine: str = "eager",
                 clock: Callable[[], float] = time.perf_counter) -> None:
        self.lm, self.workload, self.clock, kind = lm, workload, clock, find_engine(engine)
        self.samples: dict[str, list] = {name: [] for name in SAMPLE}
        self.ended: tuple[str, str | None] | None = None if lm.status == "ok" else (lm.status, lm.reason)
        self.facts = workload.asked(lm.name, lm.setting, engine) | {name: getattr(lm, name) for name in (
            "revision", "weights", "load_s", "weights_bytes", "held_before_bytes", "load_peak_bytes", "audit")} | {
            "machine": machine.facts(), "versions": machine.versions()}
        if self.ended:
            return
        if lm.model is None:
            raise RuntimeError(f"{lm!r}: load it again to generate")
        if (reason := kind.why_not(lm)) or workload.cache not in getattr(kind, "caches", ("default",)):
            self.ended = "unavailable", reason or f"the {engine} engine runs with no {workload.cache} cache"
            return
        prompt_tokens = workload.prompt_tokens or lm.encode(workload.prompt)["input_ids"].shape[1]
        check_length(lm.name, prompt_tokens, workload, context_length(lm.model.config))
        self.facts["prompt_tokens"], self.before = prompt_tokens, workload.depth + prompt_tokens
        self._unless_it_ends(self._prepare, kind)

    def enough(self) -> bool:
        """Whether its samples are as many as were asked for, or agree, or took the time that there is."""
        seconds, (least, most), work = sorted(self.samples["latencies_s"]), REPEATS, self.workload
        if work.repeats is not None or len(seconds) < least or len(seconds) >= most:
            return len(seconds) >= (work.repeats or most)
        close = (seconds[-1] - seconds[0]) / 2 <= CLOSE_ENOUGH * seconds[len(seconds) // 2]
        return close or sum(seconds) + sum(self.samples["first_token_s"]) >= work.budget_s

    def sample(self, round_name: str | None = None) -> None:
        """Time one generation and one of a single token; `round_name` is kept with them."""
        if not self.ended:
            self._unless_it_ends(self._sample, round_name)

    def measurement(self) -> Measurement:
        """The row of all samples so far. The engine's text is held against eager's now, outside every timed region."""
        made = None if self.ended else self._unless_it_ends(self._finish)
        return Measurement(**self.facts | (made or dict(zip(("status", "reason"), self.ended))))

    def _prepare(self, kind: type) -> None:
        lm, tokens, bits = self.lm, self.workload.max_new_tokens, CACHES[self.workload.cache]
        if reason := why_no_cache(self.workload.cache, lm.model):
            raise Unavailable(reason)
        self.room = cache_bytes(lm.audit, self.before + tokens - 1) * self.workload.batch_size
        needed = self.room * bits // (8 * lm.model.dtype.itemsize) if bits else self.room
        machine.need_memory(needed, machine.free_bytes(lm.device, lm.setting.gpus), "the KV cache")
        machine.release(lm.device)  # an engine of the call before may still hold its graph
        held, self.idle = machine.held_bytes(lm.device), machine.readings(lm.device, machine.IDLE_S[lm.device])
        start = time.perf_counter()
        self.engine = kind(lm, inputs_of(lm, self.workload), tokens, self.workload.depth)
        self.engine.rewind()
        self._timed(tokens if lm.device == "cuda" else min(tokens, CPU_WARM_UP_TOKENS))
        self.facts["prepare_s"] = time.perf_counter() - start
        self.engine.rewind()  # what it rewinds to is no part of a generation's memory
        held, self.peak_bytes = held + held_in(getattr(self.engine, "filled", None)) * (lm.device == "cuda"), None
        self.engine_bytes = machine.held_bytes(lm.device) - held

    def _sample(self, round_name: str | None) -> None:
        self.engine.rewind()
        device, at, held = self.lm.device, time.time(), machine.held_bytes(self.lm.device)
        machine.reset_peak(device)
        start_j = machine.energy_j(device, self.lm.setting.gpus)
        seconds, self.output = self._timed(self.workload.max_new_tokens)
        end_j = machine.energy_j(device, self.lm.setting.gpus)
        if self.lm.load_peak_bytes is not None:  # else no peak of it can be told
            self.peak_bytes = max(self.peak_bytes or 0, machine.peak_bytes(device) - held)
        if (gpus := self.lm.setting.gpus) > 1:
            self.facts |= {"gpu_peak_bytes": [torch.cuda.max_memory_allocated(gpu) for gpu in range(gpus)],
                           "gpu_busy": machine.gpus_busy(gpus)}
        self.facts["cache_bytes"] = held_in(getattr(self.engine, "cache", None)) or self.room or None
        self.engine.rewind()
        first = self._timed(1)[0]
        joules = None if start_j is None or end_j < start_j else end_j - start_j  # less: the counter started anew
        for name, value in zip(SAMPLE, (seconds, first, joules, at, round_name)):
            self.samples[name].append(value)

    def _timed(self, tokens: int) -> tuple[float, torch.Tensor]:
        """Seconds of one generation of exactly `tokens` tokens, and its output [batch, all tokens]."""
        machine.synchronize(self.lm.device)
        start = self.clock()
        output = self.engine(tokens)
        machine.synchronize(self.lm.device)
        seconds = self.clock() - start
        if (new := output.shape[1] - self.before) != tokens:
            raise RuntimeError(f"the model generated {new} tokens where {tokens} were asked for")
        return seconds, output

    def _finish(self) -> dict:
        lm, tokens = self.lm, self.workload.max_new_tokens
        kept = {name: values for name, values in self.samples.items() if None not in values}
        conditions = {"before": self.idle, "after": machine.readings(lm.device)}
        memory = self._memory()
        reason, wrong = self.engine.differs(self.output)
        text, status = lm.decode(self.output[0, -tokens:]), "failed" if wrong else "ok"
        return kept | memory | {"new_tokens": tokens, "text": text, "conditions": conditions, "reason": reason,
                                "status": status}

    def _memory(self) -> dict:
        """The peak of this model alone: what it took at load, what its engine holds, and what a generation added."""
        lm = self.lm
        own = lm.held_after_bytes - lm.held_before_bytes + self.engine_bytes
        peak = None if self.peak_bytes is None else max(own + self.peak_bytes, 0)
        if lm.device == "cpu":
            return {"ram_peak_bytes": peak}
        reserved = sum(map(torch.cuda.memory_reserved, machine.used_gpus())) or None  # another library holds it
        return {"vram_peak_bytes": peak, "vram_reserved_bytes": reserved,
                "vram_device_bytes": machine.device_bytes(lm.setting.gpus) - lm.device_before_bytes}

    def _unless_it_ends(self, work: Callable, *args: object) -> object:
        try:
            return work(*args)
        except (RuntimeError, MemoryError) as error:
            refused = isinstance(error, Unavailable)
            if (reason := str(error) if refused else machine.out_of_memory(error)) is None:
                raise
        self.ended = "unavailable" if refused else "out_of_memory", reason
        self.engine = self.output = None
        machine.release(self.lm.device)
        return None
