"""The memory ledger: where a measurement's bytes are."""

from collections.abc import Iterable

import pandas as pd

from quantbench.labels import cells, machine_of
from quantbench.records import Measurement
from quantbench.tables import view

PARTS = ("Quantised layers", "Embeddings and head", "Other weights", "KV cache", "Working memory")  # of a row's peak
TOTALS = {"Weights": "weights_bytes", "Held before load": "held_before_bytes", "Load peak": "load_peak_bytes",
          "Generate peak": "vram_peak_bytes", "Reserved": "vram_reserved_bytes", "Device-wide": "vram_device_bytes",
          "RAM peak": "ram_peak_bytes"}  # -> field of a measurement
NUMBERS = dict.fromkeys((*PARTS, *TOTALS), 1)  # column -> decimals


def memory_table(run: Iterable[Measurement]) -> pd.DataFrame:
    """Every measured row's memory in MB (1e6 bytes), the parts of its peak first; NaN where a figure does not apply.
    "Working memory" is what the parts leave of the peak: activations, logits, workspaces, and on a CPU the libraries
    that the first generation loads. The peak is VRAM on a GPU, resident memory above the level before load on a CPU.
    Raises ValueError for a run of several machines."""
    named, rows = cells(run), []
    for cell in (cell for cell in named if cell.measured):
        row, audit = cell.row, cell.row.audit or {}
        tokens = row.batch_size * (row.depth + (row.prompt_tokens or 0) + row.new_tokens)
        cache = row.cache_bytes or tokens * audit.get("kv_bytes_per_token", 0)
        rows.append({"Model": cell.title, "Setting": cell.setting, "Workload": cell.workload, "KV cache": cache,
                     "Quantised layers": audit.get("quantised_bytes", 0),
                     "Embeddings and head": audit.get("embedding_bytes", 0),
                     **{column: getattr(row, name) for column, name in TOTALS.items()}})
    frame = pd.DataFrame(rows, columns=["Model", "Setting", "Workload", *NUMBERS]).set_index("Model")
    frame[list(NUMBERS)] = frame[list(NUMBERS)].astype(float) / 1e6
    frame["Other weights"] = frame["Weights"] - frame["Quantised layers"] - frame["Embeddings and head"]
    peak = frame["Generate peak"].fillna(frame["RAM peak"])
    frame["Working memory"] = (peak - frame["Weights"] - frame["KV cache"]).clip(lower=0)
    return view(frame, ["MB", machine_of(cell.row for cell in named)], NUMBERS)
