"""The settings and their quantisers, what a machine with given facts can run, and a workload that cannot."""

import importlib.util
import math
import subprocess
import sys

import numpy
import pandas
import pytest

import quantbench as qb
from quantbench.quantisers import QUANTISERS, find_quantiser, why_not
from quantbench.settings import EXPERIMENT, SETTINGS, Workload, find_setting, more_settings, on_gpus
from quantbench.weights import check_name

T4 = {"gpu": "Tesla T4", "gpu_capability": [7, 5], "dynamic_int8": True}
A100 = T4 | {"gpu": "A100", "gpu_capability": [8, 0]}
NO_GPU = {"dynamic_int8": True}
GPU = [row for row in SETTINGS.values() if row.device == "cuda"]


def test_the_keys_are_fixed_and_the_published_come_first():
    assert list(SETTINGS) == [
        "cpu-fp32", "gpu-fp16", "gpu-int8", "gpu-int4", "gpu-fp32", "gpu-bf16", "gpu-fp16-offload", "gpu-int8-nosplit", "gpu-int4-dq",
        "gpu-int4-fp4", "cpu-bf16", "cpu-int8", "cpu-int4", "cpu-int8-dynamic", "cpu-int8-weights",
        "cpu-int4-weights", "gpu-int8-torchao", "gpu-int4-torchao", "gpu-int4-torchao-g64", "gpu-fp8-torchao",
        "cpu-gguf", "gpu-gguf", "gpu-stored", "cpu-stored"]
    assert EXPERIMENT == ("cpu-fp32", "gpu-fp16", "gpu-int8", "gpu-int4")


def test_a_t4_gets_float16_everywhere_and_no_bfloat16():
    refused = {row.key for row in GPU if why_not(row, T4)} - {"gpu-gguf"}  # llama.cpp may not be installed
    assert refused == {row.key for row in GPU if row.dtype == "bfloat16"}
    assert "7.5 only emulates bfloat16" in why_not(SETTINGS["gpu-bf16"], T4)
    assert {row.dtype for row in GPU if row.key not in refused} == {"float16", "float32", "auto"}
    assert [row.key for row in GPU if row.dtype == "float32"] == ["gpu-fp32", "gpu-gguf"]


def test_capability_8_runs_everything():
    assert not any(why_not(row, A100) for row in SETTINGS.values() if not {"torchao", "gguf"} & {*row.key.split("-")})


def test_without_a_gpu_the_cpu_settings_remain():
    assert {key for key, row in SETTINGS.items() if not why_not(row, NO_GPU)} - {"cpu-gguf"} == {
        "cpu-fp32", "cpu-stored", *more_settings(NO_GPU)}
    assert more_settings(T4) == ()


def test_several_gpus_are_a_setting_of_its_own_where_there_are_so_many():
    two = A100 | {"gpu_count": 2}
    assert on_gpus(SETTINGS["gpu-fp16"], "all", two).gpus == 2 and on_gpus(SETTINGS["cpu-fp32"], "all", two).gpus == 1
    assert not why_not(on_gpus(SETTINGS["gpu-int4"], 2, two), two)
    assert "3 GPUs are asked for, and 2" in why_not(on_gpus(SETTINGS["gpu-fp16"], 3, two), two)
    assert "on one GPU only" in why_not(on_gpus(SETTINGS["gpu-int4-torchao"], 2, two), two)
    for key, gpus in (("cpu-fp32", 2), ("gpu-fp16-offload", 2), ("gpu-fp16", 0), ("gpu-fp16", "two"), ("gpu-fp16", True)):
        with pytest.raises(ValueError, match="runs on no 2 GPUs|gpus must be"):
            on_gpus(SETTINGS[key], gpus, two)


def test_without_bitsandbytes_its_settings_say_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reasons = {key: why_not(row, T4) for key, row in SETTINGS.items()}
    assert {key for key, reason in reasons.items() if reason and "pip install bitsandbytes" in reason} == {
        key for key, row in SETTINGS.items() if row.quantisation.startswith("bnb-")}


def test_without_a_quantised_engine_dynamic_int8_is_unavailable():
    assert "no quantised engine" in why_not(SETTINGS["cpu-int8-dynamic"], {"dynamic_int8": False})


@pytest.mark.parametrize("gpu, cpu", [("gpu-int8", "cpu-int8"), ("gpu-int4", "cpu-int4"), ("gpu-fp32", "cpu-fp32")])
def test_twins_store_the_same_bytes(gpu, cpu):
    stored = [(row.quantisation, row.dtype == "float32", row.double_quant) for row in (SETTINGS[gpu], SETTINGS[cpu])]
    assert stored[0] == stored[1]


def test_what_is_quantised_is_all_but_the_plain_dtypes():
    """A checkpoint as it is stored is one of them: it is nobody's unquantised baseline."""
    assert {key for key, row in SETTINGS.items() if not row.quantised} == {
        "cpu-fp32", "gpu-fp32", "gpu-fp16", "gpu-bf16", "gpu-fp16-offload", "cpu-bf16"}


def test_every_setting_has_a_quantiser_and_a_family_of_colours_without_torch():
    assert {row.quantisation for row in SETTINGS.values()} == set(QUANTISERS)
    code = ("import sys; from quantbench.quantisers import QUANTISERS; from quantbench.settings import SETTINGS\n"
            "print(*sorted({QUANTISERS[row.quantisation].family(row) for row in SETTINGS.values()}))\n"
            "assert 'torch' not in sys.modules")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["16", "fp32", "int4", "int8"]


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(ValueError, match="unknown setting 'gpu-int-4'; did you mean .*'gpu-int4'"):
        find_setting("gpu-int-4")
    with pytest.raises(ValueError, match="unknown quantiser 'bnb-nf5'; did you mean 'bnb-nf4'"):
        find_quantiser("bnb-nf5")


@pytest.mark.parametrize("bad, message", [
    ({"prompt": " "}, "prompt is empty"), ({"max_new_tokens": 0}, "at least 1"), ({"batch_size": True}, "batch_size"),
    ({"repeats": 0}, "repeats"), ({"budget_s": -1}, "budget_s"), ({"max_new_tokens": "9"}, "whole number"),
    ({"prompt": None}, "at least one word"), ({"batch_size": 1.0}, "batch_size must be a whole number .* not 1.0"),
    ({"max_new_tokens": None}, "max_new_tokens"), ({"budget_s": "30"}, "above 0, not '30'"),
    ({"repeats": 10_001}, "repeats must be .* at most 10,000, not 10001"), ({"prompt": "a" * 1_000_001}, "over 1,000,000 ch"),
    ({"budget_s": math.nan}, "not nan"), ({"budget_s": None}, "not None"), ({"budget_s": True}, "not True")])
def test_a_workload_that_cannot_run_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Workload(**bad)


def test_arrays_are_several_and_a_folders_name_ends_in_no_slash(tiny_gpt2):
    for kind in (numpy.array, pandas.Series, iter):
        qb.sweep(kind([tiny_gpt2]), kind(["cpu-fp32", "cpu-int4"]), kind([3, 5]))
    assert check_name(tiny_gpt2 + "/") == tiny_gpt2


def test_numpys_integers_are_whole_numbers():
    work = Workload(max_new_tokens=numpy.int64(5), batch_size=numpy.int32(2))
    assert (work.max_new_tokens, work.batch_size) == (5, 2) and type(work.max_new_tokens) is int
