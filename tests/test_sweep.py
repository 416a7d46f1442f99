"""Nothing takes a sweep down: children are killed, hung, starved; parents are killed and resumed. All for real."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import quantbench as qb
from tests.conftest import children

LONG = {"max_new_tokens": [50], "repeats": 400, "progress": False}  # minutes, unless something ends it
SHORT = {"repeats": 1, "progress": False}


def when_measuring(act, after_s: float = 1.0) -> threading.Thread:
    """Call `act` with the measuring process once it has worked for `after_s` seconds."""

    def wait() -> None:
        while not (found := children()):
            time.sleep(0.01)
        with contextlib.suppress(psutil.NoSuchProcess):
            until = found[0].cpu_times().user + after_s
            while found[0].cpu_times().user < until:
                time.sleep(0.01)
            act(found[0])

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_every_cell_is_a_row_in_order_and_a_model_is_loaded_once(tiny):
    rows = list(qb.sweep(tiny, ["cpu-fp32", "cpu-int4"], [3, 5], **SHORT))
    assert [(r.setting, r.max_new_tokens, r.status) for r in rows] == [
        ("cpu-fp32", 3, "ok"), ("cpu-fp32", 5, "ok"), ("cpu-int4", 3, "ok"), ("cpu-int4", 5, "ok")]
    assert rows[0].load_s == rows[1].load_s and rows[2].load_s == rows[3].load_s != rows[0].load_s
    assert not children()


def test_a_killed_child_is_a_row_and_the_others_go_on(tiny_gpt2):
    when_measuring(lambda child: child.send_signal(signal.SIGKILL))
    rows = list(qb.sweep(tiny_gpt2, "cpu-fp32", **LONG)) + list(qb.sweep(tiny_gpt2, "cpu-fp32", 3, **SHORT))
    assert [row.status for row in rows] == ["crashed", "ok"]
    assert "SIGKILL" in rows[0].reason and rows[0].machine and rows[0].versions


def test_after_a_crash_the_next_length_gets_a_new_child(tiny_gpt2):
    when_measuring(lambda child: child.send_signal(signal.SIGSEGV))
    lengths = [50, 3]
    rows = list(qb.sweep(tiny_gpt2, "cpu-fp32", lengths, repeats=30, progress=False))
    assert [row.status for row in rows] == ["crashed", "ok"] and "SIGSEGV" in rows[0].reason


@pytest.mark.alone
def test_a_hung_child_is_a_timeout_and_is_killed(tiny_gpt2):
    stopped = []
    when_measuring(lambda child: (child.suspend(), stopped.append(child)), after_s=0.3)
    rows = list(qb.sweep(tiny_gpt2, ["cpu-fp32", "cpu-int4"], 50, repeats=8, progress=False, timeout_s=8))
    assert [row.status for row in rows] == ["timeout", "ok"]
    assert "8 s" in rows[0].reason and not stopped[0].is_running()


def test_stopping_in_the_middle_keeps_what_was_measured_and_leaves_no_child(tiny_gpt2, tmp_path):
    run = qb.Run.open(tmp_path / "run.jsonl")
    for _ in qb.sweep(tiny_gpt2, ["cpu-fp32", "cpu-int4"], [3, 5], run=run, **SHORT):
        if len(run) == 2:
            break
    assert len(qb.Run.read(run.path)) == 2 and not children()


def test_a_set_event_ends_a_cell_without_a_row_and_keeps_the_others(tiny_gpt2):
    stop, rows = threading.Event(), []
    sweep = qb.sweep(tiny_gpt2, ["cpu-fp32", "cpu-int4"], [3, 50], repeats=400, progress=False, stop=stop)
    rows.append(next(sweep))
    when_measuring(lambda child: stop.set())
    start = time.monotonic()
    rows += sweep
    assert [(row.max_new_tokens, row.status) for row in rows] == [(3, "ok")] and not children()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("executor", ["inline", ThreadPoolExecutor(1)])
def test_a_set_event_ends_another_executor_after_its_cell(tiny_gpt2, executor):
    stop, rows = threading.Event(), []
    for row in qb.sweep(tiny_gpt2, ["cpu-fp32", "cpu-int4"], [3, 5], executor=executor, stop=stop, **SHORT):
        rows.append(row)
        stop.set()
    assert [row.max_new_tokens for row in rows] == [3]


def test_a_second_sweep_measures_only_what_is_missing(tiny, tmp_path, capsys):
    run = qb.Run.open(tmp_path / "run.jsonl")
    assert len(list(qb.sweep(tiny, "cpu-fp32", [3, 5], run=run, **SHORT))) == 2
    again = list(qb.sweep(tiny, ["cpu-fp32", "cpu-int4"], [3, 5, 7], run=qb.Run.open(run.path), **SHORT))
    assert [(r.setting, r.max_new_tokens) for r in again] == [("cpu-fp32", 7), *[("cpu-int4", n) for n in (3, 5, 7)]]
    assert "2 of 6 cells are in the run already" in capsys.readouterr().out
    assert len(run.path.read_text().splitlines()) == 6


def test_failed_cells_are_measured_again_on_request(tiny_gpt2):
    when_measuring(lambda child: child.kill())
    run = qb.Run()
    cell = {"models": tiny_gpt2, "settings": "cpu-fp32", "max_new_tokens": 50, "progress": False, "run": run}
    assert [row.status for row in qb.sweep(**cell, repeats=400)] == ["crashed"]
    assert list(qb.sweep(**cell, repeats=1)) == []
    assert [row.status for row in qb.sweep(**cell, repeats=1, retry=True)] == ["ok"] and len(run) == 1


def test_adding_what_the_sweep_added_writes_no_second_line(tiny, tmp_path):
    run = qb.Run.open(tmp_path / "run.jsonl")
    for row in qb.sweep(tiny, "cpu-fp32", [3, 5], run=run, **SHORT):
        run.add(row)
    assert len(run.path.read_text().splitlines()) == 2


@pytest.mark.parametrize("executor", ["inline", ThreadPoolExecutor(1)])
def test_another_executor_gives_the_same_rows(tiny, executor):
    rows = list(qb.sweep(tiny, "cpu-fp32", [3, 5], executor=executor, **SHORT))
    assert [row.status for row in rows] == ["ok", "ok"] and not children()


def test_a_failure_in_one_cell_is_said_and_the_others_go_on(tiny_gpt2, monkeypatch):
    from quantbench import loaders
    monkeypatch.setattr(loaders, "quantisation_config", lambda setting: None)
    with pytest.warns(UserWarning, match="no module was quantised"):
        rows = list(qb.sweep(tiny_gpt2, ["cpu-int4", "cpu-fp32"], 3, executor="inline", **SHORT))
    assert [row.status for row in rows] == ["failed", "ok"] and rows[0].reason.startswith("AuditError: CPU INT4")


@pytest.mark.parametrize("mistake, message", [
    ({"models": "gtp2"}, "unknown model"), ({"settings": ["cpu-fp23"]}, "unknown setting"),
    ({"max_new_tokens": [3, 0]}, "at least 1"), ({"max_new_tokens": 60}, "over the 64 tokens"),
    ({"executor": "outline"}, "unknown executor"), ({"timeout_s": 0}, "timeout_s"), ({"engine": "x"}, "unknown engine"),
])
def test_a_mistake_raises_at_once(tiny, mistake, message):
    with pytest.raises(ValueError, match=message):
        qb.sweep(**{"models": tiny, "settings": "cpu-fp32", "max_new_tokens": 3} | mistake)


SCRIPT = """
import sys, resource, quantbench as qb
model, path, limit, batch, repeats = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
if limit:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
run = qb.Run.open(path)
for row in qb.sweep(model, ["cpu-fp32", "cpu-int4"], [3, 40], run=run, batch_size=batch, repeats=repeats,
                    progress=False):
    print(row.status, flush=True)
