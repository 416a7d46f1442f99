"""What a quality pass found for one model under one setting, as plain data."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from quantbench.intervals import LEAST
from quantbench.records import (STATUSES, STRICT, Amount, Count, Machine, Many, Name, Shares, Span, Subject, Text,
                                Versions, Weights, now)
from quantbench.wording import span


@dataclass(frozen=True, kw_only=True, repr=False, config=STRICT)
class Quality(Subject):
    """Quality of a model under a setting on a text; with a reference, paired with it token by token.

    `status` is "ok", "failed" (logits that are not finite), or what kept the model from being loaded or run, with
    its `reason`; then there are no figures. Definitions as in llama.cpp's perplexity tool
    (tools/perplexity/README.md there), but the units are shares, not per cent, and the intervals are 95% intervals
    over windows of the text (see `pairing.interval`), None below 6.
    """

    model: Name
    setting: Name
    created_at: Name = field(default_factory=now)
    revision: Name | None = None
    weights: Weights | None = None
    machine: Machine = field(default_factory=dict)
    versions: Versions = field(default_factory=dict)
    status: Literal[STATUSES] = "ok"
    reason: Text | None = None
    # on what
    text: Name | None = None  # the text's name
    text_sha256: Name | None = None
    tokens: Count | None = None  # scored: every token of the text but the first
    context: Count | None = None  # tokens in a window
    stride: Count | None = None  # tokens from one window to the next; after the first, each scores its last ones
    windows: Count | None = None
    stepwise: bool | None = None  # each window run as generation runs, not in one pass
    # alone
    perplexity: Amount | None = None  # exp(mean negative log-likelihood)
    perplexity_se: Amount | None = None  # its standard error over windows
    accuracy: Amount | None = None  # share of tokens that were the model's first choice
    # paired with the reference
    reference: Name | None = None  # the reference's setting
    kl_mean: float | None = None  # mean KL(reference || this), nats
    kl_ci: Span | None = None
    kl_windows: Annotated[list[float], Many] | None = None  # its mean in each window: where two settings meet
    kl_p99: float | None = None  # the 99th percentile over tokens
    dp_mean: float | None = None  # change of the true token's probability: mean, percentiles, root mean square
    dp_percentiles: Annotated[Shares, Many] | None = None  # "1", "5", "50", "95", "99"
    dp_rms: float | None = None
    top1_agreement: Amount | None = None  # share of tokens where both have the same first choice ("same top p")
    top1_ci: Span | None = None
    accuracy_kept: Amount | None = None  # accuracy over the reference's
    accuracy_kept_ci: Span | None = None
    # the pass itself
    eval_s: Amount | None = None  # a reference that runs alongside included
    eval_tokens_per_s: Amount | None = None
    peak_bytes: Count | None = None  # above what was held before: VRAM on a GPU, resident on a CPU

    @property
    def key(self) -> tuple:
        """One quality per subject, text and windows."""
        return (*self.subject, self.text_sha256, self.tokens, self.context, self.stride, self.reference)

    @property
    def keeps_99(self) -> bool | None:
        """Whether 99% of the reference's accuracy is kept, MLPerf Inference's quality target: True or False where
        `accuracy_kept_ci` lies wholly above or below it and is of enough windows; None where that does not tell."""
        if self.accuracy_kept_ci is None or (self.windows or 0) < LEAST:
            return None
        low, high = self.accuracy_kept_ci
        return True if low > 0.99 else False if high < 0.99 else None

    def summary(self) -> dict[str, str]:
        """The figures as a person reads them: label -> text."""
        row = {"Model": self.model, "Setting": self.setting_label}
        if self.status != "ok" or self.perplexity is None:
            return row | {"Status": self.status, "Reason": self.reason or ""}
        error = "" if self.perplexity_se is None else f" ± {self.perplexity_se:.2f}"
        row |= {"Text": f"{self.text}, {self.tokens} tokens", "Perplexity": f"{self.perplexity:.2f}{error}"}
        if self.kl_mean is not None:
            row["KL vs reference"] = f"{self.kl_mean:.2g}" + (f" ({span(self.kl_ci, '.2g')})" if self.kl_ci else "")
        if self.top1_agreement is not None:
            row["Top-1 agreement"] = f"{self.top1_agreement:.1%}"
        return row | ({} if self.eval_tokens_per_s is None else {"Evaluated": f"{self.eval_tokens_per_s:.0f} tokens/s"})
