"""A/A: how often are identical settings called different on this machine? They should be in at most 5 of 100.

Each run is one sweep in rounds over COPIES of the same setting, each in a process of its own: every pair of them is a
comparison within the run. Between runs, every copy's ratio to the run's first copy (its eager one, where ENGINE is
"eager,graph") is held against the same in each other run, by `qb.changes`. Rows are written to FILE, a run each, so
that the evidence stays. With SLOWER, such as 0.05, every second copy is slowed by that share of a step: how many pairs
with one of either kind are named, the right way round?

usage: python benchmarks/a_a.py [--model gpt2] [--setting cpu-fp32] [--engine eager] [--tokens 32] [--runs 10]
                                [--copies 4] [--repeats ROUNDS] [--slower SHARE] [--file FOLDER]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from pathlib import Path

from slowed import Slowed

import quantbench as qb
from quantbench.comparison.history import moves
from quantbench.comparison.machines import gathered
from quantbench.intervals import ratio_of_rounds


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("model", "gpt2"), ("setting", "cpu-fp32"), ("engine", "eager"), ("tokens", 32), ("runs", 10),
                          ("copies", 4), ("repeats", 0), ("slower", 0.0), ("file", "results/local/a_a")):
        parser.add_argument(f"--{name}", default=default, type=type(default))
    asked = parser.parse_args()
    engines = asked.engine.split(",")
    keys = copies(asked.setting, asked.copies, slowing_s(asked) if asked.slower else 0.0)
    start, runs = time.monotonic(), []
    for number in range(asked.runs):
        path = Path(asked.file) / f"{asked.setting}-{'-'.join(engines)}-{number}.jsonl"
        path.unlink(missing_ok=True)
        run = qb.Run.open(path)
        list(qb.sweep(asked.model, keys, asked.tokens, engine=engines, repeats=asked.repeats or None, run=run,
                      weights=weights_of(asked.model), progress=False))
        runs.append(run)
    last = [row for run in runs for row in run if row.engine == engines[-1] and row.status == "ok"]
    pairs = [(one, other) for one, other in itertools.combinations(last, 2) if set(one.rounds) & set(other.rounds)]
    if asked.slower:
        slow = set(keys[1::2])
        pairs = [sorted(pair, key=lambda row: row.setting in slow) for pair in pairs
                 if len({row.setting in slow for row in pair}) == 2]
    within = [ratio_of_rounds(one.rate_by_round(), other.rate_by_round()) for one, other in pairs]
    named = [ratio for ratio in within if ratio.verdict == "faster" or ratio.verdict == "slower" and not asked.slower]
    values = sorted(ratio.value for ratio in within)
    facts = qb.facts()
    print(f"{facts.get('gpu') or facts['cpu']}: {asked.model} {asked.setting} {asked.engine} against itself"
          f"{f' slowed by {asked.slower:.0%}' if asked.slower else ''}, "
          f"{asked.tokens} tokens, {asked.runs} runs of {asked.copies} processes and "
          f"{min(ratio.rounds for ratio in within)} to {max(ratio.rounds for ratio in within)} rounds: {len(named)} of "
          f"{len(within)} comparisons named ({len(named) / len(within):.0%}), medians {values[0]:.3f} to "
          f"{values[-1]:.3f}"
          + ("" if asked.slower else f"; between runs {between(runs)}")
          + f"; {time.monotonic() - start:.0f} s")


def weights_of(model: str) -> str | None:
    return "random" if model in qb.MODELS and qb.MODELS[model].config else None


def copies(setting: str, number: int, wait_s: float) -> list[str]:
    """Keys of settings that differ from `setting` in nothing but their names; every second one waits in each step."""
    row = qb.SETTINGS[setting]
    keys = [setting, *(f"{setting}-copy-{place}" for place in range(2, number + 1))]
    for place, key in enumerate(keys[1:], start=1):
        fields = dataclasses.asdict(row) | {"key": key, "label": f"{row.label} copy {place + 1}"}
        qb.SETTINGS[key] = Slowed(**fields, wait_s=wait_s * (place % 2))
    return keys


def slowing_s(asked: argparse.Namespace) -> float:
    """The asked share of a step of the engine that is judged, measured first."""
    rows = qb.sweep(asked.model, asked.setting, asked.tokens, engine=asked.engine.split(",")[-1], repeats=6,
                    weights=weights_of(asked.model), progress=False)
    return asked.slower * next(rows).step_ms / 1000


def between(runs: list[qb.Run]) -> str:
    """How many cells are named over all pairs of runs, of those that can be compared: by each run's ratios to its eager
    baseline, so runs of a captured engine alone give none."""
    verdicts = []
    for pair in itertools.combinations(runs, 2):
        before, after = (side for _, side in gathered(pair, per_source=True).groupby("side"))
        verdicts += [verdict for verdict in moves(before, after)["verdict"] if verdict != "not compared"]
    return f"{sum(one in ('faster', 'slower') for one in verdicts)} of {len(verdicts)} compared cells named"


if __name__ == "__main__":
    main()
