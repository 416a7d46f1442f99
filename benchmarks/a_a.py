"""A/A: how often are identical settings called different on this machine? They should be in at most 5 of 100.

Each run is one sweep in rounds over COPIES of the same setting, each in a process of its own: every pair of them is a
comparison within the run. Between runs, every copy's ratio to the run's first copy is held against the same in each
other run, by `qb.changes`. Rows are written to FILE, a run each, so that the evidence stays.

usage: python benchmarks/a_a.py [--model gpt2] [--setting cpu-fp32] [--engine eager] [--tokens 32] [--runs 10]
                                [--copies 4] [--repeats ROUNDS] [--file FOLDER]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from pathlib import Path

import quantbench as qb
from quantbench.intervals import ratio_of_rounds


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("model", "gpt2"), ("setting", "cpu-fp32"), ("engine", "eager"), ("tokens", 32), ("runs", 10),
                          ("copies", 4), ("repeats", 0), ("file", "results/local/a_a")):
        parser.add_argument(f"--{name}", default=default, type=type(default))
    asked = parser.parse_args()
    keys = copies(asked.setting, asked.copies)
    start, runs = time.monotonic(), []
    for number in range(asked.runs):
        path = Path(asked.file) / f"{asked.setting}-{asked.engine}-{number}.jsonl"
        path.unlink(missing_ok=True)
        run = qb.Run.open(path)
        list(qb.sweep(asked.model, keys, asked.tokens, engine=asked.engine, repeats=asked.repeats or None, run=run,
                      weights="random" if asked.model in qb.MODELS and qb.MODELS[asked.model].config else None,
                      progress=False))
        runs.append(run)
    within = [ratio_of_rounds(one.by_round, other.by_round) for run in runs
              for one, other in itertools.combinations(run, 2)]
    named = [ratio for ratio in within if ratio.verdict in ("faster", "slower")]
    values = sorted(ratio.value for ratio in within)
    facts = qb.facts()
    print(f"{facts.get('gpu') or facts['cpu']}: {asked.model} {asked.setting} {asked.engine} against itself, "
          f"{asked.tokens} tokens, {asked.runs} runs of {asked.copies} processes and "
          f"{min(ratio.rounds for ratio in within)} to {max(ratio.rounds for ratio in within)} rounds: {len(named)} of "
          f"{len(within)} comparisons named ({len(named) / len(within):.0%}), medians {values[0]:.3f} to "
          f"{values[-1]:.3f}; between runs {between(runs, asked.setting)}; {time.monotonic() - start:.0f} s")


def copies(setting: str, number: int) -> list[str]:
    """Keys of settings that differ from `setting` in nothing but their names."""
    row = qb.SETTINGS[setting]
    keys = [setting, *(f"{setting}-copy-{place}" for place in range(2, number + 1))]
    qb.SETTINGS.update({key: dataclasses.replace(row, key=key, label=f"{row.label} copy {key[-1]}") for key in keys[1:]})
    return keys


def between(runs: list[qb.Run], setting: str) -> str:
    """How many cells `qb.changes` names over all pairs of runs, of those that it can compare: it takes each run's
    ratios to its eager baseline, so runs of a captured engine alone give none."""
    judged = [(qb.ratios(run, baseline=setting)["Verdict"] != "not compared").sum() for run in runs]
    pairs = list(itertools.combinations(range(len(runs)), 2))
    named = sum("% against " in sentence for before, after in pairs
                for sentence in qb.changes(runs[before], runs[after]))
    return f"{named} of {sum(min(judged[before], judged[after]) for before, after in pairs)} compared cells named"


if __name__ == "__main__":
    main()
