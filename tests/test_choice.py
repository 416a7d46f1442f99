"""What fits, held against what loading measures; and which setting to take, of synthetic rows with a known best one."""

import contextlib
import math
import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

import quantbench as qb
from conftest import CPU_SETTINGS
from quantbench import inspection
from quantbench.choice.weighing import load_line
from quantbench.choice.fitting import CONTEXT, DEVICES, estimates
from quantbench.records import Measurement
from quantbench.settings import SETTINGS
from quantbench.weights import checkpoint, find

EVERY_CPU = (*CPU_SETTINGS, "cpu-int8-weights", "cpu-int4-weights")
MACHINE = {"gpu": "H100", "cpu": "x"}
SPEEDS = {"gpu-fp16": 100, "gpu-int8": 110, "gpu-int4": 121, "gpu-int4-fp4": 133.1}
MEMORY = {"gpu-fp16": 3.0, "gpu-int8": 2.0, "gpu-int4": 1.5, "gpu-int4-fp4": 1.4}
LARGER = {"gpu-fp16": 1.0, "gpu-int8": 2.0, "gpu-int4": 3.0, "gpu-int4-fp4": 4.0}  # the faster
KEPT = {"gpu-fp16": 1.0, "gpu-int8": 0.996, "gpu-int4": 0.994, "gpu-int4-fp4": 0.95}


def rows(speeds, memory, noise=0.03, rounds=8, weights="pretrained", seed=0, machine=MACHINE):
    """A row per setting, tokens/s about `speeds`, each sample with its own noise."""
    draw = random.Random(seed)
    for key, speed in speeds.items():
        place = "ram_peak_bytes" if key.startswith("cpu") else "vram_peak_bytes"
        yield Measurement(
            model="gpt2", setting=key, max_new_tokens=64, new_tokens=64, prompt_tokens=12, weights=weights,
            latencies_s=[64 / speed * math.exp(draw.gauss(0, noise)) for _ in range(rounds)],
            first_token_s=[0.02 * math.exp(draw.gauss(0, noise)) for _ in range(rounds)],
            rounds=[f"a-{number}" for number in range(rounds)], machine=machine, **{place: int(memory[key] * 1e9)})


def read(key, kept, half=0.0005, machine=MACHINE):
    half *= kept != 1  # the reference's own
    return qb.Quality(model="gpt2", setting=key, weights="pretrained", machine=machine, reference="gpu-fp16",
                      windows=12, tokens=2978, kl_mean=1 - kept, accuracy_kept=kept,
                      accuracy_kept_ci=(kept - half, kept + half))


def measured(speeds, memory, half=0.0005, **how):
    return qb.Run([*rows(speeds, memory, **how), *(read(key, kept, half) for key, kept in KEPT.items())])


# ---- what fits ----

def test_bytes_are_within_3_percent_of_what_loading_measures(tiny):
    found = {one.setting.key: one for one in estimates(tiny)}
    for key in EVERY_CPU:
        with qb.load(tiny, key) as lm:
            audit, one = lm.audit, found[key]
        assert lm.status == "ok" and one.why is None
        assert one.weights == pytest.approx(lm.weights_bytes, rel=0.03)
        assert one.step == pytest.approx(audit["step_bytes"], rel=0.03)
        assert one.cache == inspection.cache_bytes(audit, 1000) == 1000 * audit["kv_bytes_per_token"]
        assert one.left == pytest.approx(lm.weights_bytes - audit["quantised_bytes"], rel=0.05)  # biases stay


