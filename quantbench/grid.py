"""Text in rows and columns, escaped, as HTML for a notebook, Markdown for the README and plain text for a terminal."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

EMPTY = "–"
# As entities these characters mean nothing to Markdown, to GitHub's tables or to a notebook's MathJax.
_MARKUP = {ord(char): f"&#{ord(char)};" for char in "\\`*_[]|~$#"}
_TABLE = "border-collapse:collapse;table-layout:auto;margin:0 0 1.2em 0;max-width:100%;font-size:12px;line-height:1.35"
_CAPTION = "caption-side:top;text-align:left;padding:4px 8px 4px 0;font-size:13px;white-space:normal"
_CELL = "padding:4px 8px;border-bottom:1px solid rgba(128,128,128,.3);vertical-align:top;"
_NUMBER = _CELL + "text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums"
_TEXT = _CELL + "text-align:left;white-space:normal;overflow-wrap:anywhere;max-width:22em"
_WHOLE = 12  # letters: a text or a word up to this long stays on one line
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")  # where DynamicQuantizedLinear may be broken


@dataclass(frozen=True)
class Grid:
    """One table of text. The first part of the caption is bold; columns named in `numbers` are set to the right,
    `faint` rows are greyed, and the note stands below."""

    caption: Sequence[str]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[str] = frozenset()
    faint: frozenset[int] = frozenset()
    note: str = ""

    def html(self) -> str:
        styles = [self._style(place) for place in range(len(self.header))]
        head = "".join(f'<th style="{style};white-space:normal">{html.escape(name)}</th>'
                       for name, style in zip(self.header, styles))
        title, *rest = map(html.escape, self.caption)
        caption = " · ".join([f"<b>{title}</b>", *rest])
        body = "".join(self._html_row(row, styles, place in self.faint) for place, row in enumerate(self.rows))
        note = f'<p style="font-size:12px;max-width:70em">{html.escape(self.note)}</p>' if self.note else ""
        return (f'<table style="{_TABLE}"><caption style="{_CAPTION}">{caption}</caption>'
                f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}")

    def _style(self, column: int) -> str:
        if self.header[column] in self.numbers:
            return _NUMBER
        texts = [row[column] for row in [self.header, *self.rows]]
        parts = [part for text in texts for part in ([text] if len(text) <= _WHOLE else _HUMP.sub(" ", text).split())]
        return f"{_TEXT};min-width:{min(max(map(len, parts)), _WHOLE)}ch"

    @staticmethod
    def _html_row(row: Sequence[str], styles: list[str], faint: bool) -> str:
        cells = "".join(f'<td style="{style}{";white-space:nowrap" * (len(text) <= _WHOLE)}">'
                        f'{_HUMP.sub("<wbr>", html.escape(text))}</td>' for text, style in zip(row, styles))
        return f'<tr style="opacity:.6">{cells}</tr>' if faint else f"<tr>{cells}</tr>"

    def markdown(self) -> str:
        """The same as a GitHub Markdown table."""
        title, *rest = map(markdown_text, self.caption)
        lines = [" · ".join([f"**{title}**", *rest]), "", _piped(self.header),
                 _piped(["---:" if name in self.numbers else "---" for name in self.header], escape=False)]
        lines += [_piped(row) for row in self.rows] + (["", markdown_text(self.note)] if self.note else [])
        return "\n".join(lines) + "\n"

    def text(self) -> str:
        widths = [max(len(row[column]) for row in [self.header, *self.rows]) for column in range(len(self.header))]
        lines = [" · ".join(self.caption)]
        for row in [self.header, ["-" * width for width in widths], *self.rows]:
            lines.append("  ".join(text.rjust(width) if name in self.numbers else text.ljust(width)
                                   for text, width, name in zip(row, widths, self.header)).rstrip())
        return "\n".join(lines + ([self.note] if self.note else [])) + "\n"


class Grids(list[Grid]):
    """Tables that a notebook shows one under the other. `empty` is what stands there when there are none."""

    def __init__(self, grids: Sequence[Grid], empty: str = "nothing measured yet") -> None:
        super().__init__(grids)
        self.empty = empty

    def _repr_html_(self) -> str:
        return "\n".join(grid.html() for grid in self) or f"<p>{html.escape(self.empty)}</p>"

    def markdown(self) -> str:
        return "\n".join(grid.markdown() for grid in self) or self.empty + "\n"

    def __repr__(self) -> str:
        return "\n".join(grid.text() for grid in self).rstrip("\n") or self.empty


def markdown_text(text: str) -> str:
    """Text that Markdown and HTML show as it is: no markup, no links, no formulas."""
    return html.escape(text, quote=False).translate(_MARKUP).replace("://", "&#58;//").replace("www.", "www&#46;")


def _piped(texts: Sequence[str], escape: bool = True) -> str:
    return "| " + " | ".join(markdown_text(text) if escape else text for text in texts) + " |"
