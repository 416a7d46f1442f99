"""Samples in rounds, and nothing takes a sweep down: children are killed, hung, starved; parents are killed and resumed.
All for real."""

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
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

import quantbench as qb
from quantbench import machine, timing
from quantbench.loading import LoadedModel
from quantbench.quantisers import why_not
from quantbench.settings import Workload
from quantbench.sweeps import rounds, workers
from quantbench.sweeps.child import Desk
from quantbench.sweeps.plan import plan
from tests.conftest import TINY, Bar, children, eldest

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


def test_all_settings_are_those_that_this_machine_can_run(tiny_llama):
    here = {cell.setting.key for cell in plan(tiny_llama, "all", "eager", [Workload(max_new_tokens=2)], None)}
    assert here == {key for key, row in qb.SETTINGS.items() if not why_not(row, qb.facts())} - {"cpu-gguf", "gpu-gguf", "cpu-stored", "gpu-stored"}
    assert "cpu-fp32" in here


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


@pytest.fixture
def loaded(monkeypatch):
    """The models that are in memory, or on their way there."""
    every, real = weakref.WeakSet(), LoadedModel.__init__

    def init(self, *args) -> None:
        real(self, *args)
        every.add(self)

    monkeypatch.setattr(LoadedModel, "__init__", init)
    return lambda: [one for one in every if one.status == "ok"]


def test_what_runs_out_of_memory_beside_others_is_measured_in_turn_with_the_baseline(tiny_llama, loaded, monkeypatch, capsys):
    monkeypatch.setattr(machine, "free_bytes", lambda device, gpus=1: 10 if len(loaded()) > 2 else 10**12)  # room for two
    three, run = ["cpu-fp32", "cpu-bf16", "cpu-int8-weights"], qb.Run()
    rows = list(qb.sweep(tiny_llama, three, [3, 4], repeats=2, executor="inline", run=run, progress=False))
    assert [row.setting for row in rows] == [three[1], three[0], three[2]] * 2  # the baseline when it was beside both
    assert {row.status for row in rows} == {"ok"} and len(run) == 6
    for short in (run.only(max_new_tokens=3), run.only(max_new_tokens=4)):
        near, base, late = short
        assert len(base.rounds) == 4 and {*base.rounds} == {*near.rounds, *late.rounds}
    assert capsys.readouterr().out.count("2 models do not fit in memory together; they are loaded in turn") == 2


def crowd(monkeypatch, loaded, *settings):
    """These run out of memory in a round where more than two models are loaded."""
    def sample(self, name):
        if self.lm.setting.key in settings and len(loaded()) > 2:
            raise MemoryError
        return real(self, name)

    real = timing.Timed._sample
    monkeypatch.setattr(timing.Timed, "_sample", sample)


def test_a_baseline_that_runs_out_of_memory_beside_others_is_measured_in_turn_with_them(tiny_llama, loaded, monkeypatch):
    crowd(monkeypatch, loaded, "cpu-fp32")
    three = ["cpu-fp32", "cpu-bf16", "cpu-int8-weights"]
    rows = list(qb.sweep(tiny_llama, three, 3, repeats=2, executor="inline", progress=False))
    assert statuses(rows) == dict.fromkeys(three, "ok")
    assert [*qb.ratios(rows)["Rounds"]] == [2, 2]  # else all that was measured is compared with nothing


@pytest.mark.parametrize("crowded", ["cpu-fp32", "cpu-int8-weights"])
def test_what_was_measured_before_others_ran_out_of_memory_outlives_a_stop(tiny_llama, loaded, monkeypatch, crowded):
    crowd(monkeypatch, loaded, crowded)
    three, stop = ["cpu-fp32", "cpu-bf16", "cpu-int8-weights"], threading.Event()
    in_turn = rounds.Rounds._in_turn
    monkeypatch.setattr(rounds.Rounds, "_in_turn", lambda *asked: stop.set() or in_turn(*asked))
    rows = list(qb.sweep(tiny_llama, three, 3, repeats=2, executor="inline", progress=False, stop=stop))
    assert statuses(rows) == dict.fromkeys({*three} - {crowded}, "ok")


def test_what_does_not_fit_alone_either_keeps_nobody_loading(tiny_llama, monkeypatch):
    real, loads = timing.Timed._sample, []

    def sample(self, name):
        loads.append(self.lm.setting.key)
        if self.lm.setting.key == "cpu-int4":
            raise MemoryError
        return real(self, name)

    monkeypatch.setattr(timing.Timed, "_sample", sample)
    rows = list(qb.sweep(tiny_llama, BOTH, 3, repeats=4, executor="inline", progress=False))
    assert statuses(rows) == {"cpu-fp32": "ok", "cpu-int4": "out_of_memory"}
    assert loads.count("cpu-int4") == 2 and loads.count("cpu-fp32") <= 4 + 1  # not in each of 4 more rounds


