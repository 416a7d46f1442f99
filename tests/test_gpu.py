"""What only a GPU can show: sizes in order, memory given back, a child that runs out of memory or is killed there."""

import pytest
import torch

import quantbench as qb
from quantbench import machine
from quantbench.quantisers import why_not
from quantbench.why.floors import floor
from tests.conftest import Bar, eldest

pytestmark = [pytest.mark.alone,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: nothing was shown")]
GPU_SETTINGS = [key for key, row in qb.SETTINGS.items()  # a package may be missing, a checkpoint is not quantised itself
                if row.device == "cuda" and row.quantisation != "stored"
                and not (row.offload or why_not(row, machine.facts()))]
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device here: nothing was shown")


@pytest.fixture(scope="module")
def rows() -> dict[str, qb.Measurement]:
    """distilgpt2 under every GPU setting, each with what it left behind after `close`."""
    found = {}
    for setting in GPU_SETTINGS:
        before = torch.cuda.memory_allocated()
        with qb.load("distilgpt2", setting, weights="random") as lm:
            held = lm.held_after_bytes - lm.held_before_bytes
            row = qb.generate(lm, max_new_tokens=128, repeats=3, progress=False)
        found[setting] = row, held, torch.cuda.memory_allocated() - before
    return found


def test_every_setting_is_measured(rows):
    assert {setting: row.status for setting, (row, _, _) in rows.items()} == dict.fromkeys(GPU_SETTINGS, "ok")


def test_the_weights_are_in_order_and_the_ledger_is_the_allocators(rows):
    sizes = [rows[setting][0].weights_bytes for setting in ("gpu-int4", "gpu-int8", "gpu-fp16", "gpu-fp32")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4
    for row, held, _ in rows.values():
        assert row.weights_bytes == pytest.approx(held, rel=0.02)


def test_what_was_held_is_given_back_within_a_mebibyte(rows):
    assert {setting: left for setting, (_, _, left) in rows.items() if abs(left) > 2**20} == {}


def test_fifty_rounds_of_alternating_settings_accumulate_nothing():
    start = None
    for number in range(50):
        with qb.load("distilgpt2", GPU_SETTINGS[number % len(GPU_SETTINGS)], weights="random") as lm:
            lm.model(**lm.encode(qb.PROMPT))
        start = torch.cuda.memory_allocated() if number == 9 else start
    assert torch.cuda.memory_allocated() - start <= 2**20


def test_energy_lies_below_the_limit_and_above_any_idle_gpu(rows):
    for row, _, _ in rows.values():
        watts = sum(row.energy_j) / sum(row.latencies_s)
        assert 30 < watts < row.machine["gpu_power_limit_w"]


def test_a_child_without_memory_is_a_row_and_the_next_one_starts_at_zero():
    """The cache of so many sequences fits, as estimated, and what attention needs beside it does not."""
    prompt, tokens = "word " * 200, 210
    fits = machine.free_bytes("cuda") // (tokens * 2 * 6 * 768 * 2)  # distilgpt2: keys and values of 6 layers
    full = qb.sweep("distilgpt2", "gpu-fp16", 4, prompt=prompt, batch_size=int(0.97 * fits), repeats=1, weights="random",
                    progress=False)
    after = qb.sweep("distilgpt2", "gpu-int8", 4, repeats=1, weights="random", progress=False)
    first, second = [*full, *after]
    assert first.status == "out_of_memory" and "CUDA out of memory" in first.reason
    assert second.status == "ok" and second.held_before_bytes == 0


def test_a_killed_child_is_a_row_and_the_next_one_starts_at_zero():
    bar = Bar(": round 2", lambda: eldest().kill())
    rows = list(qb.sweep("distilgpt2", ["gpu-fp16", "gpu-int4"], 100, repeats=3, weights="random", progress=bar))
    assert [(row.setting, row.status) for row in rows] == [("gpu-fp16", "crashed"), ("gpu-int4", "ok")]
    assert "SIGKILL" in rows[0].reason and rows[1].held_before_bytes == 0 and len(rows[1].rounds) == 3


def test_rounds_are_shared_and_memory_and_energy_are_those_of_one_model_alone(rows):
    found = list(qb.sweep("distilgpt2", ["gpu-fp16", "gpu-int4"], 128, repeats=6, weights="random", progress=False))
    assert found[0].rounds == found[1].rounds and len(found[0].rounds) in (6, 12)  # 12: one stood out
    for row in found:
        alone = rows[row.setting][0]
        assert row.vram_peak_bytes == pytest.approx(alone.vram_peak_bytes, rel=0.02)
        assert row.weights_bytes == alone.weights_bytes and len(row.energy_j) == 6


def test_offloaded_weights_cross_in_every_pass_and_leave_the_text_as_it_is():
    with qb.load("distilgpt2", "gpu-fp16", weights="random") as lm:
        plain = qb.generate(lm, max_new_tokens=16, repeats=3, progress=False)
        ids = lm.model.generate(**lm.encode(qb.PROMPT), min_new_tokens=16, max_new_tokens=16)
    with qb.load("distilgpt2", "gpu-fp16-offload", weights="random") as lm:
        row = qb.generate(lm, max_new_tokens=16, repeats=3, progress=False)
        assert torch.equal(lm.model.generate(**lm.encode(qb.PROMPT), min_new_tokens=16, max_new_tokens=16), ids)
        assert qb.generate(lm, max_new_tokens=4, engine="graph", progress=False).status == "unavailable"
    assert row.status == "ok" and row.weights_bytes == plain.weights_bytes
    assert row.vram_peak_bytes < plain.vram_peak_bytes
    assert row.audit["crossing_bytes"] > row.weights_bytes  # GPT-2's head is its embedding, which crosses twice
    limits = qb.limits("cuda")
    assert limits.bus_bytes_per_s < limits.read_bytes_per_s / 3
    assert floor(row, limits).seconds < row.step_ms / 1000


@TWO
def test_two_gpus_share_the_weights_and_write_what_one_does(tmp_path):
    rows, texts = {}, []
    for setting, gpus in (("gpu-bf16", 1), ("gpu-bf16", 2), ("gpu-int4", 2)):
        with qb.load("gpt2-medium", setting, weights="random", gpus=gpus) as lm:
            row = rows[setting, gpus] = qb.generate(lm, max_new_tokens=16, repeats=3, progress=False)
            texts.append(lm.model.generate(**lm.encode(qb.PROMPT), min_new_tokens=16, max_new_tokens=16).cpu())
            if gpus == 2:
                assert qb.generate(lm, max_new_tokens=4, engine="graph", progress=False).status == "unavailable"
        assert machine.held_bytes("cuda") < 2**20
        if gpus == 2:
            assert sum(row.audit["gpu_bytes"]) == row.weights_bytes and min(row.audit["gpu_bytes"]) > row.weights_bytes / 4
            assert row.gpus == len(row.gpu_busy) == 2 and sum(row.gpu_peak_bytes) >= row.weights_bytes
    assert torch.equal(texts[0], texts[1])
    both = list(qb.sweep("distilgpt2", "gpu-fp16", 8, gpus=[1, 2, 3], weights="random", repeats=2, progress=False))
    assert [(row.gpus, row.status) for row in sorted(both, key=lambda row: row.gpus)] == [
        (1, "ok"), (2, "ok"), (3, "unavailable")]
