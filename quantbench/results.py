"""A run: what was measured, in memory or as lines of JSON in a file that several processes may write to."""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

import quantbench
from quantbench.records import FIGURES, SCHEMA, Measurement, Subject, records_in
from quantbench.settings import expect, unknown
from quantbench.wording import as_html, plain

KINDS = ("measurement", "quality", "limits")  # a line's kind: the name of its public class in small letters
_adapter = functools.cache(TypeAdapter)


class NewerSchema(ValueError):
    """A results file that a later quantbench wrote."""


def _place(record: object) -> tuple[str, tuple]:
    return type(record).__name__.lower(), record.key


def to_line(record: object) -> bytes:
    """One line of JSON, its newline included."""
    return b'{"kind":"%s",' % _place(record)[0].encode() + _adapter(type(record)).dump_json(record)[1:] + b"\n"


def from_line(line: bytes | str) -> list:
    """The records of one line: one, or what a row of schema 1 held in one. Raises ValueError for anything else."""
    try:
        data = json.loads(line)
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
        kind, schema = data.pop("kind", KINDS[0]), data.get("schema", SCHEMA)
        if kind not in KINDS:
            raise ValueError(f"unknown kind {str(kind)[:40]!r}")
        if isinstance(schema, int) and schema > SCHEMA:
            raise NewerSchema(f"schema {schema}, but this quantbench reads up to {SCHEMA}: upgrade quantbench")
        return [_adapter(getattr(quantbench, name.capitalize())).validate_json(json.dumps(fields))
                for name, fields in (_of_schema_1(data) if schema == 1 else [(kind, data)])]
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValidationError as error:
        told = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3]]
        raise ValueError("; ".join(told)) from None


def _of_schema_1(row: dict) -> Iterator[tuple[str, dict]]:
    """Schema 1 kept quality and limits inside the row, and a trace that spread the prefill over the steps: not read."""
    inside = {name: row.pop(name, None) for name in ("quality", "limits", "trace")}
    yield "measurement", row | {"schema": SCHEMA}
    whose = {name: row[name] for name in ("machine", "versions") if name in row}
    subject = {name: row.get(name) for name in ("model", "setting", "revision", "weights", "created_at")}
    for kind, shared in (("quality", subject | whose), ("limits", whose)):
        held = inside[kind]
        if isinstance(held, dict):  # without what is derived by now, and what is no longer kept
            gone = ("keeps_", "dp_", "eval_", "top1_ci", "peak_bytes")
            held = {name: value for name, value in held.items() if not name.startswith(gone)} | shared
        if held is not None:
            yield kind, held


