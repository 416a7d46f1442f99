"""The 13 settings, and what a machine with given facts can run."""

import pytest

from quantbench.settings import PUBLISHED, SETTINGS, find_setting, more_settings, unavailable_reason

T4 = {"gpu": "Tesla T4", "gpu_capability": [7, 5], "dynamic_int8": True}
A100 = T4 | {"gpu": "A100", "gpu_capability": [8, 0]}
NO_GPU = {"dynamic_int8": True}
GPU = [row for row in SETTINGS.values() if row.device == "cuda"]


def test_the_keys_are_fixed_and_the_published_come_first():
    assert list(SETTINGS) == [
        "cpu-fp32", "gpu-fp16", "gpu-int8", "gpu-int4", "gpu-fp32", "gpu-bf16", "gpu-int8-nosplit", "gpu-int4-dq",
        "gpu-int4-fp4", "cpu-bf16", "cpu-int8", "cpu-int4", "cpu-int8-dynamic"]
    assert PUBLISHED == ("cpu-fp32", "gpu-fp16", "gpu-int8", "gpu-int4")


def test_a_t4_gets_float16_everywhere_and_no_bfloat16():
    assert [row.key for row in GPU if unavailable_reason(row, T4)] == ["gpu-bf16"]
    assert "7.5 only emulates bfloat16" in unavailable_reason(SETTINGS["gpu-bf16"], T4)
    assert {row.dtype for row in GPU if not unavailable_reason(row, T4)} == {"float16", "float32"}
    assert [row.key for row in GPU if row.dtype == "float32"] == ["gpu-fp32"]


def test_capability_8_runs_everything():
    assert not any(unavailable_reason(row, A100) for row in SETTINGS.values())


def test_without_a_gpu_the_cpu_settings_remain():
    assert {key for key, row in SETTINGS.items() if not unavailable_reason(row, NO_GPU)} == {
        "cpu-fp32", *more_settings(NO_GPU)}
    assert more_settings(T4) == ()


def test_without_bitsandbytes_its_settings_say_how_to_get_it():
    reasons = {key: unavailable_reason(row, T4, bitsandbytes=False) for key, row in SETTINGS.items()}
    assert {key for key, reason in reasons.items() if reason and "pip install bitsandbytes" in reason} == {
        key for key, row in SETTINGS.items() if row.quantisation.startswith("bnb-")}


def test_without_a_quantised_engine_dynamic_int8_is_unavailable():
    assert "no quantised engine" in unavailable_reason(SETTINGS["cpu-int8-dynamic"], {"dynamic_int8": False})


@pytest.mark.parametrize("gpu, cpu", [("gpu-int8", "cpu-int8"), ("gpu-int4", "cpu-int4"), ("gpu-fp32", "cpu-fp32")])
def test_twins_store_the_same_bytes(gpu, cpu):
    assert SETTINGS[gpu].storage == SETTINGS[cpu].storage


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(ValueError, match="unknown setting 'gpu-int-4'; did you mean .*'gpu-int4'"):
        find_setting("gpu-int-4")


def test_the_settings_show_themselves_as_a_table_and_as_lines():
    page, text = SETTINGS._repr_html_(), repr(SETTINGS)
    assert page.count("<tr>") == len(SETTINGS) + 1 and len(text.splitlines()) == len(SETTINGS)
    assert all(key in page and key in text for key in SETTINGS)