def test_fit_says_what_fits_where_and_why_not(tiny_gpt2):
    table, = qb.fit("gpt2", on="T4")
    frame = table.frame.set_index("Setting")
    assert frame.loc["GPU FP16", "Fits"] == "yes" and frame.loc["GPU FP16", "Longest context"] == 1024
    assert frame.loc["GPU FP16", "Decode floor (ms)"] == pytest.approx(1000 * 0.248e9 / 320e9, rel=0.03)
    assert frame.loc["GPU BF16", "Fits"] == "no" and "7.5" in frame.loc["GPU BF16", "Note"]
    assert table._repr_html_().count("opacity") >= 1 and not any(name.startswith("CPU") for name in frame.index)
    small, = qb.fit("gpt2", on=DEVICES["T4"] | {"bytes": CONTEXT + 0.2e9})
    assert [*small.frame["Fits"]][:4] == ["no", "yes", "yes", "no"]
    assert "0.25 GB to load it, 0.20 GB are free" in repr(small)
    limits = qb.Limits(device="cpu", name="x", read_bytes_per_s=1e9, matrix_flops_per_s={}, machine=qb.facts())
    here = qb.fit(tiny_gpt2, run=qb.Run([limits]))[0].frame.set_index("Setting")
    assert here.loc["CPU FP32", "Longest context"] == 64 and here.loc["CPU FP32", "Decode floor (ms)"] > 0
    with pytest.raises(ValueError, match="unknown device 'T5'; did you mean 'T4'"):
        qb.fit("gpt2", on="T5")
    for wrong, said in (({"bytes": 1e9}, "a device is a dict of"), (3, "unknown device 3"), (qb.Run(), "unknown device"),
                        (DEVICES["T4"] | {"bandwidth": 0}, "bandwidth must be above 0"),
                        (DEVICES["T4"] | {"bytes": "16e9"}, "bytes must be above 0"),
                        (DEVICES["T4"] | {"capability": 8}, "a device is a dict of"),
                        (DEVICES["T4"] | {"capability": "8.0"}, "a device is a dict of")):
        with pytest.raises(ValueError, match=said):
            qb.fit("gpt2", on=wrong)
    with pytest.raises(ValueError, match="run must be a qb.Run"):
        qb.fit(tiny_gpt2, run=[limits])


# ---- which to take ----

@pytest.mark.parametrize("memory, limits, best, breaks", [
    (MEMORY, {}, "gpu-int4", {"gpu-int4-fp4"}),  # the fastest keeps too little
    (LARGER, {}, "gpu-int4", {"gpu-int4-fp4"}),
    (MEMORY, {"keep": None}, "gpu-int4-fp4", set()),
    (LARGER, {"keep": None, "vram_gb": 2.5}, "gpu-int8", {"gpu-int4", "gpu-int4-fp4"}),
    (MEMORY, {"vram_gb": 1.45, "keep": 0.9}, "gpu-int4-fp4", {"gpu-fp16", "gpu-int8", "gpu-int4"}),
    (MEMORY, {"keep": 0.999}, "gpu-fp16", {"gpu-int8", "gpu-int4", "gpu-int4-fp4"}),  # keep FP16
    (MEMORY, {"min_tokens_per_s": 110}, "gpu-int4", {"gpu-fp16", "gpu-int4-fp4"}),
    (MEMORY, {"ttft_s": 0.01}, None, set(SPEEDS))])
def test_it_names_the_best_of_noisy_runs_and_none_that_breaks_a_limit(memory, limits, best, breaks):
    given = [qb.choose(measured(SPEEDS, memory, seed=seed), **limits).answer for seed in range(100)]
    assert given.count(best) >= 95 and not {*given} & breaks


def test_a_tie_goes_to_the_smaller_then_to_the_closer():
    same = dict.fromkeys(SPEEDS, 100)
    given = [qb.choose(measured(same, MEMORY, seed=seed)) for seed in range(20)]
    assert [one.answer for one in given].count("gpu-int4") >= 19
    assert any(one.ranked.loc["gpu-int8", "Verdict"] == "tie" and "Tie: " in repr(one.why) for one in given)
    assert qb.choose(measured(same, dict.fromkeys(SPEEDS, 2.0), noise=0.001)).answer == "gpu-fp16"


def test_what_does_not_decide_is_said_and_not_named():
    choice = qb.choose(measured(SPEEDS, MEMORY, 0.02))
    assert choice.answer == "gpu-fp16"
    assert "0.974–1.014 of the accuracy in 2,978 tokens of text, about 74,000 would tell" in repr(choice.why)
    assert choice.ranked.loc["gpu-int4", "Verdict"] == "not decided" and choice.unread == []
    unread = qb.choose(qb.Run(rows(SPEEDS, MEMORY)))
    assert unread.answer == "gpu-fp16" and unread.unread == ["gpu-int4-fp4", "gpu-int4", "gpu-int8"]
    about = qb.choose(qb.Run(rows({"gpu-fp16": 100}, MEMORY)), min_tokens_per_s=100)
    assert about.answer is None and "tokens/s in 8 rounds, " in repr(about.why)
    few = qb.choose(qb.Run(rows(SPEEDS, MEMORY, rounds=4)), keep=None)
    assert few.answer is None and "4 rounds shared with GPU INT4 FP4, 6 would tell" in repr(few)
    noise = qb.choose(qb.Run(rows(SPEEDS, MEMORY, weights="random")))
    assert noise.answer == "gpu-int4-fp4" and "random weights" in noise.why[-1]


