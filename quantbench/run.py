"""A run: the measurements of many cells, in memory or as lines of JSON in a file."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from quantbench.plain import html_table
from quantbench.record import Measurement, NewerSchema
from quantbench.score import Quality


class Run:
    """A collection of measurements: add one, and it replaces the one with the same `key`.

    `Run()` lives in memory. `Run.open(path)` loads what is there and appends each row as it comes, flushed and
    fsynced. `Run.read(path)` only reads.
    """

    def __init__(self, measurements: Iterable[Measurement] = ()) -> None:
        self.path: Path | None = None
        self._rows: dict[tuple, Measurement] = {}
        for measurement in measurements:
            self._rows[measurement.key] = measurement

    @classmethod
    def read(cls, path: str | os.PathLike) -> Run:
        """The rows of a results file. Lines that cannot be read are warned of and left where they are."""
        run = cls()
        for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                measurement = Measurement.from_json(line)
            except NewerSchema as error:
                raise NewerSchema(f"{path}, line {number}: {error}") from None
            except (ValueError, RecursionError) as error:
                warnings.warn(f"{path}, line {number} cannot be read ({error}); it stays in the file, "
                              "not in the run", stacklevel=2)
            else:
                run._rows[measurement.key] = measurement
        return run

    @classmethod
    def open(cls, path: str | os.PathLike) -> Run:
        """Read `path` if it exists and append to it from now on. Raises OSError at once if it can't be written."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:  # a half-written last line must not swallow the next one
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
        run = cls.read(path)
        run.path = path
        return run

    def add(self, measurement: Measurement) -> Measurement:
        """Put `measurement` in, in place of the row with its key; write it through; return it.

        One without quality takes that of its model and setting, if the run has it.
        """
        measurement = self._with_quality(measurement)
        if self._rows.get(measurement.key) == measurement:
            return measurement
        if self.path is not None:
            _append(self.path, measurement.to_json())
        self._rows[measurement.key] = measurement
        return measurement

    def add_quality(self, quality: Quality) -> Quality:
        """Put `quality` into every row of its model, weights, setting, machine and versions; return it.

        Where the logits were not finite, these rows become `failed`, with the reason. Raises ValueError if there is
        no such row; a model that was not loaded has its reason in its rows already, and nothing is added.
        """
        mine = [row for row in self if row.subject == quality.subject]
        if quality.tokens is None:
            return quality
        if not mine:
            raise ValueError(f"no row here to add this to: generate with the same model and setting first. {quality!r}")
        for row in mine:
            self.add(_judged(row, quality.found()))
        return quality

    def _with_quality(self, row: Measurement) -> Measurement:
        known = next((old.quality for old in self._rows.values() if old.quality and old.subject == row.subject), None)
        return row if row.quality is not None or known is None else _judged(row, known)

    def replace(self, measurements: Iterable[Measurement]) -> Run:
        """Add `measurements` in place of every row of the same model, setting and engine; return them as a run.

        For a notebook cell that is re-run with other lengths: its old rows go, and only once it has new ones.
        """
        new = Run(map(self._with_quality, measurements))
        cells = {_cell(row) for row in new}
        kept = [row for row in self if _cell(row) not in cells]
        if self.path is not None and len(kept) < len(self):
            _rewrite(self.path, cells, new)
        elif self.path is not None:
            for row in new:
                _append(self.path, row.to_json())
        self._rows = {row.key: row for row in (*kept, *new)}
        return new

    def save(self, path: str | os.PathLike) -> Path:
        """Write all rows to `path` as JSON lines, whole or not at all; return it."""
        path = Path(path)
        if self.path is not None and path.resolve() == self.path.resolve():
            return path  # every row is there already, and so are the lines that could not be read
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, "".join(row.to_json() + "\n" for row in self).encode())
        return path

    def __iter__(self) -> Iterator[Measurement]:
        return iter(list(self._rows.values()))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Measurement:
        return list(self._rows.values())[index]

    def __repr__(self) -> str:
        return f"Run of {len(self)} measurements" + "".join(f"\n  {row!r}" for row in self)

    def _repr_html_(self) -> str:
        return html_table([row.summary() for row in self])


def _judged(row: Measurement, quality: dict) -> Measurement:
    """The row with this quality: `failed` where logits were not finite, ok again if they were so before only."""
    status, reason = row.status, row.reason
    if status == "failed" and (row.quality or {}).get("status") == "failed":
        status, reason = "ok", None
    if status == "ok" and quality.get("status") == "failed":
        status, reason = "failed", quality.get("reason")
    return dataclasses.replace(row, quality=quality, status=status, reason=reason)


def _cell(row: Measurement) -> tuple:
    return row.model, row.setting, row.engine, row.machine_name


def _append(path: Path, line: str) -> None:
    """One whole line, on the disk when this returns; where it fails (a full disk), no half line stays."""
    rest = memoryview(line.encode() + b"\n")
    with path.open("ab", buffering=0) as file:
        start = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest):]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(start)
            raise


def _rewrite(path: Path, without: set[tuple], new: Iterable[Measurement]) -> None:
    """The lines of the cells `without` out and `new` in, at once; every other line as it is, unreadable ones too."""

    def stays(line: bytes) -> bool:
        try:
            return _cell(Measurement.from_json(line)) not in without
        except (ValueError, RecursionError):
            return bool(line.strip())

    lines = [line for line in path.read_bytes().split(b"\n") if stays(line)]
    _write_whole(path, b"".join(line + b"\n" for line in lines + [row.to_json().encode() for row in new]))


def _write_whole(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".new")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
