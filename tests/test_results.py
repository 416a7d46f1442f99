"""A run and its file: nothing measured is lost, whatever happens to the file and whoever else writes to it."""

import dataclasses
import json
import os
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantbench as qb
from quantbench.records import Measurement
from quantbench.results import NewerSchema, Run, to_line

A = Measurement(model="gpt2", setting="cpu-fp32", max_new_tokens=8, new_tokens=8, latencies_s=[1.0])
B = dataclasses.replace(A, max_new_tokens=16, new_tokens=16)
QUALITY = qb.Quality(model="gpt2", setting="cpu-fp32", text="t", tokens=9, perplexity=2.0)
LIMITS = qb.Limits(device="cpu", name="C", read_bytes_per_s=1e10, matrix_flops_per_s={})
LINE = to_line(A)[:-1]
WRITER = """
import sys
from quantbench.records import Measurement
from quantbench.results import Run
run = Run.open(sys.argv[1])
for n in range(1, int(sys.argv[3]) + 1):
    run.add(Measurement(model=sys.argv[2], setting="cpu-fp32", max_new_tokens=n, text="x" * 5_000))
    print(n, flush=True)
"""


def writer(path: Path, model: str, rows: int) -> subprocess.Popen:
    """A process that adds `rows` rows to the run at `path`, and prints each one's number once it is added."""
    return subprocess.Popen([sys.executable, "-c", WRITER, path, model, str(rows)], stdout=subprocess.PIPE, text=True,
                            cwd=Path(__file__).parent.parent)


def lengths(run: Run, model: str) -> list[int]:
    return sorted(row.max_new_tokens for row in run.only(model=model))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.jsonl"


# ---- one process ----

def test_a_re_run_replaces_its_row(path):
    run = Run.open(path)
    again = dataclasses.replace(A, latencies_s=[2.0])
    for row in (A, B, again, again):
        run.add(row)
    assert list(run) == [again, B] == list(Run.read(path)) and path.read_bytes().count(b"\n") == 3


def test_qualities_and_limits_stand_beside_the_measurements(path):
    run = Run.open(path)
    for record in (QUALITY, A, LIMITS, B, QUALITY):
        run.add(record)
    run.replace([dataclasses.replace(A, max_new_tokens=64)])
    for found in (run, Run.read(path), Run.of(run), run.only(max_new_tokens=64)):
        assert (lengths(found, "gpt2"), found.qualities, found.limits) == ([64], [QUALITY], [LIMITS])
    assert len(run) == 1 and run[0].max_new_tokens == 64 and "1 measurements" in repr(run)


def test_a_part_of_a_run_holds_no_other_machines_or_models_qualities_and_limits():
    there = [dataclasses.replace(one, machine={"cpu": "There"}) for one in (A, B, QUALITY, LIMITS)]
    other = [dataclasses.replace(one, model="distilgpt2") for one in (A, QUALITY)]
    run = Run([A, B, QUALITY, LIMITS, *there, *other])
    found = run.only(machine_name="There")
    assert [*found, *found.qualities, *found.limits] == there
    assert qb.quality_findings(found) and [one.model for one in run.only(model="distilgpt2").qualities] == ["distilgpt2"]
    assert len(run.only(model="distilgpt2").limits) == 2 and len(run.only(engine="eager").qualities) == 3


def test_a_field_that_no_measurement_has_is_refused_with_the_nearest():
    for run in (Run(), Run([A, QUALITY, LIMITS])):
        with pytest.raises(ValueError, match="^unknown field 'modle'; did you mean 'model'"):
            run.only(modle="gpt2")
    assert list(Run([A, B]).only(machine_name="", gpus=1, tokens_per_s=8.0, setting_label="CPU FP32")) == [A]


def test_replacing_a_cells_rows_drops_the_lengths_it_no_longer_has(path):
    run = Run.open(path)
    other = dataclasses.replace(A, setting="cpu-int8")
    assert list(run.replace([A, B])) == [A, B] == list(run) == list(Run.read(path))
    run.add(other)
    new = dataclasses.replace(A, max_new_tokens=64)
    assert list(run.replace([new])) == [new] and list(run.replace([])) == []
    assert list(run) == [other, new] == list(Run.read(path))
    in_rounds = run.add(dataclasses.replace(B, rounds=[f"r{place}" for place in range(len(B.latencies_s))]))
    assert list(run.replace([A])) == [A] and list(run) == [other, in_rounds, A] == list(Run.read(path))


def test_an_interrupted_replace_keeps_the_old_rows_and_the_lengths_that_are_done(path):
    run = Run.open(path)
    run.add(A)

    def broken():
        yield B
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.replace(broken())
    assert list(run) == [A, B] == list(Run.read(path))


def test_a_row_is_synced_whole_before_add_returns(path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), synced.append(path.read_bytes())))
    run = Run.open(path)
    for count, row in enumerate([A, B], start=1):
        run.add(row)
        assert len(synced) == count and synced[-1].endswith(to_line(row))


@pytest.mark.parametrize("how", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_file_that_is_deleted_or_emptied_meanwhile_is_written_whole_again(path, tmp_path, how):
    run = Run.open(path)
    run.add(A)
    how(path)
    run.add(B)
    assert list(Run.read(path)) == [A, B]
    path.unlink()
    assert list(Run.read(run.save(path))) == [A, B]


def test_replacing_keeps_a_link_and_the_files_mode(path, tmp_path):
    link = tmp_path / "link.jsonl"
    Run([A, B]).save(path)
    path.chmod(0o600)
    link.symlink_to(path)
    Run.open(link).replace([A])
    assert link.is_symlink() and list(Run.read(path)) == [A] and stat.S_IMODE(path.stat().st_mode) == 0o600
    Run([B]).save(link)
    assert link.is_symlink() and list(Run.read(path)) == [B] and stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["run.jsonl.new", ".run.jsonl.new", ".run.jsonl.lock"])
