"""Samples in rounds, and nothing takes a sweep down: children are killed, hung, starved; parents are killed and resumed.
All for real."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest

import quantbench as qb
from quantbench import loading, machine
from quantbench.sweeps.child import Child, ChildDied, ChildFailed
from tests.conftest import Bar, children, eldest

BOTH = ["cpu-fp32", "cpu-int4"]
SHORT = {"repeats": 1, "progress": False}


def statuses(rows) -> dict[str, str]:
    return {row.setting: row.status for row in rows}


# ---- rounds ----

def test_every_cell_of_a_workload_has_the_same_rounds_and_a_model_is_loaded_once(tiny_llama):
    rows = list(qb.sweep(tiny_llama, BOTH, [3, 5], repeats=2, progress=False))
    assert Counter((r.setting, r.max_new_tokens, r.status) for r in rows) == {(s, n, "ok"): 1 for s in BOTH for n in (3, 5)}
    assert [r.max_new_tokens for r in rows] == [3, 3, 5, 5] and not children()
    for one, other in (rows[:2], rows[2:]):
        assert one.rounds == other.rounds and len(set(one.rounds)) == 2 and one.load_s != other.load_s
        assert max(one.sampled_at[0], other.sampled_at[0]) < min(one.sampled_at[1], other.sampled_at[1])
    assert not set(rows[0].rounds) & set(rows[2].rounds)
    assert {r.setting: r.load_s for r in rows[:2]} == {r.setting: r.load_s for r in rows[2:]}


def test_without_repeats_there_are_six_rounds_at_least_and_thirty_at_most(tiny_llama):
    hasty, patient = (list(qb.sweep(tiny_llama, ["cpu-fp32", "cpu-bf16"], 2, budget_s=budget_s, executor="inline",
                                    progress=False)) for budget_s in (1e-6, 1e6))
    assert [len(row.rounds) for row in hasty] == [6, 6] and 6 <= len(patient[0].rounds) <= 30
    assert qb.ratios(hasty)["Verdict"].item() != "not compared"


@pytest.mark.parametrize("executor", ["inline", ThreadPoolExecutor(1)])
def test_another_executor_gives_the_same_rows(tiny_gpt2, executor):
    rows = list(qb.sweep(tiny_gpt2, BOTH, [3, 5], repeats=2, executor=executor, engine=["eager", "graph"], progress=False))
    assert [row.status for row in rows] == ["ok"] * 8 and not children()
    assert [len({tuple(row.rounds) for row in rows if row.max_new_tokens == n}) for n in (3, 5)] == [1, 1]


def test_models_that_do_not_fit_together_are_loaded_in_turn_in_rounds_all_the_same(tiny_llama, monkeypatch, capsys):
    monkeypatch.setattr(machine, "free_bytes", lambda device: 10)
    most = []
    bar = Bar(": round 2", lambda: most.append(len(children())))
    rows = list(qb.sweep(tiny_llama, BOTH, 3, repeats=2, progress=bar))
    assert statuses(rows) == dict.fromkeys(BOTH, "ok") and most == [1]
    assert set(rows[0].rounds) == set(rows[1].rounds) and len(rows[0].rounds) == len(rows[0].latencies_s) == 2
    assert "they are loaded in turn, for 2 rounds" in capsys.readouterr().out


def test_a_second_sweep_with_more_repeats_goes_on_and_one_with_a_trace_measures_it(tiny_gpt2, tmp_path):
    run, how = qb.Run.open(tmp_path / "run.jsonl"), {"executor": "inline", "progress": False}
    first = list(qb.sweep(tiny_gpt2, BOTH, 3, repeats=2, run=run, **how))
    assert list(qb.sweep(tiny_gpt2, BOTH, 3, repeats=2, run=run, **how)) == []
    list(qb.sweep(tiny_gpt2, BOTH, 3, repeats=4, run=run, trace=True, **how))
    one, other = qb.Run.read(run.path)
    assert len(one.rounds) == 4 and one.rounds[:2] == first[0].rounds and set(one.rounds) == set(other.rounds)
    assert len(one.latencies_s) == len(one.rounds) and one.trace["step"]["calls"] == 2 and first[0].trace is None
    assert one.latencies_s[:2] == first[0].latencies_s


# ---- children ----

def test_a_killed_child_costs_its_own_cell_only(tiny_gpt2):
    bar = Bar(": round 3", lambda: eldest().send_signal(signal.SIGKILL))
    rows = list(qb.sweep(tiny_gpt2, BOTH, [20, 3], repeats=4, progress=bar))
    crashed, *others = rows
    assert (crashed.setting, crashed.status) == ("cpu-fp32", "crashed") and "SIGKILL" in crashed.reason
    assert crashed.machine and crashed.versions
    assert [(row.max_new_tokens, row.status) for row in others] == [(20, "ok"), (3, "ok"), (3, "ok")]
    assert [len(row.rounds) for row in others] == [4, 4, 4]


def test_a_hung_child_is_a_timeout_and_is_killed(tiny_gpt2):
    stopped = []
    bar = Bar(": round 2", lambda: (stopped.append(eldest()), stopped[0].suspend()))
    rows = list(qb.sweep(tiny_gpt2, BOTH, 3, repeats=3, progress=bar, timeout_s=15))
    assert [(row.setting, row.status) for row in rows] == [("cpu-fp32", "timeout"), ("cpu-int4", "ok")]
    assert "15 s" in rows[0].reason and not stopped[0].is_running() and len(rows[1].rounds) == 3


def test_leaving_in_the_middle_keeps_what_was_measured_and_leaves_no_child(tiny_gpt2, tmp_path):
    run = qb.Run.open(tmp_path / "run.jsonl")
    for _ in qb.sweep(tiny_gpt2, BOTH, [3, 5], run=run, **SHORT):
        if len(run) == 2:
            break
    assert len(qb.Run.read(run.path)) == 2 and not children()


def test_a_set_event_ends_a_cell_without_a_row_and_keeps_the_others(tiny_gpt2):
    stop = threading.Event()
    start = time.monotonic()
    rows = list(qb.sweep(tiny_gpt2, BOTH, [3, 50], repeats=200, stop=stop, progress=Bar("50 tokens: round 2", stop.set)))
    assert Counter((row.max_new_tokens, row.status) for row in rows) == {(3, "ok"): 2} and not children()
    assert time.monotonic() - start < 60


def test_a_failed_cell_is_skipped_unless_it_is_retried(tiny_gpt2):
    run = qb.Run()
    cell = {"models": tiny_gpt2, "settings": "cpu-fp32", "max_new_tokens": 20, "run": run}
    bar = Bar(": round 2", lambda: eldest().send_signal(signal.SIGSEGV))
    assert [row.status for row in qb.sweep(**cell, repeats=3, progress=bar)] == ["crashed"] and "SIGSEGV" in run[0].reason
    assert list(qb.sweep(**cell, **SHORT)) == []
    assert [row.status for row in qb.sweep(**cell, **SHORT, retry=True)] == ["ok"] and len(run) == 1


def test_adding_what_the_sweep_added_writes_no_second_line(tiny_gpt2, tmp_path):
    run = qb.Run.open(tmp_path / "run.jsonl")
    for row in qb.sweep(tiny_gpt2, "cpu-fp32", [3, 5], run=run, executor="inline", **SHORT):
        run.add(row)
    assert len(run.path.read_text().splitlines()) == 2


class Odd(Exception):
    """An exception that pickle cannot build again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"odd: {one}, {two}")


