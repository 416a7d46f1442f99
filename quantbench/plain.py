"""Plain data: whether a JSON value has the shape that a field needs, and rows as an HTML table."""

from __future__ import annotations

import html
import types
import typing


def is_a(value: object, hint: object) -> bool:
    """Whether a JSON value fits a field's type: the few shapes that a measurement uses."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(is_a(value, option) for option in inner)
    if origin is list:
        return isinstance(value, list) and all(is_a(item, inner[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def refuse_constant(name: str) -> None:
    """For `json.loads`: NaN and infinity are not JSON."""
    raise ValueError(f"{name} is not a number")


def html_table(rows: list[dict[str, str]]) -> str:
    """Rows of label -> text as an HTML table, escaped; a column for every label that any row has."""
    labels = list(dict.fromkeys(label for row in rows for label in row))
    head = "".join(f"<th>{html.escape(label)}</th>" for label in labels)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(row.get(label, ''))}</td>" for label in labels) + "</tr>"
                   for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