def test_a_link_at_a_name_beside_it_is_not_followed(path, tmp_path, name):
    other = tmp_path / "other.txt"
    other.write_text("precious")
    (tmp_path / name).symlink_to(other)
    try:
        run = Run.open(path)
        run.add(A), run.replace([B])
        assert list(Run.read(path)) == [B]
    except OSError:
        pass  # refused is as good
    assert other.read_text() == "precious"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_refused_at_once(path, make):
    make(path)
    for use in (Run.open, Run.read):
        with pytest.raises(OSError, match="no regular file"):
            use(path)


def test_saving_is_whole_or_not_at_all(path, monkeypatch):
    Run([A]).save(path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError):
        Run([A, B]).save(path)
    assert list(Run.read(path)) == [A]
    assert {file.name for file in path.parent.iterdir()} <= {path.name, f".{path.name}.lock"}


# ---- several ----

@pytest.mark.parametrize("rows", [1, 40])
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


def test_one_process_adds_while_another_replaces_and_a_third_adds(path):
    run, writers, times = Run.open(path), [writer(path, "a", 300), writer(path, "b", 30)], 0
    for process in writers:
        threading.Thread(target=process.communicate, daemon=True).start()
    while any(process.poll() is None for process in writers):
        times += 1
        run.replace([dataclasses.replace(A, max_new_tokens=times)])
    assert [process.returncode for process in writers] == [0, 0] and times > 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Run.read(path)
    assert [lengths(found, model) for model in ("a", "b", "gpt2")] == [[*range(1, 301)], [*range(1, 31)], [times]]


def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        runs = [Run.open(disk / "run.jsonl") for _ in range(3)]  # three adders, as three processes would be
        for size, run in zip((1000, 700, 400), runs):
            with pytest.raises(OSError, match="No space left"):
                for length in range(1, 10_000):
                    run.add(dataclasses.replace(A, model=str(size), max_new_tokens=length, text="x" * size))
        kept = sum(map(len, runs))
        assert len(Run.read(disk / "run.jsonl")) == kept > 10
        assert (disk / "run.jsonl").read_bytes().endswith(b"\n")
        with pytest.raises(OSError):
            runs[0].save(disk / "copy.jsonl")
        assert len(Run.read(runs[0].save(tmp_path / "rescued.jsonl"))) == len(runs[0])
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- lines that cannot be read ----

@pytest.mark.parametrize("cut", [0, 1, 2, 60, len(LINE) // 2, len(LINE) - 2, len(LINE) - 1, len(LINE)])
def test_a_last_line_cut_anywhere_is_set_aside_and_the_next_row_is_whole(path, cut):
    path.write_bytes(to_line(B) + LINE[:cut])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = Run.open(path)
        run.add(A)
        assert {row.key for row in Run.read(path)} == {A.key, B.key}
    assert ["line 2 cannot be read" in str(one.message) for one in said] == [True] * (2 if 0 < cut < len(LINE) else 0)
    assert LINE[:cut] in path.read_bytes()


def test_what_a_killed_writer_left_half_does_not_swallow_the_next_row_of_another(path):
    run = Run.open(path)
    run.add(A)
    path.write_bytes(path.read_bytes() + LINE[:60])
    run.add(B)
    with pytest.warns(UserWarning, match="line 2 cannot be read"):
        assert list(Run.read(path)) == [A, B]


def test_reading_leaves_nothing_beside_the_file(path):
    path.write_bytes(to_line(A))
    assert list(Run.read(path)) == [A] and list(path.parent.iterdir()) == [path]


def test_garbage_lines_stay_in_the_file_and_duplicate_keys_count_once(path):
    later = dataclasses.replace(A, latencies_s=[3.0])
    path.write_bytes(b"\xff\xfe garbage\n" + to_line(A) + b"\n[1, 2]\n" + to_line(later))
    with pytest.warns(UserWarning):
        run = Run.open(path)
    assert list(run) == [later]
    run.replace([dataclasses.replace(A, max_new_tokens=9)])
    assert b"\xff\xfe garbage\n" in path.read_bytes() and b"[1, 2]\n" in path.read_bytes()
    assert run.save(path) == path and path.read_bytes().startswith(b"\xff\xfe garbage\n")


def test_a_quality_that_stood_in_a_row_of_the_first_version_outlives_it(path):
    old = json.loads(LINE) | {"schema": 1, "quality": {"text": "t", "tokens": 9, "perplexity": 2.0}}
    path.write_text(json.dumps(old) + "\n")
    run = Run.open(path)
    assert [one.perplexity for one in run.qualities] == [2.0]
    run.replace([B])
    assert (list(Run.read(path)), Run.read(path).qualities) == ([B], run.qualities)


def test_a_newer_schema_is_refused_with_its_place(path):
    path.write_bytes(to_line(B) + json.dumps(json.loads(LINE) | {"schema": 99}).encode() + b"\n")
    with pytest.raises(NewerSchema, match=r"run\.jsonl, line 2: schema 99"):
        Run.open(path)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_file_opens_or_says_why(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "run.jsonl"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Run.open(path)
        run.add(A)
        assert A in list(Run.read(path))