def be_odd() -> None:
    raise Odd(1, 2)


def be_unpicklable() -> object:
    return threading.Lock()


def test_an_error_leaves_its_process_as_text_and_the_process_lives_on(monkeypatch):
    with Child() as child:
        for work, words in ((be_odd, "Odd: odd: 1, 2"), (be_unpicklable, "cannot leave its process")):
            with pytest.raises(ChildFailed, match=words) as caught:
                child.submit(work).result(60)
        assert child.submit(max, 1, 2).result(60) == 2
        with pytest.raises(ChildDied, match="exit code 3"):
            child.submit(os._exit, 3).result(60)
    with Child() as child:
        with pytest.raises(ChildFailed) as caught:
            child.submit(be_odd).result(60)
        assert "be_odd" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("value", ["one", "two"])
def test_a_child_has_its_parents_environment_of_now(monkeypatch, value):
    monkeypatch.setenv("QUANTBENCH_TEST", value)
    with Child() as child:
        assert child.submit(os.getenv, "QUANTBENCH_TEST").result(60) == value


# ---- failures of one cell ----

@pytest.mark.parametrize("error", [Odd(1, 2), ValueError("wrong"), KeyError("x"), AssertionError("no")])
def test_any_error_in_one_cell_is_said_and_the_others_go_on(tiny_gpt2, monkeypatch, error):
    plain = loading._from_folder

    def broken(folder, setting):
        if setting.key == "cpu-int4":
            raise error
        return plain(folder, setting)

    monkeypatch.setattr(loading, "_from_folder", broken)
    with pytest.warns(UserWarning, match="CPU INT4 · 3 tokens failed"):
        rows = list(qb.sweep(tiny_gpt2, ["cpu-int4", "cpu-fp32"], 3, executor="inline", **SHORT))
    assert statuses(rows) == {"cpu-int4": "failed", "cpu-fp32": "ok"} and rows[0].reason.startswith(type(error).__name__)