"""


def start(model: str, path: Path, limit: int = 0, batch: int = 1, repeats: int = 1) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, model, path, str(limit), str(batch), str(repeats)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_parent_that_ends_mid_sweep_leaves_no_orphan_and_resumes(tiny_gpt2, tmp_path, how):
    path = tmp_path / "run.jsonl"
    parent = start(tiny_gpt2, path, repeats=25)
    assert parent.stdout.readline() == "ok\n"
    members = family(parent)
    parent.send_signal(how)
    parent.wait(30)
    _, alive = psutil.wait_procs(members, timeout=10)
    assert not alive
    lines = path.read_text().splitlines()
    assert 1 <= len(lines) < 4 and all(json.loads(line)["status"] == "ok" for line in lines)
    out, error = start(tiny_gpt2, path, repeats=1).communicate(timeout=120)
    assert Counter(out.split())["ok"] == 4 - len(lines), error
    cells = Counter((row["setting"], row["max_new_tokens"]) for row in map(json.loads, path.read_text().splitlines()))
    assert cells == dict.fromkeys([(s, n) for s in ("cpu-fp32", "cpu-int4") for n in (3, 40)], 1)


def test_a_child_that_runs_into_its_memory_limit_is_a_row_with_the_bytes_asked_for(tiny_gpt2, tmp_path):
    path = tmp_path / "run.jsonl"
    out, error = start(tiny_gpt2, path, limit=8 * 10**9, batch=12 * 10**5).communicate(timeout=200)
    rows = list(qb.Run.read(path))
    assert [row.status for row in rows] == ["out_of_memory"] * 4, out + error
    assert all("bytes" in row.reason for row in rows)
