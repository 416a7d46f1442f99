"""Nothing takes a sweep down: children are killed, hung, starved; parents are killed and resumed. All for real."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

import quantbench as qb
from quantbench.sweeps import rounds, workers
from quantbench.sweeps.child import Desk
from tests.conftest import BOTH, SHORT, TINY, Bar, children, eldest, statuses

# ---- children ----

def test_a_killed_child_costs_its_own_cell_only(tiny_gpt2):
    bar = Bar(": round 3", lambda: eldest().send_signal(signal.SIGKILL))
    rows = list(qb.sweep(tiny_gpt2, BOTH, [20, 3], repeats=4, progress=bar))
    crashed, *others = rows
    assert (crashed.setting, crashed.status) == ("cpu-fp32", "crashed")
    assert "SIGKILL" in crashed.reason and "round 3" in crashed.reason
    assert crashed.machine and crashed.versions
    assert [(row.max_new_tokens, row.status) for row in others] == [(20, "ok"), (3, "ok"), (3, "ok")]
    assert [len(row.rounds) for row in others] == [4, 4, 4]


def test_every_process_is_there_before_a_model_is_loaded(tiny_gpt2):
    """Spawned ones import for seconds: side by side."""
    seen = []
    assert len(list(qb.sweep(tiny_gpt2, BOTH, 3, repeats=1, progress=Bar(": loading", lambda: seen.append(len(children())))))) == 2
    assert seen == [2]


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


def test_a_child_has_its_parents_environment_of_now(tiny_gpt2, monkeypatch, tmp_path):
    for name in ("one", "two"):
        monkeypatch.setenv("QUANTBENCH_CACHE", str(tmp_path / name))
        list(qb.sweep(tiny_gpt2, "cpu-fp32", 3, **SHORT))
        assert list((tmp_path / name).iterdir())


def test_a_child_has_its_parents_threads_of_now_and_a_second_sweep_finds_its_rows(tiny_gpt2):
    before = torch.get_num_threads()
    try:
        for threads in (1, before + 1):
            torch.set_num_threads(threads)
            how = SHORT | {"run": qb.Run()}
            row, = qb.sweep(tiny_gpt2, "cpu-fp32", 3, **how)
            assert row.machine["torch_threads"] == threads and not list(qb.sweep(tiny_gpt2, "cpu-fp32", 3, **how))
    finally:
        torch.set_num_threads(before)


# ---- failures of one cell ----

def test_a_model_with_broken_files_is_a_failed_row_and_the_others_go_on(tiny_gpt2, tiny_llama, tmp_path):
    broken = {"tokenizer": ("tokenizer.json", "{broken"), "index": ("model.safetensors", "no tensors"),
              "architecture": ("config.json", '{"model_type": "other"}'), "config": ("config.json", "{"),
              "strict": ("config.json", '{"model_type": "gpt2", "n_layer": "two"}')}  # cannot be rebuilt elsewhere
    for name, (file, text) in broken.items():
        shutil.copytree(tiny_gpt2, tmp_path / name)
        (tmp_path / name / file).write_text(text)
    models = [tiny_gpt2, *(tmp_path / name for name in broken), tiny_llama]
    with warnings.catch_warnings(action="error"):  # a refusal is a sentence, without a traceback
        rows = list(qb.sweep(models, "cpu-fp32", 3, **SHORT))
    assert [row.status for row in rows] == ["ok", *["failed"] * len(broken), "ok"]
    assert all(0 < len(row.reason) < 300 and "Error" not in row.reason[:20] for row in rows[1:-1]) and not children()


class Faulty(Desk):
    def sample(self, name):
        raise LookupError("nobody expected this")


def test_what_nobody_expected_is_a_failed_row_with_its_traceback(tiny_gpt2, monkeypatch):
    monkeypatch.setattr(rounds, "Desk", Faulty)
    with pytest.warns(UserWarning, match="(?s)Traceback.*nobody expected this"):
        [row] = qb.sweep(tiny_gpt2, "cpu-fp32", 3, executor="inline", **SHORT)
    assert (row.status, row.reason) == ("failed", "LookupError: nobody expected this")


def test_a_setting_that_leaves_layers_is_a_row_that_says_what_it_takes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY["llama"] | {"intermediate_size": 100}))
    [row] = qb.sweep(tmp_path, "cpu-int8-weights", 3, executor="inline", **SHORT)
    assert row.reason == "13 modules were quantised, but 2 Linear were left: it takes Linear with a multiple of 16 inputs"


def test_a_dead_pool_gives_rows(tiny_gpt2):
    with ThreadPoolExecutor(1) as pool:
        pass
    rows = list(qb.sweep(tiny_gpt2, BOTH, 3, executor=pool, **SHORT))
    assert statuses(rows) == dict.fromkeys(BOTH, "crashed") and "after shutdown" in rows[0].reason


def test_nothing_is_measured_beside_a_job_that_took_too_long(tiny_gpt2, tiny_llama, monkeypatch):
    end = threading.Event()
    monkeypatch.setattr(workers, "measure_here", lambda cells, trace: end.wait(60) and [])
    with ThreadPoolExecutor(2) as pool:
        rows = list(qb.sweep([tiny_gpt2, tiny_llama], "cpu-fp32", 3, executor=pool, timeout_s=0.2, **SHORT))
        end.set()
    assert [row.status for row in rows] == ["timeout"] * 2
    assert "0.2 s" in rows[0].reason and "still runs" in rows[1].reason


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
                                  resources={"GPU": 1}) as cluster, distributed.Client(cluster) as client:
        yield client


def test_a_dask_cluster_measures_a_model_on_one_worker_and_a_lost_one_costs_its_own_model(
        client, tiny_gpt2, tiny_llama, tmp_path):
    def kill():
        """One worker, while it measures."""
        while not (busy := [one for one, jobs in client.processing().items() if "measure_here" in str(jobs)]):
            time.sleep(0.1)
        os.kill(workers[busy[0]], signal.SIGKILL)

    third, run, workers = tmp_path / "third", qb.Run.open(tmp_path / "run.jsonl"), client.run(os.getpid)
    shutil.copytree(tiny_gpt2, third)
    models = [tiny_gpt2, tiny_llama, str(third)]
    swept = partial(qb.sweep, models, BOTH, 3, run=run, executor=client, progress=False, repeats=20)
    threading.Thread(target=kill, daemon=True).start()
    rows = list(swept())
    lost = {row.model for row in rows if row.status == "crashed"}
    assert len(rows) == 6 and len(lost) == 1 and {row.status for row in rows} == {"ok", "crashed"}
    assert all("is gone: not tried again" in row.reason and row.machine for row in rows if row.status == "crashed")
    assert {(row.model, row.status) for row in swept(retry=True)} == {(*lost, "ok")} and not list(swept())
    rows = list(qb.Run.read(run.path))
    assert len(rows) == 6 and {row.status for row in rows} == {"ok"}
    assert [len({tuple(row.rounds) for row in rows if row.model == model}) for model in models] == [1, 1, 1]
    held = client.run(lambda: [str(one) for one in gc.get_objects()
                               if type(one).__name__ == "Linear" and not one.weight.is_meta])
    assert list(held.values()) == [[], []]


def test_what_another_machine_of_a_cluster_measured_is_not_measured_again(tiny_gpt2):
    how = {"executor": ThreadPoolExecutor(1), "repeats": 2, "progress": False}
    rows = [replace(row, machine={"cpu": "another"}) for row in qb.sweep(tiny_gpt2, BOTH, 3, **how)]
    assert not list(qb.sweep(tiny_gpt2, BOTH, 3, run=qb.Run(rows), **how))
    assert len(list(qb.sweep(tiny_gpt2, [*BOTH, "cpu-bf16"], 3, run=qb.Run(rows), **how))) == 3  # its baseline is here


@pytest.mark.parametrize("mistake, message", [
    ({"models": "gtp2"}, "unknown model"), ({"settings": ["cpu-fp23"]}, "unknown setting"),
    ({"max_new_tokens": [3, 0]}, "at least 1"), ({"max_new_tokens": 60}, "over the 64 tokens"),
    ({"executor": "outline"}, "unknown executor"), ({"executor": 3}, "unknown executor"), ({"timeout_s": 0}, "timeout_s"), ({"engine": "x"}, "unknown engine"),
    ({"repeats": 0}, "repeats"), ({"budget_s": -1}, "budget_s"), ({"prompt": ""}, "prompt is empty"),
    ({"models": None}, "unknown model: one is a name"), ({"models": [b"gpt2"]}, "unknown model"), ({"models": "x" * 5000}, "unknown"),
    ({"models": "~nobody-here/x"}, "no folder"), ({"settings": [["cpu-fp32"]]}, "unknown setting"),
    ({"cache": [None]}, "unknown cache"), ({"gpus": 0}, "gpus must be"), ({"gpus": "2"}, "gpus must be"),
    ({"timeout_s": "3"}, "timeout_s"), ({"timeout_s": None}, "timeout_s"), ({"run": "rows.jsonl"}, "run must be a qb.Run"),
    ({"run": [3]}, "run must be a qb.Run"), ({"stop": 3}, "stop must be a threading.Event"),
    ({"prompt": ["a", "b"]}, "no text"), *(({name: []}, f"{name} must be at least one") for name in (
        "models", "settings", "max_new_tokens", "batch_size", "prompt_tokens", "depth", "cache", "gpus")),
    ({"engine": []}, "engines must be"), ({"prompt": "a\ud800b"}, "surrogates")])
def test_a_mistake_raises_at_once(tiny, mistake, message):
    with pytest.raises(ValueError, match=message):
        qb.sweep(**{"models": tiny, "settings": "cpu-fp32", "max_new_tokens": 3} | mistake)


# ---- parents ----

SCRIPT = """
import sys, resource, quantbench as qb
model, path, limit, batch, repeats, *lengths = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
if limit:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
run = qb.Run.open(path)
for row in qb.sweep(model, ["cpu-fp32", "cpu-int4"], lengths, run=run, batch_size=batch, repeats=repeats,
                    progress=False):
    print(row.status, flush=True)