@pytest.mark.parametrize("executor", [None, "inline"])
def test_a_model_with_broken_files_is_a_failed_row_and_the_others_go_on(tiny_gpt2, tiny_llama, tmp_path, executor):
    broken = {"tokenizer": ("tokenizer.json", "{broken"), "list": ("tokenizer.json", "[]"),
              "architecture": ("config.json", '{"model_type": "other"}'), "config": ("config.json", "{"), "index": ("model.safetensors", "no tensors")}
    for name, (file, text) in broken.items():
        shutil.copytree(tiny_gpt2, tmp_path / name)
        (tmp_path / name / file).write_text(text)
    models = [tiny_gpt2, *(tmp_path / name for name in broken), tiny_llama]
    with pytest.warns(UserWarning):  # of the one that is found broken only when it is loaded
        rows = list(qb.sweep(models, "cpu-fp32", 3, executor=executor, **SHORT))
    assert [row.status for row in rows] == ["ok", *["failed"] * len(broken), "ok"]
    assert all(0 < len(row.reason) < 300 for row in rows[1:-1])


class Dead(Executor):
    """A pool whose workers are gone."""

    def submit(self, *args, **named):
        raise BrokenProcessPool("all workers died")


def test_a_dead_pool_gives_rows(tiny):
    rows = list(qb.sweep(tiny, BOTH, 3, executor=Dead(), **SHORT))
    assert statuses(rows) == dict.fromkeys(BOTH, "crashed") and "all workers died" in rows[0].reason


@pytest.mark.parametrize("mistake, message", [
    ({"models": "gtp2"}, "unknown model"), ({"settings": ["cpu-fp23"]}, "unknown setting"),
    ({"max_new_tokens": [3, 0]}, "at least 1"), ({"max_new_tokens": 60}, "over the 64 tokens"),
    ({"executor": "outline"}, "unknown executor"), ({"timeout_s": 0}, "timeout_s"), ({"engine": "x"}, "unknown engine"),
    ({"repeats": 0}, "repeats"), ({"budget_s": -1}, "budget_s"), ({"prompt": ""}, "prompt is empty")])
def test_a_mistake_raises_at_once(tiny, mistake, message):
    with pytest.raises(ValueError, match=message):
        qb.sweep(**{"models": tiny, "settings": "cpu-fp32", "max_new_tokens": 3} | mistake)


# ---- parents ----

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


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_parent_that_ends_mid_sweep_leaves_no_orphan_and_resumes(tiny_gpt2, tmp_path, how):
    path = tmp_path / "run.jsonl"
    parent = start(tiny_gpt2, path, repeats=40)
    assert parent.stdout.readline() == "ok\n"
    members = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(how)
    parent.wait(30)
    _, alive = psutil.wait_procs(members, timeout=10)
    assert not alive
    lines = path.read_text().splitlines()
    assert 1 <= len(lines) < 4 and all(json.loads(line)["status"] == "ok" for line in lines)
    out, error = start(tiny_gpt2, path, repeats=1).communicate(timeout=120)
    assert Counter(out.split())["ok"] == 4 - len(lines), error
    cells = Counter((row["setting"], row["max_new_tokens"]) for row in map(json.loads, path.read_text().splitlines()))
    assert cells == dict.fromkeys([(s, n) for s in BOTH for n in (3, 40)], 1)


def test_a_child_that_runs_into_its_memory_limit_is_a_row_with_the_bytes_asked_for(tiny_gpt2, tmp_path):
    path = tmp_path / "run.jsonl"
    out, error = start(tiny_gpt2, path, limit=8 * 10**9, batch=12 * 10**5).communicate(timeout=200)
    rows = list(qb.Run.read(path))
    assert [row.status for row in rows] == ["out_of_memory"] * 4, out + error
    assert all("bytes" in row.reason for row in rows)
