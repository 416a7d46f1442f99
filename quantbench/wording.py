"""Text from models and files, made safe to show in a terminal, in HTML and in Markdown; small parts of sentences."""

import html
from collections.abc import Iterable, Sequence

EMPTY = "–"
# As entities these characters mean nothing to Markdown, to GitHub's tables or to a notebook's MathJax.
_MARKUP = {ord(char): f"&#{ord(char)};" for char in "\\`*_[]|~$#"}


def plain(text: object) -> str:
    """Text on one line, without characters that steer a terminal: no escapes, marks of direction, lone surrogates."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())


def cut(text: object, length: int) -> str:
    """`plain` text of at most `length` characters."""
    line = plain(text)
    return line if len(line) <= length else line[:length - 1].rstrip() + "…"


def html_text(text: object) -> str:
    """`plain` text that HTML and a notebook's MathJax show as it is."""
    return html.escape(plain(text)).replace("$", "&#36;")


def markdown_text(text: object) -> str:
    """`plain` text that Markdown and HTML show as it is: no markup, no links, no formulas."""
    safe = html.escape(plain(text), quote=False).translate(_MARKUP)
    return safe.replace("://", "&#58;//").replace("www.", "www&#46;")


def as_html(rows: Iterable[dict[str, str]]) -> str:
    """Rows of label -> text as an HTML table, a column for every label: where pandas is not wanted."""
    rows = list(rows)
    labels = dict.fromkeys(label for row in rows for label in row)
    head = "".join(f"<th>{html_text(label)}</th>" for label in labels)
    lines = ("".join(f"<td>{html_text(row.get(label, ''))}</td>" for label in labels) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def listed(texts: Sequence[str]) -> str:
    """ "A, B and C" """
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def rounded(count: float) -> int:
    """In two digits."""
    return int(float(f"{count:.2g}"))


def span(interval: Sequence[float], digits: str) -> str:
    """ "0.95–1.04", each end formatted with `digits`, such as ".2f"; "1.00" where both are the same then."""
    return "–".join(dict.fromkeys(f"{end:{digits}}" for end in (interval[0], interval[-1])))
