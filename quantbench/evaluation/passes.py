"""Quality of a setting: perplexity, and token by token against a reference. Never inside a timed region."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from scipy.stats import t
from tqdm.auto import tqdm

from quantbench import machine
from quantbench.decode import TEXT, read, stepwise_logits, why_no_cache
from quantbench.evaluation.scores import Quality
from quantbench.intervals import LEAST, Interval
from quantbench.loading import LoadedModel, StandInTokenizer, context_length
from quantbench.settings import CACHES, MOST_SAMPLES, expect, whole

LEAST_TOKENS = 32  # of a text that is worth a number
MOST_BYTES = 2 * 10**9  # of a reference's log-probabilities: 3,000 tokens of the largest vocabularies
ROWS = 64  # tokens whose log-probabilities are worked on at a time: five such float32 tensors are held
Window = tuple[torch.Tensor, int]  # what the model is given [1, tokens], and how many of the last ones are scored


class Reference(AbstractContextManager):
    """What `qb.reference` made: the reference's own `quality`, and its log-probabilities, until it is closed or left as
    a context manager. They are float16, normalised again when they are read: that leaves a KL of some 1e-7."""

    def __init__(self, lm: LoadedModel, read: tuple[list[Window], dict], progress: bool) -> None:
        per_token = 2 * lm.model.config.get_text_config().vocab_size
        if read[1]["tokens"] * per_token > MOST_BYTES:
            raise ValueError(f"a reference of {read[1]['tokens']} tokens would take over {MOST_BYTES / 1e9:.0f} GB of "
                             f"RAM: give tokens={MOST_BYTES // per_token}")
        whole("the number of windows (fewer by a larger stride)", len(read[0]), most=MOST_SAMPLES)
        self.name, self.revision, self.weights, self.setting = lm.name, lm.revision, lm.weights, lm.setting
        self.read, self.kept = read, []
        self.quality = _measured(lm, *read, self, None, progress)
        if self.quality.status != "ok":
            raise ValueError(f"{lm.name} under {lm.setting.label} can be no reference: {self.quality.reason}")

    def __exit__(self, *error: object) -> None:
        self.kept.clear()

    close = __exit__


def reference(lm: LoadedModel, text: str | None = None, tokens: int | None = None, *, context: int | None = None,
              stride: int | None = None, progress: bool = True) -> Reference:
    """Evaluate `lm` once and keep its log-probabilities in RAM, 2 GB at most, for other settings to be compared with:
    `lm` can be closed afterwards. The arguments are `quality`'s; raises ValueError as it does, and where `lm` fails."""
    return Reference(lm, _read(lm, text, tokens, context, stride), progress)


def quality(lm: LoadedModel, reference: LoadedModel | Reference | None = None, text: str | None = None,
            tokens: int | None = None, *, context: int | None = None, stride: int | None = None,
            stepwise: bool | None = None, cache: str = "default", progress: bool = True) -> Quality:
    """Perplexity of `lm` on the first `tokens` tokens of `text`, and how it differs from `reference`, token by token.

    `text`: see `find_text`. Windows of `context` tokens (512, or all that the model has) begin every `stride` (half of
    it). `reference` is the same model under another setting: what `qb.reference` made, text and windows with it, or a
    loaded model. `stepwise` runs each window as generation does, token by token after a prompt; None: only where the
    quantiser needs it. So does a `cache` (see `Workload`) other than the default, always: the reference has the whole
    of its keys and values.

    A model that was not loaded, runs out of memory, or gives logits that are not finite, gives a `Quality` that says
    so. Raises ValueError for random weights, which have no quality, and for what cannot be evaluated or compared."""
    CACHES.find(cache)
    if expect(lm, LoadedModel, "quality takes what qb.load returns").status != "ok":
        return Quality(**_whose(lm), cache=cache, status=lm.status, reason=lm.reason)
    _check(lm)
    expect(reference, LoadedModel | Reference | None, "reference must be what qb.reference or qb.load returns")
    if reference and (reference.name, reference.revision, reference.weights) != (lm.name, lm.revision, lm.weights):
        raise ValueError(f"quality is paired with the same model under another setting, not {reference!r}")
    if isinstance(reference, LoadedModel):
        reference = Reference(reference, _read(reference, text, tokens, context, stride), progress)
    elif reference and ({text, tokens, context, stride} != {None} or not reference.kept):
        raise ValueError("a reference brings its text, tokens, context and stride, and must not be closed")
    read = reference.read if reference else _read(lm, text, tokens, context, stride)
    return _measured(lm, *read, reference, stepwise, progress, cache)