def test_more_rounds_tell_what_was_said_to_take_them():
    def open_at(rounds: int) -> int:
        """In how many of 40 runs a setting 2% above the limit is left open."""
        return sum(qb.choose(qb.Run(rows({"gpu-fp16": 102}, MEMORY, 0.06, rounds, seed=seed)),
                             min_tokens_per_s=100).answer is None for seed in range(40))

    said = repr(qb.choose(qb.Run(rows({"gpu-fp16": 102}, MEMORY, 0.06, 10, seed=1)), min_tokens_per_s=100).why)
    assert "would tell" in said and open_at(10) > 20 > open_at(160)
    row, = rows({"gpu-fp16": 100}, MEMORY)
    row = replace(row, latencies_s=[0.63, 0.65] * 4)
    assert "too near" in repr(qb.choose(qb.Run([row]), min_tokens_per_s=sum(row.tokens_per_s_ci) / 2).why)


@pytest.mark.parametrize("once_s, said", [
    (1.0, []), (9.0, ["First answers: GPU INT4 FP4 needs 9.0 s once, 7.0 s more than GPU FP16: made up after about "
                      "2,800 tokens."])])
def test_first_answers_energy_and_money_are_said(once_s, said):
    run = qb.Run(replace(row, load_s=2.0 if row.setting == "gpu-fp16" else once_s, energy_j=[640.0] * 8)
                 for row in rows(SPEEDS, MEMORY, noise=0))
    choice = qb.choose(run, keep=None, price_per_hour=3.6)
    assert [sentence for sentence in choice.why if sentence.startswith("First")] == said
    at = choice.ranked.loc["gpu-fp16"]
    assert at["Energy (J/1,000 tokens)"] == pytest.approx(10_000)
    assert at["Price of a million tokens"] == pytest.approx(3.6 / 3600 * 1e6 / 100)


def test_a_peak_that_rose_by_nothing_is_within_every_limit():
    """As of a tiny model on a CPU, in a process that has room from before."""
    tiny = [replace(row, ram_peak_bytes=0) for row in rows({"cpu-fp32": 100.0}, {"cpu-fp32": 0.0})]
    assert qb.choose(tiny, ram_gb=1, keep=None).answer == "cpu-fp32"


def test_one_model_and_workload_at_a_time_and_mistakes_are_said():
    run = qb.Run(rows(SPEEDS, MEMORY))
    with pytest.raises(ValueError, match="a choice is of one model, not of 2"):
        qb.choose(qb.Run([*run, replace(run[0], model="other")]))
    assert qb.choose([*run], keep=None).answer == qb.choose(run, keep=None).answer
    with pytest.raises(ValueError, match="did you mean 'gpu-int4'"):
        qb.choose(run, settings=["gpu-int44"])
    assert qb.choose(qb.Run()).answer is None and qb.choose(run, batch_size=2).answer is None
    assert "Nothing of this batch size and prompt is measured" in repr(qb.choose(run, batch_size=2))  # there are rows
    assert qb.choose(run, keep=None, settings=["gpu-fp16", "gpu-int8"]).answer == "gpu-int8"
    assert qb.choose(run, keep=None, settings="gpu-int8").answer == "gpu-int8"


@pytest.mark.parametrize("mistake, message", [
    ({"vram_gb": 0}, "vram_gb must be above 0"), ({"vram_gb": "8"}, "vram_gb must be above 0, not '8'"),
    ({"ram_gb": [8]}, "ram_gb"), ({"keep": "x"}, "keep must be above 0 and at most 1"), ({"keep": 99}, "at most 1, not 99"),
    ({"keep": True}, "not True"), ({"ttft_s": float("nan")}, "not nan"), ({"min_tokens_per_s": (1, 2)}, "min_tokens_per_s"),
    ({"price_per_hour": -1}, "price_per_hour"), ({"batch_size": [1, 2]}, "batch_size"), ({"max_new_tokens": [4]}, "max_new"),
    ({"prompt_tokens": "8"}, "prompt_tokens"), ({"settings": []}, "settings must be at least one"),
    ({"settings": "x"}, "unknown setting 'x'"), ({"settings": 3}, "unknown setting 3")])
def test_a_mistake_is_said_before_anything_is_read_or_measured(tiny_gpt2, mistake, message):
    for model_or_run in (qb.Run(), tiny_gpt2):
        with pytest.raises(ValueError, match=message):
            qb.choose(model_or_run, **mistake)


