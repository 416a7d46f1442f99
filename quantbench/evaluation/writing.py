"""What each setting wrote after the same prompt, divided where it parts from the reference's text."""

import os.path
import re
from collections.abc import Iterable

import pandas as pd

from quantbench.labels import cells
from quantbench.results import Run
from quantbench.tables import Table, Tables


def continuations(run: Iterable) -> Tables:
    """The greedy texts of a run, a table per model and prompt, each setting's longest: what it has in common with the
    first one's, the first word that differs, and what follows. The first is the qualities' reference where it wrote."""
    run, groups = Run.of(run), {}
    references = {(one.model, one.reference) for one in run.qualities}
    for cell in cells(run):
        if cell.row.text is not None and cell.row.status == "ok":
            groups.setdefault((cell.model, cell.row.prompt), {})[cell.setting] = cell  # cells come by length
    tables = []
    for (model, prompt), found in groups.items():
        texts = sorted(found.values(), key=lambda cell: (cell.row.model, cell.row.setting) not in references)
        parts = [(cell.setting, *divided(cell.row.text, texts[0].row.text)) for cell in texts]
        frame = pd.DataFrame(parts, columns=["Setting", f"As {texts[0].setting} wrote", "First difference", "And on"])
        tables.append(Table(frame, [model, f"{prompt} …"]))
    return Tables(tables, empty="no texts: random weights write noise")


def divided(text: str, first: str) -> tuple[str, str, str]:
    """`text` as what it shares with `first`, the first whole word that differs, and the rest."""
    common = os.path.commonprefix([text, first])
    if len(common) == min(len(text), len(first)):  # one goes on where the other was cut: no difference
        return text, "", ""
    start = max(common.rfind(" "), common.rfind("\n")) + 1
    end = start + len(re.match(r"\s*\S*", text[start:])[0])
    return text[:start], text[start:end], text[end:]
