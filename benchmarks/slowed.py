"""A setting slowed by a known share of each step, to see whether a real difference is found.

A module of its own: what measures unpickles the setting in another process, imports this file there, and so slows it.
"""

import time
from dataclasses import dataclass

import torch
from torch import nn

from quantbench.quantisers import QUANTISERS, Quantiser
from quantbench.settings import Setting


@dataclass(frozen=True)
class Slowed(Setting):
    """A row that waits `wait_s` seconds before every forward pass."""

    wait_s: float = 0.0


class Waiting(Quantiser):
    """Leaves the weights as they are."""

    def apply(self, model: nn.Module, setting: Setting) -> None:
        if wait_s := getattr(setting, "wait_s", 0.0):
            if setting.device == "cuda":
                wait = _on_gpu(wait_s)
                model.register_forward_pre_hook(lambda *_: wait())
            else:
                model.register_forward_pre_hook(lambda _, args, asked: (args, asked | {
                    "input_ids": wait_for(asked["input_ids"], wait_s)}), with_kwargs=True)


@torch.library.custom_op("quantbench::wait_for", mutates_args=())
def wait_for(ids: torch.Tensor, seconds: float) -> torch.Tensor:
    """The ids, later: an operator, so that a captured step holds it too."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass
    return ids.clone()


def _on_gpu(seconds: float):
    """A kernel that spins, so that a captured step holds it too; its cycles are calibrated here."""
    start, end, cycles = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), 50_000_000
    for _ in range(3):  # the first ones raise the clock
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
    needed = int(cycles * seconds / (start.elapsed_time(end) / 1000))
    return lambda: torch.cuda._sleep(needed)


QUANTISERS["none"] = Waiting()