class Run:
    """A collection of measurements: add one, and it replaces the one with the same `key`. Qualities and limits stand
    beside them; iteration gives measurements. `Run()` lives in memory, `Run.open(path)` in a file as well."""

    def __init__(self, records: Iterable = ()) -> None:
        self.path: Path | None = None
        self._records = {_place(record): record for record in records_in(records)}

    @classmethod
    def of(cls, run: Run | Iterable) -> Run:
        """`run` itself, or a run of these records."""
        return run if isinstance(run, Run) else cls(run)

    @classmethod
    def given(cls, run: Run | None) -> Run:
        """`run`, to be added to, or a new one. Raises ValueError for anything else."""
        return cls() if run is None else expect(run, Run, "run must be a qb.Run, such as qb.Run.open(path)")

    @classmethod
    def read(cls, path: str | os.PathLike) -> Run:
        """The records of a results file. Lines that cannot be read are warned of and left where they are."""
        path, records = Path(path).expanduser(), []
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is no regular file: results are read from and appended to one")
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            try:
                records += from_line(line) if line.strip() else []
            except NewerSchema as error:
                raise NewerSchema(f"{path}, line {number}: {error}") from None
            except ValueError as error:
                warnings.warn(f"{path}, line {number} cannot be read ({plain(error)[:300]}); it stays in the file, "
                              "not in the run", stacklevel=2)
        return cls(records)

    @classmethod
    def open(cls, path: str | os.PathLike) -> Run:
        """Read `path` if it exists, and append each record that comes, fsynced, under a lock that other processes
        respect. Raises OSError at once if it can't be written."""
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        run = cls.read(path) if path.exists() else cls()
        with locked(path):
            path.open("ab").close()
        run.path = path
        return run

    def add(self, record: object) -> object:
        """Put `record` in, in place of the one with its key; write it through; return it."""
        expect(record, Subject, "a run takes what qb.generate, qb.quality or qb.limits returns")
        if self._records.get(_place(record)) == record:
            return record
        if self.path is not None:
            with locked(self.path):
                lost = not self.path.exists() or not self.path.stat().st_size  # removed or emptied: written again
                _append(self.path, self._lines() * lost + to_line(record))
        self._records[_place(record)] = record
        return record

    def replace(self, measurements: Iterable[Measurement]) -> Run:
        """For a notebook cell that is run again: add `measurements` as they come, each on the disk at once, then drop
        the other rows of their models, settings and engines that no sweep took in rounds. Return the new ones."""
        new = Run(self.add(row) for row in measurements)
        cells, keys = {row.cell for row in new}, {row.key for row in new}
        old = {_place(row) for row in self if row.cell in cells and row.key not in keys and not row.rounds}
        if old and self.path is not None:
            with locked(self.path):
                lines = self.path.read_bytes().split(b"\n")
                write_whole(self.path, b"".join(_without(old, line) for line in lines if line.strip()))
        for place in old:
            del self._records[place]
        return new

    def only(self, **fields: object) -> Run:
        """Its measurements with these attributes, `run.only(model="gpt2", engine="eager")`, and what else does not
        differ in one of them. Raises ValueError for what no measurement has, naming the nearest."""
        known = {*Measurement.__dataclass_fields__, *FIGURES, "machine_name", "setting_label"}
        if strange := fields.keys() - known:
            raise ValueError(unknown("field", min(strange), sorted(known)))
        return Run(one for one in self._records.values()
                   if all(getattr(one, name, value) == value for name, value in fields.items()))

    def save(self, path: str | os.PathLike) -> Path:
        """Write all records to `path` as JSON lines, whole or not at all; return it."""
        path = Path(path).expanduser()
        if self.path is None or not path.exists() or path.resolve() != self.path.resolve():  # else all is there
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path):
                write_whole(path, self._lines())
        return path

    qualities = property(lambda run: run._of("quality"), doc="From `qb.quality`: one per model, setting and text.")
    limits = property(lambda run: run._of("limits"), doc="From `qb.limits`: one per device and machine.")

    def _of(self, kind: str) -> list:
        return [record for (found, _), record in self._records.items() if found == kind]

    def _lines(self) -> bytes:
        return b"".join(map(to_line, self._records.values()))

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self._of("measurement"))

    def __len__(self) -> int:
        return len(self._of("measurement"))

    def __getitem__(self, index: int) -> Measurement:
        return self._of("measurement")[index]

    def __repr__(self) -> str:
        return f"Run of {len(self)} measurements" + "".join(f"\n  {row!r}" for row in self)

    def _repr_html_(self) -> str:
        return as_html([row.summary() for row in self])


def _without(places: set[tuple], line: bytes) -> bytes:
    """The line as it is, unreadable ones too; where one of its records goes, what else schema 1 held in it."""
    try:
        records = from_line(line)
    except ValueError:
        return line + b"\n"
    kept = [record for record in records if _place(record) not in places]
    return line + b"\n" if kept == records else b"".join(map(to_line, kept))


def locked(path: Path) -> FileLock:
    """While its block runs, no other process of ours writes to `path`: a lock in a file beside it, which stays."""
    path = path.resolve()  # a link and its target are one file
    return FileLock(path.with_name(f".{path.name}.lock"), timeout=60, mode=0o666)


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` in the place of `path` at once, or leave everything as it is; links and modes stay."""
    path = path.resolve()
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with aside.open("xb") as file:  # a name that nobody else has: no link is followed
            if path.exists():
                shutil.copymode(path, aside)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _append(path: Path, lines: bytes) -> None:
    """Whole lines, on the disk when this returns; where it fails (a full disk), none of them stays."""
    with path.open("ab+", buffering=0) as file:
        start = file.tell()
        file.seek(max(start - 1, 0))
        cut = file.read(1) not in (b"", b"\n")  # by a writer that was killed: it must not swallow the next line
        rest = memoryview(b"\n" * cut + lines)
        try:
            while rest:
                rest = rest[file.write(rest):]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(start)
            raise
