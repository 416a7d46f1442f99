"""Samples in rounds: who takes part in them, who is measured again, and what does not fit together."""

import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

import quantbench as qb
from quantbench import machine, timing
from quantbench.loading import LoadedModel
from quantbench.quantisers import why_not
from quantbench.settings import Workload
from quantbench.sweeps import rounds
from quantbench.sweeps.child import Desk
from quantbench.sweeps.plan import plan
from tests.conftest import BOTH, Bar, children, statuses


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
