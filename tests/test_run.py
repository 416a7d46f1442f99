"""A run and its file: nothing measured is lost, whatever happens to the file."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbench.record import Measurement, NewerSchema
from quantbench.run import Run

A = Measurement(model="gpt2", setting="cpu-fp32", max_new_tokens=8, new_tokens=8, latencies_s=[1.0])
B = dataclasses.replace(A, max_new_tokens=16, new_tokens=16)
LINE = A.to_json().encode()
WRITER = """
import sys
from quantbench.record import Measurement
from quantbench.run import Run
run = Run.open(sys.argv[1])
for n in range(1, int(sys.argv[3]) + 1):
    run.add(Measurement(model=sys.argv[2], setting="cpu-fp32", max_new_tokens=n, text="x" * 20_000))
    print(n, flush=True)
"""


def writer(path: Path, model: str, rows: int) -> subprocess.Popen:
    """A process that adds `rows` rows to the run at `path`, and prints each one's number once it is added."""
    return subprocess.Popen([sys.executable, "-c", WRITER, path, model, str(rows)], stdout=subprocess.PIPE, text=True,
                            cwd=Path(__file__).parent.parent)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.jsonl"


def test_a_re_run_replaces_its_row(path):
    run = Run.open(path)
    run.add(A), run.add(B)
    again = dataclasses.replace(A, latencies_s=[2.0])
    run.add(again)
    assert list(run) == [again, B] or list(run) == [B, again]
    assert sorted(row.latency_s for row in Run.read(path)) == [1.0, 2.0]


def test_replacing_a_cells_rows_drops_the_lengths_it_no_longer_has(path):
    run = Run.open(path)
    other = dataclasses.replace(A, setting="cpu-int8")
    run.add(A), run.add(B), run.add(other)
    new = dataclasses.replace(A, max_new_tokens=64)
    assert list(run.replace([new])) == [new]
    assert {(r.setting, r.max_new_tokens) for r in Run.read(path)} == {("cpu-int8", 8), ("cpu-fp32", 64)}


def test_a_cell_that_fails_to_measure_keeps_its_old_rows(path):
    run = Run.open(path)
    run.add(A)

    def broken():
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        run.replace(broken())
    assert list(run) == [A] == list(Run.read(path))


def test_a_row_that_cannot_be_written_keeps_its_old_rows(path):
    run = Run.open(path)
    run.add(A)
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.replace([B, dataclasses.replace(B, max_new_tokens=32, energy_j=[math.nan])])
    assert list(run) == [A] == list(Run.read(path))


def test_replacing_nothing_adds(path):
    run = Run.open(path)
    assert list(run.replace([A, B])) == [A, B] == list(run) == list(Run.read(path))
    assert list(run.replace([])) == [] and len(run) == 2


def test_a_row_is_synced_whole_before_add_returns(path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), synced.append(path.read_bytes())))
    run = Run.open(path)
    for count, row in enumerate([A, B], start=1):
        run.add(row)
        assert len(synced) == count and synced[-1].endswith(row.to_json().encode() + b"\n")


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_a_writer_killed_at_any_time_loses_no_row_it_had_added(path, rows):
    with writer(path, "gpt2", 100_000) as process:
        while int(process.stdout.readline()) < rows:
            pass
        process.kill()
        added = max([rows, *map(int, process.stdout)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the row it was writing
        run = Run.open(path)
        assert {row.max_new_tokens for row in run} >= set(range(1, added + 1))
        other = run.add(dataclasses.replace(A, model="other"))
        assert other in list(Run.read(path))


def test_two_processes_can_add_to_one_file(path):
    writers = [writer(path, model, 30) for model in "ab"]
    for process in writers:
        process.communicate(timeout=60)
    assert [process.returncode for process in writers] == [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {row.key for row in Run.read(path)} == {
            Measurement(model=m, setting="cpu-fp32", max_new_tokens=n).key for m in "ab" for n in range(1, 31)}


@pytest.mark.parametrize("cut", range(len(LINE) + 1))
def test_a_last_line_cut_anywhere_is_set_aside_and_the_next_row_is_whole(path, cut):
    path.write_bytes(B.to_json().encode() + b"\n" + LINE[:cut])
    if 0 < cut < len(LINE):
        with pytest.warns(UserWarning, match="line 2 cannot be read"):
            run = Run.open(path)
        run.add(A)
        with pytest.warns(UserWarning):
            assert set(row.key for row in Run.read(path)) == {A.key, B.key}
        assert LINE[:cut] in path.read_bytes()
    else:
        run = Run.open(path)
        run.add(A)
        assert len(Run.read(path)) == 2


def test_garbage_lines_stay_in_the_file_and_duplicate_keys_count_once(path):
    later = dataclasses.replace(A, latencies_s=[3.0])
    path.write_bytes(b"\xff\xfe garbage\n" + LINE + b"\n[1, 2]\n" + later.to_json().encode() + b"\n")
    with pytest.warns(UserWarning):
        run = Run.open(path)
    assert list(run) == [later]
    run.replace([dataclasses.replace(A, max_new_tokens=9)])
    assert b"\xff\xfe garbage\n" in path.read_bytes() and b"[1, 2]\n" in path.read_bytes()


def test_a_newer_schema_is_refused_with_its_place(path):
    path.write_text(B.to_json() + "\n" + json.dumps(json.loads(A.to_json()) | {"schema": 99}) + "\n")
    with pytest.raises(NewerSchema, match=r"run\.jsonl, line 2: schema 99"):
        Run.open(path)


@given(st.binary(max_size=200))
def test_any_file_opens_or_says_why(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "run.jsonl"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Run.open(path)
        run.add(A)
        assert A in list(Run.read(path))


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Run.open(tmp_path / "file" / "run.jsonl")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(PermissionError):
            Run.open(tmp_path / "locked" / "run.jsonl")


def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run = Run.open(disk / "run.jsonl")
        with pytest.raises(OSError, match="No space left"):
            for length in range(1, 10_000):
                run.add(dataclasses.replace(A, max_new_tokens=length, text="x" * 1000))
        kept = len(run)
        assert len(Run.read(disk / "run.jsonl")) == kept > 10
        assert (disk / "run.jsonl").read_bytes().endswith(b"\n")
        with pytest.raises(OSError):
            run.save(disk / "copy.jsonl")
        assert len(Run.read(run.save(tmp_path / "rescued.jsonl"))) == kept
    finally:
        subprocess.run(["umount", disk], check=True)


def test_saving_is_whole_or_not_at_all(path):
    Run([A, B]).save(path)
    assert [row.key for row in Run.read(path)] == [A.key, B.key] and list(path.parent.iterdir()) == [path]


def test_saving_a_run_to_its_own_file_keeps_the_lines_it_cannot_read(path):
    path.write_bytes(b"garbage\n")
    with pytest.warns(UserWarning):
        run = Run.open(path)
    run.add(A)
    assert run.save(path) == path and path.read_bytes().startswith(b"garbage\n")
