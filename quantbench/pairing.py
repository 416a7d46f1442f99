"""From values per token to a setting's figures, each with what is known of its uncertainty."""

from __future__ import annotations

import math

import torch

from quantbench.stats import RESAMPLES, SEED

PERCENTILES = (1, 5, 50, 95, 99)
TARGETS = {"keeps_99": 0.99, "keeps_999": 0.999}  # MLPerf Inference, quality targets of the closed division


def alone(found: dict[str, torch.Tensor], targets: torch.Tensor, window: torch.Tensor) -> dict:
    """Perplexity exp(mean nll) with its standard error, and top-1 accuracy.

    The standard error is over windows, not over tokens as llama.cpp has it: tokens of a window share their text.
    It is that of a ratio of sums (Cochran 1977, 6.5), carried over to the perplexity by the delta method.
    """
    sums, counts = _sums(found["nll"], window), _sums(torch.ones_like(found["nll"]), window)
    mean, error = (sums.sum() / counts.sum()).item(), None
    if (windows := len(counts)) > 1:
        error = math.sqrt(windows / (windows - 1) * (sums - mean * counts).square().sum()) / counts.sum().item()
    return {"perplexity": math.exp(mean), "perplexity_se": None if error is None else math.exp(mean) * error,
            "accuracy": (found["top"] == targets).double().mean().item()}


def paired(found: dict[str, torch.Tensor], targets: torch.Tensor, window: torch.Tensor) -> dict:
    """KL, change of the true token's probability, agreement and kept accuracy, against the reference.

    As llama.cpp's "Mean KLD", "99% KLD", "Mean Δp", its percentiles, "RMS Δp" and "Same top p".
    """
    change = (-found["nll"]).exp() - (-found["base_nll"]).exp()
    same, ones = (found["top"] == found["base_top"]).double(), torch.ones_like(change)
    right, base_right = ((found[name] == targets).double() for name in ("top", "base_top"))
    kept = (right.sum() / base_right.sum()).item() if base_right.any() else None
    return {
        "kl_mean": found["kl"].mean().item(), "kl_ci": interval(found["kl"], ones, window),
        "kl_p99": found["kl"].quantile(0.99).item(),
        "dp_mean": change.mean().item(), "dp_rms": change.square().mean().sqrt().item(),
        "dp_percentiles": {str(p): change.quantile(p / 100).item() for p in PERCENTILES},
        "top1_agreement": same.mean().item(), "top1_ci": interval(same, ones, window),
        "accuracy_kept": kept, "accuracy_kept_ci": interval(right, base_right, window),
        **{name: None if kept is None else kept >= target for name, target in TARGETS.items()},
    }


def interval(top: torch.Tensor, bottom: torch.Tensor, window: torch.Tensor) -> list[float] | None:
    """95% percentile-bootstrap interval of sum(top) / sum(bottom) (Efron & Tibshirani 1993, ch. 13); seeded.

    Whole windows are drawn: tokens of one share their text, and drawing tokens would make the interval too narrow.
    None below two windows, or where `bottom` can be nothing.
    """
    tops, bottoms = _sums(top, window), _sums(bottom, window)
    if len(tops) < 2 or not (bottoms > 0).all():
        return None
    draws = torch.randint(len(tops), (RESAMPLES, len(tops)), generator=torch.Generator().manual_seed(SEED))
    ratios = tops[draws].sum(1) / bottoms[draws].sum(1)
    return [ratios.quantile(share).item() for share in (0.025, 0.975)]


def _sums(values: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """The sum over each window [windows]."""
    return torch.zeros(int(window[-1]) + 1, dtype=torch.float64).index_add_(0, window, values)