"""


def start(model: str, path: Path, limit=0, batch=1, repeats=1, lengths=(3, 40)) -> subprocess.Popen:
    asked = map(str, (limit, batch, repeats, *lengths))
    return subprocess.Popen([sys.executable, "-c", SCRIPT, model, path, *asked], text=True, env=os.environ,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_parent_that_ends_mid_sweep_leaves_no_orphan_and_resumes(tiny_gpt2, tmp_path, monkeypatch, how):
    path, folder = tmp_path / "run.jsonl", tempfile.TemporaryDirectory()  # a short name: a socket's has 108 characters
    monkeypatch.setenv("TMPDIR", folder.name)
    parent = start(tiny_gpt2, path, repeats=60)  # seconds of work left, on a fast and busy machine too
    assert parent.stdout.readline() == "ok\n"
    members = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(how)
    parent.wait(30)
    _, alive = psutil.wait_procs(members, timeout=10)
    assert not alive and not [*Path(folder.name).glob("pymp-*")]  # multiprocessing's own
    before = list(qb.Run.read(path))
    assert 1 <= len(before) < 4 and {row.status for row in before} == {"ok"}
    out, error = start(tiny_gpt2, path, repeats=1).communicate(timeout=120)
    after = list(qb.Run.read(path))
    assert Counter((row.setting, row.max_new_tokens, row.status) for row in after) == {
        (s, n, "ok"): 1 for s in BOTH for n in (3, 40)}, out + error
    assert all(row.latencies_s[:len(old.latencies_s)] == old.latencies_s for old, row in zip(before, after))


def test_a_child_that_runs_into_its_memory_limit_is_a_row_with_the_bytes_asked_for(tiny_gpt2, tmp_path):
    path = tmp_path / "run.jsonl"
    out, error = start(tiny_gpt2, path, limit=5 * 10**9, batch=12 * 10**5, lengths=[3]).communicate(timeout=200)
    rows = list(qb.Run.read(path))
    assert [row.status for row in rows] == ["out_of_memory"] * 2, out + error
    assert all("bytes" in row.reason for row in rows)