def _check(lm: LoadedModel) -> None:
    if expect(lm, LoadedModel, "quality takes what qb.load returns").model is None:
        raise ValueError(f"quality needs a loaded model, not {lm!r}")
    if lm.weights == "random":
        raise ValueError(f"{lm.name} has random weights here: its quality is that of noise. Take smollm2-135m, say")
    if isinstance(lm.tokenizer, StandInTokenizer):
        raise ValueError(f"{lm.name} has no tokenizer in its folder: its tokens would not be those it was trained on")


def _whose(lm: LoadedModel) -> dict:
    return {"model": lm.name, "revision": lm.revision, "weights": lm.weights, "setting": lm.setting.key,
            "machine": machine.facts(), "versions": machine.versions()}


# ---- the text ----

def find_text(text: str | None = None) -> tuple[str, str]:
    """A text's name and the text. None or "quantbench-eval": about 3,000 tokens of prose written for this project, so
    that no model has seen them. "wikitext-2": the raw test set of WikiText-2 (Merity et al. 2016), from the Hub."""
    if text in (None, "quantbench-eval"):
        return "quantbench-eval", TEXT.read_text(encoding="utf-8").strip()
    if expect(text, str, "text must be the text itself, or 'wikitext-2'") != "wikitext-2":
        return "own text", text
    from huggingface_hub import hf_hub_download
    from pyarrow import parquet

    path = hf_hub_download("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet", repo_type="dataset")
    return text, "\n\n".join(parquet.read_table(path)["text"].to_pylist())  # as for GPT-2's published figures


def windows_of(ids: torch.Tensor, context: int, stride: int, bos: int | None = None) -> list[Window]:
    """Windows of `context` tokens that begin every `stride`: the first scores all its tokens but the first, every other
    its last `stride`, so that each token is scored once, with at least context - stride before it (transformers' guide
    to the perplexity of fixed-length models). `bos` replaces each window's first token, as in llama.cpp."""
    windows, done = [], 1
    for start in range(0, max(len(ids) - context, 0) + stride, stride):
        end = min(start + context, len(ids))
        first = ids[start:start + 1] if bos is None else torch.tensor([bos])
        windows.append((torch.cat([first, ids[start + 1:end]])[None], end - done))
        done = end
    return windows


