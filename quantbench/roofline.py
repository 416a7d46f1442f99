"""The least time that a decode step can take: its bytes at the memory's rate, its products at the matrix rate.

The roofline of Williams, Waterman and Patterson (2009), over rates that `limits` measured on the same machine.
"""

from __future__ import annotations

from quantbench.plain import is_a


def step_bytes(audit: dict | None, sequences: int, tokens: float) -> float | None:
    """Bytes that one decode step must read: the weights once for the whole batch, and of every sequence the KV cache
    of `tokens` tokens. None where the audit does not tell."""
    weights, cache = _numbers(audit, "step_bytes", "kv_bytes_per_token")
    return None if weights is None or cache is None else weights + sequences * tokens * cache


def step_flops(audit: dict | None, sequences: int) -> float | None:
    """Floating-point (or integer) operations of one decode step's products with weights: 2 for each and sequence."""
    each, = _numbers(audit, "step_products")
    return None if each is None else 2 * each * sequences


def read_s(count: float | None, limits: dict | None) -> float | None:
    """Seconds to read `count` bytes at the measured rate."""
    rate, = _numbers(limits, "read_bytes_per_s")
    return count / rate if rate and count is not None else None


def compute_s(count: float | None, dtype: str | None, limits: dict | None) -> float | None:
    """Seconds for `count` operations at the matrix rate measured for `dtype`."""
    rates = (limits or {}).get("matrix_flops_per_s")
    rate, = _numbers(rates if isinstance(rates, dict) else None, str(dtype))
    return count / rate if rate and count is not None else None


def _numbers(facts: dict | None, *names: str) -> list[float | None]:
    found = [(facts or {}).get(name) for name in names]
    return [value if is_a(value, float) and value >= 0 else None for value in found]