def test_quality_is_read_from_the_fastest_on_until_it_cannot_matter(monkeypatch):
    kept = {"cpu-fp32": 1.0, "cpu-int4": 0.9, "cpu-int8": 0.995}
    speeds, asked = {"cpu-fp32": 100, "cpu-int4": 200, "cpu-int8": 150, "cpu-int8-dynamic": 50}, []
    run = qb.Run([row for machine in (qb.facts(), {"cpu": "another"})  # whose rows are left out
                  for row in rows(speeds, dict.fromkeys(speeds, 1.0), machine=machine)])
    for name, stub in {"sweep": lambda *_, **__: [], "load": lambda name, key: contextlib.nullcontext(key),
                       "reference": lambda key: SimpleNamespace(quality=read(key, 1.0, machine=qb.facts())),
                       "quality": lambda key, _: asked.append(key) or read(key, kept[key], machine=qb.facts())}.items():
        monkeypatch.setattr(qb, name, stub, raising=False)
    assert qb.choose("gpt2", run=run).answer == "cpu-int8" and asked == ["cpu-int4", "cpu-int8"]
    assert qb.choose("gpt2", run=run, keep=0.8).answer == "cpu-int4" and len(asked) == 2  # nothing is read twice


@pytest.mark.parametrize("change, limits, said", [
    ({"setting": "gpu-gguf", "vram_peak_bytes": None}, {"vram_gb": 0.01}, "unknown GB of VRAM"),
    ({"setting": "gpu-fp16-offload", "weights_bytes": 10**9}, {"ram_gb": 0.5}, "1.000 GB of RAM"),
    ({"setting": "gpu-fp16-offload", "weights_bytes": 10**9, "vram_peak_bytes": 10**8}, {"ram_gb": 2, "vram_gb": 4}, None)])
def test_memory_is_held_against_the_limit_of_where_it_is(change, limits, said):
    base, row = rows({"gpu-fp16": 100, "gpu-int4-fp4": 133}, MEMORY)
    choice = qb.choose([base, replace(row, **change)], keep=None, **limits)
    assert choice.answer == (change["setting"] if said is None else "gpu-fp16" if "ram_gb" in limits else None)
    assert said is None or said in choice.ranked.loc[change["setting"], "Why"]


@pytest.mark.parametrize("limits, said", [
    ({"ttft_s": 1}, "s to the first token, in 4 rounds too few to tell"), ({"ttft_s": 1e-4}, "too few to tell"),
    ({"min_tokens_per_s": 5}, "tokens/s, in 4 rounds too few to tell")])
def test_too_few_samples_for_an_interval_meet_no_limit_and_break_none(limits, said):
    choice = qb.choose(qb.Run(rows({"gpu-fp16": 100}, MEMORY, rounds=4)), **limits)
    assert choice.answer is None and said in repr(choice.why) and choice.ranked.loc["gpu-fp16", "Verdict"] == "not decided"


def test_qualities_are_of_one_text_and_reference_and_what_failed_is_out():
    run = measured(SPEEDS, MEMORY)
    other = replace(read("gpu-int4-fp4", 1.1), text_sha256="another text")  # the later one, of this setting alone
    assert qb.choose(qb.Run([*run, *run.qualities, other])).answer == "gpu-int4"
    wrong = replace(read("gpu-int4", 0.994), status="failed", reason="logits are not finite", accuracy_kept=None,
                    accuracy_kept_ci=None)
    failed = qb.choose(qb.Run([*run, *run.qualities, wrong]))
    assert failed.answer == "gpu-int8" and "quality failed: logits are not finite" in failed.ranked.loc["gpu-int4", "Why"]
    untold = qb.choose(qb.Run([*run, *run.qualities, replace(wrong, status="out_of_memory", reason="9 GB")]))
    assert untold.answer == "gpu-int8" and untold.ranked.loc["gpu-int4", "Verdict"] == "not decided"
    assert untold.unread == []


def test_what_shares_no_rounds_with_the_answer_is_no_tie():
    """The answer is the smaller of two that tie; the third was in rounds with the faster of them alone."""
    fast, small, third = rows({"gpu-fp16": 100, "gpu-int4": 99.9, "gpu-int8": 99.8}, MEMORY, noise=0.002, rounds=12)
    half = {name: getattr(small, name)[:6] for name in ("latencies_s", "first_token_s", "rounds")}
    late = {name: getattr(third, name)[6:] for name in ("latencies_s", "first_token_s", "rounds")}
    choice = qb.choose([fast, replace(small, **half), replace(third, **late)], keep=None)
    assert choice.answer == "gpu-int4"
    assert choice.ranked.loc["gpu-int8", "Verdict"] == "not decided"
    assert choice.ranked.loc["gpu-int8", "Why"] == "0 rounds shared with GPU INT4, 6 would tell"


