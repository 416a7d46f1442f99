"""The student's reference table (Colab T4), what can be inferred about it, and the reader's rows beside it."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from quantbench.labels import cells, machine_of
from quantbench.records import FIGURES, Measurement
from quantbench.results import Run
from quantbench.settings import MODELS, PROMPT, SETTINGS
from quantbench.tables import LENGTH, view

PROMPT_TOKENS = 12  # by inference: it leaves 64, 128 and 256 of what the table's latency x tokens/sec give
_RATE, _SECONDS, _VRAM = FIGURES["tokens_per_s"], FIGURES["latency_s"], FIGURES["vram_gb"]
_DECIMALS = {_SECONDS: 3, _RATE: 2, _VRAM: 2, f"{_RATE} (corrected)": 1, f"{_RATE} (here)": 1}
_NOTE = ("By inference: latency × tokens/sec is exactly 76 and 140 (DistilGPT-2) and 140 and 268 (GPT-2) in all "
         f"settings, so {PROMPT_TOKENS} prompt tokens were counted as generated, and some rows generated fewer than "
         "were asked for. VRAM grows where the weights shrink, so earlier models were still held.")
_PACKAGE = Path(__file__).parents[1]
_HOME = _PACKAGE / "data" if (_PACKAGE / "data" / "published").is_dir() else _PACKAGE.parent / "results"


def reference_table(run: Iterable[Measurement] = ()) -> pd.DataFrame:
    """The table's rows, corrected by inference (its note says what), and beside them `run`'s own of the same workload
    and prompt, eager and on one GPU at most. Raises ValueError for a run of several machines."""
    rows, data = [*Run.of(run)], pd.read_csv(_HOME / "reference" / "colab-t4.csv")
    here = f"here: {machine_of(rows)}" + " (random weights)" * any(cell.random for cell in cells(rows))
    rates = {(row.model, row.setting, row.max_new_tokens): row.tokens_per_s for row in rows if row.status == "ok"
             and (row.gpus, row.engine, *row.work[:-1]) == (1, "eager", PROMPT, "default", 0, 0, 1)}
    ours = [rates.get(asked) for asked in zip(data["model"], data["setting"], data["max_new_tokens"])]
    new = (data["latency_s"] * data["tokens_per_s"]).round().astype(int) - PROMPT_TOKENS
    frame = pd.DataFrame({
        "Model": [MODELS[key].label for key in data["model"]],
        "Setting": [SETTINGS[key].label for key in data["setting"]], LENGTH: data["max_new_tokens"],
        _SECONDS: data["latency_s"], _RATE: data["tokens_per_s"], _VRAM: data["vram_gb"], "New tokens (inferred)": new,
        f"{_RATE} (corrected)": new / data["latency_s"], f"{_RATE} (here)": ours}).set_index("Model")
    return view(frame.astype({f"{_RATE} (here)": float}), ["Colab T4, reference table",
                here if any(ours) else "nothing of it measured here yet"], _DECIMALS, _NOTE)


def shipped() -> list[Path]:
    """The files of published rows that come with quantbench: inside an installed package, or in the repository."""
    return sorted(_HOME.glob("published/*.jsonl"))
