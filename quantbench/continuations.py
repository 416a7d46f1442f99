"""What each setting wrote after the same prompt, beside the reference's text, the first difference marked."""

from __future__ import annotations

import html
import os.path
import re
from collections.abc import Iterable
from dataclasses import dataclass

from quantbench.record import Measurement
from quantbench.view import Cell, cells, plain

_CELL = "padding:6px 8px;border-bottom:1px solid rgba(128,128,128,.3);vertical-align:top;text-align:left"
_MARK = "background:rgba(230,140,0,.4);color:inherit;border-radius:2px"  # seen on white and on black
_TABLE = "border-collapse:collapse;max-width:100%;font-size:12px;margin:0 0 1.2em 0"


@dataclass(frozen=True)
class Continuation:
    """One text: what it has in common with the first, the first word that differs, and what follows."""

    setting: str
    same: str
    differs: str
    rest: str

    @property
    def verdict(self) -> str:
        if not self.differs:
            return "the same to the end"
        words = len(re.findall(r"\w+", self.same))
        return f"the same for {words} word{'' if words == 1 else 's'}"


_NONE = "no texts: random weights write noise"


class Continuations(list[tuple[str, list[Continuation]]]):
    """Per model and prompt the texts, the first one being what the others are held against."""

    def _repr_html_(self) -> str:
        return "\n".join(self._table(title, texts) for title, texts in self) or f"<p>{_NONE}</p>"

    def __repr__(self) -> str:
        lines = []
        for title, texts in self:
            lines += [title] + [f"  {text.setting}{self._note(place, text)}: {text.same}"
                                + (f"[{text.differs}]" if text.differs else "") + text.rest
                                for place, text in enumerate(texts)]
        return "\n".join(lines) or _NONE

    @staticmethod
    def _note(place: int, text: Continuation) -> str:
        return f" ({text.verdict})" if place else ""

    @staticmethod
    def _table(title: str, texts: list[Continuation]) -> str:
        rows = ""
        for place, text in enumerate(texts):
            mark = f'<mark style="{_MARK}">{html.escape(text.differs)}</mark>' if text.differs else ""
            note = f'<br><span style="opacity:.7">{html.escape(text.verdict)}</span>' if place else ""
            rows += (f'<tr><td style="{_CELL};min-width:9em"><b>{html.escape(text.setting)}</b>{note}</td>'
                     f'<td style="{_CELL};white-space:pre-wrap;overflow-wrap:anywhere">{html.escape(text.same)}{mark}'
                     f"{html.escape(text.rest)}</td></tr>")
        return (f'<table style="{_TABLE}"><caption style="caption-side:top;text-align:left;padding:4px 0">'
                f"<b>{html.escape(title)}</b></caption><tbody>{rows}</tbody></table>")


def continuations(run: Iterable[Measurement]) -> Continuations:
    """The greedy texts of a run side by side, per model and prompt, each setting's longest.

    They are held against the quality's reference where that is among them, else against the first.
    """
    groups: dict[tuple, dict[str, Cell]] = {}
    for cell in cells(run):
        if cell.row.text is not None and cell.row.status == "ok":
            groups.setdefault((cell.model, cell.row.prompt), {})[cell.setting] = cell  # cells come by length
    return Continuations([(f"{model} · {plain(prompt)} …", _held_against_first(list(texts.values())))
                          for (model, prompt), texts in groups.items()])


def _held_against_first(texts: list[Cell]) -> list[Continuation]:
    reference = next(((cell.row.quality or {}).get("reference") for cell in texts if cell.row.quality), None)
    texts = sorted(texts, key=lambda cell: cell.row.setting != reference)
    first = texts[0].row.text
    return [_divided(cell.setting, cell.row.text, first) for cell in texts]


def _divided(setting: str, text: str, first: str) -> Continuation:
    common = os.path.commonprefix([text, first])
    if len(common) == len(text) or len(common) == len(first):  # one goes on where the other was cut: no difference
        return Continuation(setting, text, "", "")
    start = max(common.rfind(" "), common.rfind("\n")) + 1  # the whole word
    end = start + len((text[start:].split() or [""])[0]) + len(text[start:]) - len(text[start:].lstrip())
    return Continuation(setting, text[:start], text[start:end], text[end:])