def test_three_of_a_kind_are_named_and_the_others_counted():
    speeds = dict.fromkeys([key for key, one in SETTINGS.items() if one.device == "cuda"], 10) | {"gpu-fp16": 100}
    slow = next(line for line in qb.choose(qb.Run(rows(speeds, dict.fromkeys(speeds, 1.0))), keep=None).why
                if line.startswith("Slower: "))
    assert slow.count("GPU ") == 2 * 3 and slow.endswith(f"{len(speeds) - 4} more, in the table.")


def test_of_real_and_random_weights_of_a_model_the_real_ones_are_judged():
    real, random_ = measured(SPEEDS, MEMORY), [*rows(SPEEDS, MEMORY, weights="random", seed=1)]
    both = qb.choose(qb.Run([*random_, *real, *real.qualities]))
    assert both.answer == "gpu-int4" and "random" not in repr(both) and len(both.ranked) == len(SPEEDS)


@pytest.mark.parametrize("change, line", [
    ({"gpus": 2}, "lm = qb.load('m/m', 'gpu-fp16', 'pretrained', gpus=2)"),
    ({"setting": "gpu-fp16-offload"}, "lm = qb.load('m/m', 'gpu-fp16-offload', 'pretrained')"),
    ({"setting": "cpu-gguf", "model": "~/x.gguf"}, "lm = qb.load('~/x.gguf', 'cpu-gguf', 'pretrained')"),
    ({"model": "./x.gguf"}, "lm = qb.load('./x.gguf', 'gpu-fp16', 'pretrained')"),
    ({"setting": "cpu-bf16", "engine": "graph", "weights": "random"},
     "lm = qb.load('m/m', 'cpu-bf16', 'random')\n# measured by qb.generate(..., engine='graph')"),
    ({"setting": "gpu-int3"}, "# gpu-int3 is a setting of another quantbench")])
def test_what_transformers_alone_does_not_load_is_loaded_by_quantbench(change, line):
    asked = {"model": "m/m", "setting": "gpu-fp16", "max_new_tokens": 4, "weights": "pretrained"} | change
    assert load_line(Measurement(**asked)) == line


def test_transformers_is_given_a_folder_that_it_finds(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert "from_pretrained(\n    '/home/me/m'," in load_line(
        Measurement(model="~/m", setting="gpu-fp16", max_new_tokens=4, weights="pretrained"))


def test_half_of_the_published_grid_gives_its_answer():
    """Eager alone is what `choose` measures where it is not asked for more."""
    file, = (path for path in qb.shipped() if path.stem.startswith("amd-epyc"))
    every = qb.Run.read(file).only(model="smollm2-135m")
    grid = [row for row in every if row.setting.startswith("cpu")]
    half = [row for row in grid if row.engine == "eager"]
    assert 2 * len(half) <= len(grid) == 14
    assert qb.choose(every).answer == qb.choose(qb.Run([*half, *every.qualities])).answer == "cpu-int4-weights"


def test_a_model_is_measured_once_and_loads_as_it_was_audited(tiny_gpt2, monkeypatch):
    monkeypatch.setattr(qb, "sweep", partial(qb.sweep, executor="inline", repeats=6, progress=False), raising=False)
    folder, run = str(checkpoint(find(tiny_gpt2))), qb.Run()
    asked = {"max_new_tokens": 3, "settings": ["cpu-fp32", "cpu-int4", "gpu-int4"], "run": run}
    choice = qb.choose(folder, **asked)
    assert len(run) == 2 and "no NVIDIA GPU" in choice.ranked.loc["gpu-int4", "Why"]
    assert "Quality cannot be told" in choice.why[-1] or not choice.unread  # it has no tokenizer
    before = [*run]
    assert qb.choose(folder, **asked).answer == choice.answer and [*run] == before
    row, told = next(row for row in run if row.setting == "cpu-int4"), {}
    exec(load_line(row), told)
    loaded = inspection.audit(told["model"])
    assert (loaded["details"], loaded["bytes"]) == (row.audit["details"], row.audit["bytes"])
    qb.choose(folder, **asked, engine=["eager", "graph"])
    graphs = [row for row in run if row.engine == "graph"]
    alone = qb.choose(graphs, keep=None)
    assert alone.answer in (None, "cpu-fp32", "cpu-int4") and ("take CPU INT4" in alone.why[0]) == (alone.answer == "cpu-int4")
    assert len(run) == 4 and {row.setting for row in graphs} == {"cpu-fp32", "cpu-int4"}
    assert load_line(graphs[0]).endswith("engine='graph')") and "#" not in load_line(row)
    assert qb.choose(folder, ram_gb=1e-6, max_new_tokens=3, settings=["cpu-int4"], run=run).answer is None
