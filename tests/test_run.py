"""A run and its file: nothing measured is lost, whatever happens to the file."""

import dataclasses
import json
import os
import subprocess
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
