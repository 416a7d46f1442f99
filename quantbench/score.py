"""What a quality pass found for one model under one setting, as plain data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from quantbench.plain import html_table
from quantbench.record import FIGURES, Measurement
from quantbench.settings import SETTINGS


@dataclass(frozen=True, kw_only=True, repr=False)
class Quality:
    """Quality of a model under a setting on a text; with a reference, paired with it token by token.

    `status` is "ok", "failed" (logits that are not finite), or what kept the model from being loaded or run, with
    its `reason`; then there are no figures. Definitions as in llama.cpp's perplexity tool
    (tools/perplexity/README.md there), but the units are shares, not per cent, and the intervals are 95% bootstrap
    intervals over windows (see `pairing`).
    """

    model: str
    setting: str
    revision: str | None = None
    weights: str | None = None
    machine: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    status: str = "ok"
    reason: str | None = None
    # on what
    text: str | None = None  # the text's name
    text_sha256: str | None = None
    tokens: int | None = None  # scored: every token of the text but the first
    context: int | None = None  # tokens in a window
    stride: int | None = None  # tokens from one window to the next; after the first, each scores its last ones
    windows: int | None = None
    stepwise: bool | None = None  # each window run as generation runs, not in one pass
    # alone
    perplexity: float | None = None  # exp(mean negative log-likelihood)
    perplexity_se: float | None = None  # its standard error over windows
    accuracy: float | None = None  # share of tokens that were the model's first choice
    # paired with the reference
    reference: str | None = None  # the reference's setting
    kl_mean: float | None = None  # mean KL(reference || this), nats
    kl_ci: list[float] | None = None
    kl_p99: float | None = None  # the 99th percentile over tokens
    dp_mean: float | None = None  # change of the true token's probability: mean, percentiles, root mean square
    dp_percentiles: dict | None = None  # "1", "5", "50", "95", "99"
    dp_rms: float | None = None
    top1_agreement: float | None = None  # share of tokens where both have the same first choice ("same top p")
    top1_ci: list[float] | None = None
    accuracy_kept: float | None = None  # accuracy over the reference's
    accuracy_kept_ci: list[float] | None = None
    keeps_99: bool | None = None  # MLPerf Inference's quality targets, here of the reference's `accuracy`
    keeps_999: bool | None = None
    # the pass itself
    eval_s: float | None = None  # a reference that runs alongside included
    eval_tokens_per_s: float | None = None
    peak_bytes: int | None = None  # above what was held before: VRAM on a GPU, resident on a CPU

    def __post_init__(self) -> None:
        for name, value in self.found().items():
            numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise ValueError(f"{name} must be finite, not {value!r}")

    machine_name, subject = Measurement.machine_name, Measurement.subject  # a row with the same subject takes it

    def found(self) -> dict:
        """What a row keeps of it, as plain JSON: everything but whose it is."""
        whose = ("model", "setting", "revision", "weights", "machine", "versions")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in whose}

    def summary(self) -> dict[str, str]:
        """The figures as a person reads them: label -> text."""
        setting = SETTINGS[self.setting].label if self.setting in SETTINGS else self.setting
        row = {"Model": self.model, "Setting": setting}
        if self.status != "ok":
            return row | {"Status": self.status, "Reason": self.reason or ""}
        row |= {"Text": f"{self.text}, {self.tokens} tokens",
                FIGURES["perplexity"].label: f"{self.perplexity:.2f}" + (
                    f" ± {self.perplexity_se:.2f}" if self.perplexity_se is not None else "")}
        if self.reference is not None:
            span = "" if self.kl_ci is None else f" ({self.kl_ci[0]:.2g}–{self.kl_ci[1]:.2g})"
            row |= {FIGURES["kl_mean"].label: f"{self.kl_mean:.2g}{span}",
                    FIGURES["top1_agreement"].label: f"{self.top1_agreement:.1%}"}
        return row | ({} if self.eval_tokens_per_s is None else {"Evaluated": f"{self.eval_tokens_per_s:.0f} tokens/s"})

    def __repr__(self) -> str:
        return "Quality(" + ", ".join(f"{label}: {text}" for label, text in self.summary().items()) + ")"

    def _repr_html_(self) -> str:
        return html_table([self.summary()])
