"""From values per token to a setting's figures, each with what is known of its uncertainty.

Intervals are over windows, not over tokens as llama.cpp has them: tokens of a window share their text.
"""

import math

import torch
from scipy.stats import t

from quantbench.evaluation.logits import Values
from quantbench.evaluation.windows import Plan
from quantbench.intervals import LEAST, Interval

MOST_WINDOWS = 10_000  # whose KL a record keeps, one by one
_MOST = 60.0  # nats per token: the perplexity of a model that is broken stays a number


def figures(found: Values, plan: Plan) -> dict:
    """Perplexity exp(mean nll), its standard error by the delta method, and top-1 accuracy; with a reference's values
    beside the model's, also llama.cpp's "Mean KLD", "99% KLD", "Mean Δp", its percentiles, "RMS Δp" and "Same top p",
    and the share of the reference's accuracy that is kept."""
    targets, window = plan.ids[1:], plan.window_of_token()
    mean, error = _ratio(found["nll"], ones := torch.ones_like(found["nll"]), window)
    perplexity, right = math.exp(min(mean, _MOST)), (found["top"] == targets).double()
    alone = {"perplexity": perplexity, "perplexity_se": None if error is None else perplexity * error,
             "accuracy": right.mean().item()}
    if "kl" not in found:
        return alone
    change = (-found["nll"]).exp() - (-found["base_nll"]).exp()
    same, base_right = (found["top"] == found["base_top"]).double(), (found["base_top"] == targets).double()
    return alone | {
        "kl_mean": found["kl"].mean().item(), "kl_ci": interval(found["kl"], ones, window),
        "kl_p99": found["kl"].quantile(0.99).item(),
        "kl_windows": (_sums(found["kl"], window) / _sums(ones, window))[:MOST_WINDOWS].tolist(),
        "dp_mean": change.mean().item(), "dp_rms": change.square().mean().sqrt().item(),
        "dp_percentiles": {str(p): change.quantile(p / 100).item() for p in (1, 5, 50, 95, 99)},
        "top1_agreement": same.mean().item(), "top1_ci": interval(same, ones, window, most=1.0),
        "accuracy_kept": (right.sum() / base_right.sum()).item() if base_right.any() else None,
        "accuracy_kept_ci": interval(right, base_right, window),
    }


def interval(top: torch.Tensor, bottom: torch.Tensor, window: torch.Tensor, most: float = math.inf) -> Interval | None:
    """95% interval of sum(top) / sum(bottom), within 0 and `most`: Student's t over the windows.

    Of 6 windows of simulated text it covers 92 to 95 times in 100, where a bootstrap over them, percentile or BCa,
    covers 84 to 86 times. None below 6 windows, or where `bottom` is nothing.
    """
    value, error = _ratio(top, bottom, window)
    if error is None:
        return None
    half = t.ppf(0.975, int(window[-1])) * error
    return max(value - half, 0.0), max(min(value + half, most), 0.0)


def _ratio(top: torch.Tensor, bottom: torch.Tensor, window: torch.Tensor) -> tuple[float, float | None]:
    """sum(top) / sum(bottom), and the standard error of a ratio of sums over windows (Cochran 1977, 6.5)."""
    tops, bottoms = _sums(top, window), _sums(bottom, window)
    if not bottoms.sum() > 0:
        return math.nan, None
    value, windows = (tops.sum() / bottoms.sum()).item(), len(tops)
    if windows < LEAST:
        return value, None
    spread = windows / (windows - 1) * (tops - value * bottoms).square().sum()
    return value, spread.sqrt().item() / bottoms.sum().item()


def _sums(values: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """The sum over each window [windows]."""
    return torch.zeros(int(window[-1]) + 1, dtype=torch.float64).index_add_(0, window, values)
