"""Ways of quantising in a room of their own: what is quantised is proved, what cannot run is a reason in a row."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import quantbench as qb
from quantbench import quantisers
from quantbench.inspection import on_meta, weights_estimate
from quantbench.methods import cpu_packed, torchao
from quantbench.methods.packed import Int4Groups, Int8Rows
from quantbench.settings import SETTINGS, Setting
from tests.conftest import TINY

GPU = {"gpu": "a GPU", "gpu_capability": [9, 0]}
TORCHAO = [key for key, row in SETTINGS.items() if row.quantisation.startswith("torchao-")]


# ---- CPU ----

@pytest.mark.parametrize("setting, details, heads", [
    ("cpu-int8-weights", {"storage_dtype": "int8", "compute_dtype": "bfloat16", "per": "row"}, 1),
    ("cpu-int4-weights", {"storage_dtype": "int4", "compute_dtype": "bfloat16", "group": 32}, 0)])
def test_weights_alone_are_quantised_and_audited(tiny, setting, details, heads):
    layers = 8 if "gpt2" in tiny else 14
    with qb.load(tiny, setting) as lm, qb.load(tiny, "cpu-fp32") as plain:
        assert (lm.audit["quantised"], lm.audit["left"]) == (layers + heads, {}) and lm.audit["details"] == details
        assert lm.audit["class"] == ("Int8Rows" if heads else "Int4Groups")
        assert weights_estimate(on_meta(lm.model.config), lm.setting) == pytest.approx(lm.weights_bytes, rel=0.001)
        assert lm.audit["step_products"] == plain.audit["step_products"]
        assert lm.weights_bytes < 0.7 * plain.weights_bytes
        for engine in ("eager", "graph"):
            row = qb.generate(lm, max_new_tokens=8, repeats=1, engine=engine, progress=False)
            assert row.status == "ok", row.reason


@pytest.mark.parametrize("packed, least", [(Int8Rows, 38), (lambda one: Int4Groups(one, 32), 18)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_computes_what_the_layer_did(packed, least, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(96, 48).requires_grad_(False)
    x = torch.randn(2, 40, 96)
    with torch.no_grad():
        layer, right = packed(linear.to(dtype)), linear(x.to(dtype)).float()
        all_at_once = layer(x.to(dtype))
        one_by_one = torch.stack([layer(row[:, None]) for row in x.to(dtype).unbind(1)], 1)[:, :, 0]
    assert all_at_once.shape == right.shape and all_at_once.dtype == dtype
    torch.testing.assert_close(one_by_one, all_at_once, rtol=0.02, atol=0.02)
    noise = (all_at_once.float() - right).norm() / right.norm()
    assert -20 * noise.log10() > least  # decibels: 6 for a bit


def test_a_row_of_zeros_stays_zero():
    linear = nn.Linear(64, 16, bias=False).requires_grad_(False)
    linear.weight[3] = 0
    for layer in (Int8Rows(linear), Int4Groups(linear, 32)):
        assert layer(torch.ones(1, 64))[0, 3] == 0


def test_what_was_left_is_refused(tiny_gpt2, tiny_llama, monkeypatch):
    monkeypatch.setitem(SETTINGS, "left", Setting("left", "Conv1D left", "cpu", "float32", "packed-int4"))
    with pytest.raises(qb.AuditError, match="no module was quantised .*8 Conv1D"):
        qb.load(tiny_gpt2, "left")
    monkeypatch.setitem(SETTINGS, "left", Setting("left", "Conv1D left", "cpu", "float32", "packed-int8"))
    with pytest.raises(qb.AuditError, match="1 modules were quantised, but 8 Conv1D were left"):
        qb.load(tiny_gpt2, "left")
    monkeypatch.setattr(cpu_packed.GroupInt4, "group", 128)  # which its inputs of 64 are no multiple of
    with pytest.raises(qb.AuditError, match="2 modules were quantised, but 12 Linear were left: it takes Linear with a multiple of 32"):
        qb.load(tiny_llama, "cpu-int4-weights")
    monkeypatch.setattr(cpu_packed.GroupInt4, "group", 256)  # of which none is a multiple
    with pytest.raises(qb.AuditError, match=r"no module was quantised \(left .* 14 Linear\): it takes Linear with a multiple"):
        qb.load(tiny_llama, "cpu-int4-weights")


def test_rows_that_the_int8_kernel_would_read_past_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY["llama"] | {"intermediate_size": 100}))
    with pytest.raises(qb.AuditError, match="13 modules were quantised, but 2 Linear were left: it takes Linear with a multiple of 16"):
        qb.load(tmp_path, "cpu-int8-weights")


# ---- torchao ----

def test_importing_and_drawing_import_none_of_them():
    alone("import sys, quantbench as qb\n"
          "from quantbench.charts import colour_of\n"
          "assert {qb.QUANTISERS[row.quantisation].family(row) for row in qb.SETTINGS.values()} >= {'int8', 'int4'}\n"
          "assert [colour_of(key) for key in qb.SETTINGS]\n"
          "assert not {'torch', 'torchao', 'transformers'} & set(sys.modules)")


@pytest.mark.parametrize("code, reason", [
    ("raise ImportError('torch 2.6 is too\\nold for it')", "does not work here (torch 2.6 is too old"),
    ("raise OSError('libcuda.so.1: no such file')", "does not work here (libcuda.so.1"),
    ("from torch import no_such_name", "does not work here (cannot import name"),
    ("__version__ = '0.10.0'", "does not work here (cannot import name"),
    (None, "torchao is not installed")])
def test_a_broken_torchao_is_a_reason(tmp_path, code, reason):
    if code is not None:
        (tmp_path / "torchao").mkdir()
        (tmp_path / "torchao/__init__.py").write_text("")
        (tmp_path / "torchao/quantization.py").write_text(code)
    elif torchao_is_here():
        pytest.skip("torchao is installed")
    told = alone(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
                 "from quantbench import quantisers, settings\n"
                 f"for key in {TORCHAO}:\n"
                 f"    print(quantisers.why_not(settings.SETTINGS[key], {GPU}))").splitlines()
    assert len(told) == 4 and all(reason in line and "pip install quantbench[torchao]" in line for line in told), told


def test_older_cards_are_told_so():
    for key in TORCHAO:
        for capability in ([7, 5], [8, 6]):
            why = quantisers.why_not(SETTINGS[key], GPU | {"gpu_capability": capability})
            assert (why or "").startswith("compute capability") == (capability == [7, 5] or "fp8" in key), why


def test_tiles_of_int4_are_padded():
    """768 inputs take the room of 1,024."""
    assert torchao.INT4.matrix_bytes(2304 * 768, 2304, None) == 2304 * 512 + 2304 * 8 * 4
    assert torchao.INT4.matrix_bytes(4096 * 11008, 4096, None) == 4096 * 11264 // 2 + 4096 * 88 * 4


def test_torchaos_tensors_are_audited(tiny, monkeypatch):
    pytest.importorskip("torchao")
    row = Setting("cpu-torchao", "CPU INT8 torchao", "cpu", "bfloat16", "torchao-int8", linear=True)
    monkeypatch.setitem(SETTINGS, row.key, row)
    monkeypatch.setattr(torchao.Torchao, "why_not", lambda *_: None)
    with qb.load(tiny, row.key) as lm:
        assert lm.audit["quantised"] == (8 if "gpt2" in tiny else 14) and lm.audit["left"] == {}
        assert lm.audit["details"] == {"storage_dtype": "int8", "compute_dtype": "bfloat16", "group": "row",
                                       "activations": None}
        assert weights_estimate(on_meta(lm.model.config), row) == pytest.approx(lm.weights_bytes, rel=0.001)
        assert qb.generate(lm, max_new_tokens=4, repeats=1, progress=False).status == "ok"
    monkeypatch.setitem(SETTINGS, row.key, Setting(**vars(row) | {"linear": False}))
    if "gpt2" in tiny:
        with pytest.raises(qb.AuditError, match="no module was quantised"):
            qb.load(tiny, row.key)


def torchao_is_here() -> bool:
    return torchao.importlib.util.find_spec("torchao") is not None


def alone(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parent.parent).stdout
