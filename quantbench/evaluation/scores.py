"""What a quality pass found for one model under one setting, as plain data."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic.dataclasses import dataclass

from quantbench.fields import STRICT, Amount, Count, Machine, Many, Name, Text, Versions, Weights
from quantbench.intervals import LEAST, Interval
from quantbench.records import STATUSES, Subject, now


@dataclass(frozen=True, kw_only=True, repr=False, config=STRICT)
class Quality(Subject):
    """Quality of a model under a setting on a text; with a reference, paired with it token by token.

    `status` is "ok", "failed" (logits that are not finite), or what kept the model from being loaded or run, with its
    `reason`; then there are no figures. Definitions as in llama.cpp's perplexity tool, but shares are no per cent, and
    intervals are 95% intervals over windows of the text, None below 6 (see `passes.ratio`)."""

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
    cache: Name = "default"  # then with this one
    # alone
    perplexity: Amount | None = None  # exp(mean negative log-likelihood)
    perplexity_se: Amount | None = None  # its standard error over windows
    accuracy: Amount | None = None  # share of tokens that were the model's first choice
    # paired with the reference
    reference: Name | None = None  # the reference's setting
    kl_mean: float | None = None  # mean KL(reference || this), nats
    kl_ci: Interval | None = None
    kl_windows: Annotated[list[float], Many] | None = None  # its mean in each window: where two settings meet
    kl_p99: float | None = None  # the 99th percentile over tokens
    top1_agreement: Amount | None = None  # share of tokens where both have the same first choice ("same top p")
    accuracy_kept: Amount | None = None  # accuracy over the reference's
    accuracy_kept_ci: Interval | None = None

    @property
    def key(self) -> tuple:
        """One quality per subject, text and windows."""
        return (*self.subject, self.cache, self.text_sha256, self.tokens, self.context, self.stride, self.reference)

    @property
    def setting_label(self) -> str:
        return super().setting_label + f", {self.cache} cache" * (self.cache != "default")

    @property
    def keeps_99(self) -> bool | None:
        """Whether 99% of the reference's accuracy is kept (MLPerf Inference's target); None: the interval tells not."""
        low, high = self.accuracy_kept_ci or (0, 1)
        return None if (self.windows or 0) < LEAST or low <= 0.99 <= high else low > 0.99

    def summary(self) -> dict[str, str]:
        """The figures as a person reads them: label -> text."""
        told = {"Model": self.model, "Setting": self.setting_label}
        if self.status != "ok" or self.perplexity is None:
            return told | {"Status": self.status, "Reason": self.reason or ""}
        told |= {"Text": f"{self.text}, {self.tokens} tokens", "Perplexity": f"{self.perplexity:.2f}"}
        paired = {"KL vs reference": (self.kl_mean, ".2g"), "Top-1 agreement": (self.top1_agreement, ".1%")}
        return told | {label: f"{value:{digits}}" for label, (value, digits) in paired.items() if value is not None}