def _read(lm: LoadedModel, text: str | None, tokens: int | None, context: int | None,
          stride: int | None) -> tuple[list[Window], dict]:
    """The windows of a text, and what a record says of them."""
    _check(lm)
    room = context_length(lm.model.config) or math.inf
    context = whole("context", min(512, room) if context is None else context, 2)
    stride = whole("stride", context // 2 if stride is None else stride)
    tokens = None if tokens is None else whole("tokens", tokens, LEAST_TOKENS)
    if stride >= context:
        raise ValueError(f"stride must be below the context of {context}, not {stride}: tokens would go unscored")
    if context > room:
        raise ValueError(f"a context of {context} is over the {room} tokens {lm.name} has positions for")
    name, body = find_text(text)
    ids, bos = lm.tokenizer.encode(body)[:tokens], getattr(lm.tokenizer, "bos_token_id", None)
    if len(ids) < LEAST_TOKENS:
        raise ValueError(f"a text of {len(ids)} tokens is too short: give {LEAST_TOKENS} tokens, or 'wikitext-2', say")
    windows = windows_of(torch.tensor(ids), context, stride, bos if ids[0] == bos else None)
    return windows, {"text": name, "text_sha256": hashlib.sha256(body.encode(errors="replace")).hexdigest(),
                     "tokens": len(ids) - 1, "context": context, "stride": stride, "windows": len(windows)}


# ---- from logits to values per token, and to figures ----

def _measured(lm: LoadedModel, windows: list[Window], on: dict, reference: Reference | None, stepwise: bool | None,
              progress: bool, cache: str = "default") -> Quality:
    stepwise = cache != "default" or (lm.way.stepwise if stepwise is None else stepwise)
    on = _whose(lm) | on | {"stepwise": stepwise, "cache": cache, "reference": reference and reference.setting.key}
    try:
        if reason := why_no_cache(cache, lm.model):
            return Quality(**on, status="unavailable", reason=reason)
        values = torch.cat(list(_values(lm, windows, stepwise and cache, reference and reference.kept, progress)))
        if not values.isfinite().all():
            return Quality(**on, status="failed", reason="the logits are not finite")
        return Quality(**on, **_figures(values, [scored for _, scored in windows], paired=reference is not None))
    except (RuntimeError, MemoryError) as error:
        if (reason := machine.out_of_memory(error)) is None:
            raise
    machine.release(lm.device)
    return Quality(**on, status="out_of_memory", reason=reason)


@torch.inference_mode()
def _values(lm: LoadedModel, windows: list[Window], cache: str | bool, kept: list | None,
            progress: bool) -> Iterator[torch.Tensor]:
    """ROWS tokens at a time, float64 on the CPU [rows, 5]: negative log-likelihood (nats), whether it was the first
    choice, KL(reference || this) (nats), whether both have the same first choice, whether it was the reference's.

    `kept`, the reference's log-probabilities and first choices, is filled where it is empty: by the reference's pass.
    `cache` is what holds keys and values from token to token; False: each window is read in one pass."""
    title, filling, reading = f"{lm.name} · {lm.setting.label} · quality", kept == [], iter(kept or ())
    for seen, scored in tqdm(windows, desc=title, unit="window", leave=False, disable=not progress):
        ids = seen.to(lm.model.device)
        logits = stepwise_logits(lm.model, ids, scored, cache)[0] if cache else (
            read(lm.model, ids, scored + 1, use_cache=False).logits[0, -scored - 1:-1])
        for some, true in zip(logits.split(ROWS), ids[0, -scored:].split(ROWS)):
            ours = some.float().log_softmax(-1)
            first = base_first = ours.argmax(-1)
            kl = torch.zeros_like(ours[:, 0])
            if filling:
                kept.append((ours.half().cpu(), first.cpu()))
            elif kept:
                base, base_first = (one.to(ours.device) for one in next(reading))
                base = base.float().log_softmax(-1)
                kl = (base.exp() * (base - ours)).masked_fill_(base == -torch.inf, 0).sum(-1)  # ruled out: adds nothing
            found = -ours.gather(1, true[:, None])[:, 0], first == true, kl, first == base_first, base_first == true
            yield torch.stack([column.double() for column in found], dim=1).cpu()


def _figures(values: torch.Tensor, scored: list[int], paired: bool) -> dict:
    nll, right, kl, same, base_right = torch.stack([part.sum(0) for part in values.split(scored)], dim=1)
    sizes = torch.tensor(scored, dtype=torch.float64)
    (mean, error, _), (kl_mean, _, kl_ci), (kept, _, kept_ci) = (
        ratio(nll, sizes), ratio(kl, sizes), ratio(right, base_right))
    perplexity = math.exp(min(mean, 60.0))  # of a broken model it stays a number
    found = {"perplexity": perplexity, "perplexity_se": error and perplexity * error,
             "accuracy": ratio(right, sizes)[0]}
    return found | {"kl_mean": kl_mean, "kl_ci": kl_ci, "kl_windows": (kl / sizes).tolist(),
                    "kl_p99": values[:, 2].quantile(0.99).item(), "top1_agreement": ratio(same, sizes)[0],
                    "accuracy_kept": kept, "accuracy_kept_ci": kept_ci} if paired else found


def ratio(tops: torch.Tensor, bottoms: torch.Tensor) -> tuple[float | None, float | None, Interval | None]:
    """sum(tops) / sum(bottoms), its standard error over windows, whose sums these are (Cochran 1977, 6.5), and its 95%
    interval, Student's t: of 6 windows of simulated text it covers 92 to 95 times in 100, a bootstrap 84 to 86 times.
    None below 6 windows. Not over tokens, as in llama.cpp: those of a window share their text."""
    windows, total = len(tops), bottoms.sum().item()
    value = tops.sum().item() / total if total > 0 else None
    if windows < LEAST or value is None:
        return value, None, None
    error = (windows / (windows - 1) * (tops - value * bottoms).square().sum()).sqrt().item() / total
    half = t.ppf(0.975, windows - 1) * error
    return value, error, (max(value - half, 0.0), max(value + half, 0.0))
