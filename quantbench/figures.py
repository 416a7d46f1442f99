"""Derived figures by name, each with the one label that it has wherever it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Figure:
    """How a derived figure is named wherever it is shown."""

    name: str
    label: str


FIGURES: dict[str, Figure] = {}


def figure(label: str) -> Callable[[Callable], cached_property]:
    """Make a method of `Measurement` a derived figure: computed on read, never stored, one label everywhere."""

    def register(method: Callable) -> cached_property:
        FIGURES[method.__name__] = Figure(method.__name__, label)
        return cached_property(method)

    return register