def test_a_second_sweep_with_more_repeats_goes_on_and_one_with_a_trace_measures_it(tiny_gpt2, tmp_path):
    run, how = qb.Run.open(tmp_path / "run.jsonl"), {"executor": "inline", "progress": False}
    first = list(qb.sweep(tiny_gpt2, BOTH, 3, repeats=2, run=run, **how))
    assert list(qb.sweep(tiny_gpt2, BOTH, 3, repeats=2, run=run, **how)) == []
    list(qb.sweep(tiny_gpt2, BOTH, 3, repeats=4, run=run, trace=True, **how))
    one, other = qb.Run.read(run.path)
    assert len(one.rounds) == 4 and one.rounds[:2] == first[0].rounds and set(one.rounds) == set(other.rounds)
    assert len(one.latencies_s) == len(one.rounds) and one.trace["step"]["calls"] == 2 and first[0].trace is None
    assert one.latencies_s[:2] == first[0].latencies_s


def test_a_setting_that_is_added_later_is_compared_with_the_baseline_of_the_run(tiny_gpt2):
    run = qb.Run()
    for setting in ("cpu-fp32", "cpu-int4", "cpu-bf16"):
        list(qb.sweep(tiny_gpt2, setting, 3, repeats=6, run=run, executor="inline", progress=False))
    assert [len(row.rounds) for row in run] == [18, 6, 6]
    assert list(qb.ratios(run)["Rounds"]) == [6, 6] and "not compared" not in set(qb.ratios(run)["Verdict"])


def test_good_samples_do_not_give_way_to_a_failure_and_a_failed_cell_is_skipped_unless_it_is_retried(tiny_gpt2, monkeypatch):
    def swept(run: qb.Run, **how) -> list[qb.Measurement]:
        return list(qb.sweep(tiny_gpt2, "cpu-fp32", 3, run=run, executor="inline", progress=False, **how))

    run, other = qb.Run(), qb.Run()
    [good] = swept(run, repeats=2)
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "Desk", Broken)
        [row] = swept(run, repeats=4)
        assert (row.status, row.latencies_s, row.reason) == ("ok", good.latencies_s, "later crashed: loading: gone")
        assert list(run) == [row] and [row.status for row in swept(other, repeats=2)] == ["crashed"]
    assert swept(other, repeats=2) == [] and swept(other, repeats=2, retry=True)[0].status == "ok" and len(other) == 1


class Broken(Desk):
    def ask(self, *asked, timeout_s):
        raise rounds.ChildDied("gone")


class Slow(Desk):
    """A desk whose process is a hundred times slower, where it is the first that INT4 gets."""

    first = True

    def prepare(self, cell):
        self.times = 100 if cell.setting.key == "cpu-int4" and Slow.first else 1
        Slow.first &= self.times == 1
        return super().prepare(cell)

    def sample(self, name):
        super().sample(name)
        self.timed.samples["latencies_s"][-1] = self.times / 100  # this machine may be as noisy as it likes
        return 100 / self.times


def test_a_process_that_stands_out_is_measured_again_and_both_are_kept(tiny_gpt2, monkeypatch):
    monkeypatch.setattr(rounds, "Child", lambda stop, needs_cuda: Slow())
    rows = {row.setting: row for row in qb.sweep(tiny_gpt2, [*BOTH, "cpu-bf16"], 3, repeats=6, progress=False)}
    assert {key: len(row.rounds) for key, row in rows.items()} == {"cpu-fp32": 12, "cpu-int4": 12, "cpu-bf16": 6}
    assert rows["cpu-fp32"].rounds == rows["cpu-int4"].rounds and rows["cpu-fp32"].reason is None
    assert "stood out" in rows["cpu-int4"].reason
    assert min(rows["cpu-int4"].latencies_s[:6]) > 5 * max(rows["cpu-int4"].latencies_s[6:])


def test_rounds_beyond_what_a_row_takes_leave_the_last():
    """A second process, or a run that goes on, adds to what may be all that was asked for."""
    many = {name: [1.0] * 9_999 for name in ("latencies_s", "first_token_s", "sampled_at", "energy_j")}
    row = qb.Measurement(model="gpt2", setting="cpu-fp32", max_new_tokens=2, rounds=[*map(str, range(9_999))], **many)
    both = rounds.joined(row, replace(row, rounds=[f"later-{name}" for name in row.rounds]))
    assert (len(both.latencies_s), len(both.energy_j), both.rounds[0]) == (10_000, 10_000, "9998")


class Noisy(Desk):
    """A desk whose machine disturbs every process in eager, and no captured one."""

    def sample(self, name):
        super().sample(name)
        return 100.0 * (1 + 2 * (int(name.split("-")[-1]) % 2) * (self.cell.engine == "eager"))


def test_where_most_processes_of_an_engine_spread_widely_it_is_the_machine(tiny_gpt2, monkeypatch):
    monkeypatch.setattr(rounds, "Child", lambda stop, needs_cuda: Noisy())
    rows = qb.sweep(tiny_gpt2, [*BOTH, "cpu-bf16"], 3, engine=["eager", "graph"], repeats=6, progress=False)
    assert [(len(row.rounds), "stood out" in (row.reason or "")) for row in rows] == [(6, False)] * 6


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
