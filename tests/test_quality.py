"""Quality against independent arithmetic, on real models; what it refuses; how it gets into rows and onto charts."""

import ast
import dataclasses
import importlib
import inspect
import json
import math
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba

import quantbench as qb
from quantbench import texts, windows
from quantbench.charts import COLOURS
from quantbench.logits import NonFiniteLogits, first_non_finite
from quantbench.pairing import alone, interval
from quantbench.pareto import _mark, front, plot_quality
from quantbench.quality_view import scored, show_quality
from quantbench.record import Measurement
from quantbench.run import Run
from quantbench.score import Quality
from quantbench.stats import overlap
from tests.conftest import TINY

module = importlib.import_module("quantbench.quality")  # its name in the package is the function's
SMALL = {"tokens": 300, "context": 32, "stride": 16, "progress": False}
PACKAGE = Path(qb.__file__).parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A tiny Llama with weights in a file and a tokenizer of its own: "pretrained", with uneven predictions."""
    folder = str(tmp_path_factory.mktemp("tiny-pretrained-"))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**TINY["llama"]))
    model.model.embed_tokens.weight.data *= 6  # else every next token is nearly as likely as any other
    model.save_pretrained(folder)
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([texts.find_text().body], vocab_size=500, show_progress=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def lm(tiny):
    with qb.load(tiny, "cpu-fp32") as lm:
        yield lm


@pytest.fixture(scope="module")
def smollm2() -> dict[str, Quality]:
    """The real thing, on 450 tokens: setting -> quality against FP32."""
    pytest.importorskip("gguf")
    found = {}
    with qb.load("smollm2-135m", "cpu-fp32") as lm:
        reference = qb.reference(lm, tokens=450, context=128, progress=False)
        found["cpu-fp32"], found["itself"] = reference.quality, qb.quality(lm, reference, progress=False)
        found["plain"] = plain_perplexity(lm, reference.plan.ids, 128, 64)
        lm.model.forward = shuffled(lm.model.forward)
        found["shuffled"] = qb.quality(lm, reference, progress=False)
        del lm.model.forward
    with reference:
        for setting in ("cpu-bf16", "cpu-int8", "cpu-int4"):
            with qb.load("smollm2-135m", setting) as lm:
                found[setting] = qb.quality(lm, reference, progress=False)
    return found


def plain_perplexity(lm, ids: torch.Tensor, context: int, stride: int) -> float:
    """transformers' guide in a few lines: its own loss, per window, labels of what was scored before masked out."""
    losses, done = [], 1
    for start in range(0, len(ids), stride):
        window = ids[start:start + context][None]
        labels = window.clone()
        labels[:, :done - start] = -100
        with torch.no_grad():
            losses += [lm.model(input_ids=window, labels=labels).loss.double()] * (start + window.shape[1] - done)
        done = start + window.shape[1]
        if done == len(ids):
            return torch.stack(losses).mean().exp().item()


def shuffled(forward):
    def wrong(*args, **named):
        output = forward(*args, **named)
        output.logits = output.logits.roll(1000, dims=-1)
        return output
    wrong.__signature__ = inspect.signature(forward)
    return wrong


def changed(lm, change) -> None:
    """Let the model's logits go through `change`."""
    forward = lm.model.forward

    def other(input_ids, attention_mask=None, use_cache=False, past_key_values=None):
        output = forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache,
                         past_key_values=past_key_values)
        output.logits = change(output.logits)
        return output

    lm.model.forward = other


# ---- the arithmetic ----

@pytest.mark.parametrize("context, stride", [(32, 16), (64, 63), (48, 1), (7, 5)])
def test_perplexity_is_that_of_a_plain_computation(lm, context, stride):
    found = qb.quality(lm, tokens=120, context=context, stride=stride, progress=False)
    ids = torch.tensor(lm.tokenizer.encode(texts.find_text().body)[:120])
    assert found.perplexity == pytest.approx(plain_perplexity(lm, ids, context, stride), rel=1e-4)
    assert found.tokens == 119 and found.windows == max(1, math.ceil((120 - context) / stride) + 1)


def test_perplexity_and_its_error_by_hand():
    window, nll = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    found = alone({"nll": nll, "top": torch.tensor([1, 0, 0, 0, 1])}, torch.ones(5, dtype=torch.long), window)
    assert found["perplexity"] == pytest.approx(math.exp(3)) and found["accuracy"] == 0.4
    error = math.sqrt(2 * ((6 - 3 * 3) ** 2 + (9 - 3 * 2) ** 2)) / 5  # sums 6 and 9 of 3 and 2 tokens, mean 3
    assert found["perplexity_se"] == pytest.approx(math.exp(3) * error)


def test_a_model_does_not_differ_from_itself(lm):
    beside = qb.quality(lm, lm, **SMALL)
    with qb.reference(lm, **SMALL) as reference:
        stored = qb.quality(lm, reference, progress=False)
    assert beside.kl_mean == 0 and abs(stored.kl_mean) < 1e-6
    for found in (beside, stored):
        assert found.top1_agreement == found.accuracy_kept == 1 and found.dp_rms == 0 and found.keeps_999


def test_one_logit_raised_gives_the_divergence_worked_out_by_hand(tiny, lm):
    """q is p with token 7's odds times e^d, so KL(p || q) = log(1 - p7 + p7 e^d) - p7 d."""
    delta, raised = 1.5, torch.zeros(500)
    raised[7] = delta
    with qb.load(tiny, "cpu-fp32") as other:
        changed(other, lambda logits: logits + raised)
        found = qb.quality(other, lm, **SMALL)
        plan = windows.make_plan(lm, None, 300, 32, 16)
    p = torch.cat([log_probs(lm, plan, window).exp()[:, 7] for window in plan.windows]).double()
    by_hand = (1 - p + p * math.exp(delta)).log() - p * delta
    assert found.kl_mean == pytest.approx(by_hand.mean().item(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(by_hand.quantile(0.99).item(), rel=1e-3)


def log_probs(lm, plan, window) -> torch.Tensor:
    start, end, scored = window
    with torch.no_grad():
        return lm.model(input_ids=plan.ids[None, start:end]).logits[0, -scored - 1:-1].log_softmax(-1)


def test_noise_of_known_size_gives_half_its_variance(tiny, lm):
    """Independent noise of variance s² on every logit: KL = s²/2 (1 - sum p²) to second order, on average."""
    size, generator = 0.05, torch.Generator().manual_seed(1)
    with qb.load(tiny, "cpu-fp32") as other:
        changed(other, lambda logits: logits + size * torch.randn(logits.shape, generator=generator))
        found = qb.quality(other, lm, **SMALL)
    plan = windows.make_plan(lm, None, 300, 32, 16)
    peaked = torch.cat([log_probs(lm, plan, window).exp().square().sum(-1) for window in plan.windows])
    expected = size**2 / 2 * (1 - peaked.mean().item())
    assert found.kl_mean == pytest.approx(expected, rel=0.1)
    assert found.kl_ci[0] < expected < found.kl_ci[1] or abs(found.kl_mean / expected - 1) < 0.05


def test_a_change_of_probability_and_agreement_by_hand(tiny, lm):
    with qb.load(tiny, "cpu-int4") as other:
        found = qb.quality(other, lm, **SMALL)
        plan = windows.make_plan(lm, None, 300, 32, 16)
        p, q = (torch.cat([log_probs(one, plan, window).float() for window in plan.windows]) for one in (lm, other))
    change = (q.exp() - p.exp()).gather(1, plan.ids[1:, None])[:, 0].double()
    assert found.dp_mean == pytest.approx(change.mean().item(), rel=0.02, abs=1e-6)
    assert found.dp_rms == pytest.approx(change.square().mean().sqrt().item(), rel=0.02)
    assert found.dp_percentiles["95"] == pytest.approx(change.quantile(0.95).item(), rel=0.2)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=0.01)


def test_batches_and_row_chunks_change_nothing(lm, monkeypatch):
    whole = qb.quality(lm, **SMALL)
    monkeypatch.setattr(windows, "BATCH_BYTES", 1)
    monkeypatch.setattr("quantbench.logits.ROWS_BYTES", 4 * 500 * 3)
    assert qb.quality(lm, **SMALL).perplexity == pytest.approx(whole.perplexity, rel=1e-6)


def test_stepwise_is_the_same_sum_and_the_default_where_a_pass_shares_a_scale(tiny, lm):
    few = SMALL | {"tokens": 80}
    assert qb.quality(lm, stepwise=True, **few).perplexity == pytest.approx(qb.quality(lm, **few).perplexity, rel=1e-5)
    with qb.load(tiny, "cpu-int8-dynamic") as dynamic:
        assert qb.quality(dynamic, **few).stepwise is True
        assert qb.quality(dynamic, stepwise=False, **few).stepwise is False


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_every_token_is_scored_once_with_its_context(tokens, context, data):
    stride = data.draw(st.integers(1, context - 1))
    plan = windows.Plan(texts.Text("", ""), torch.arange(tokens), context, stride, None)
    batches = list(plan.batches(10))
    assert torch.equal(torch.cat([batch.targets for batch in batches]), torch.arange(1, tokens))
    assert len(plan.window_of_token()) == plan.tokens and [b.number for b in batches] == list(range(len(batches)))
    for start, end, scored in plan.windows[1:]:
        assert end - start <= context and end - scored - start >= context - stride


def test_every_window_starts_with_bos_where_the_text_does():
    plan = windows.Plan(texts.Text("", ""), torch.arange(100), 20, 10, bos=77)
    assert all((batch.ids[:, 0] == 77).all() for batch in plan.batches(10))
    assert torch.equal(torch.cat([batch.targets for batch in plan.batches(10)]), torch.arange(1, 100))


def test_a_batch_of_logits_is_bounded(monkeypatch):
    monkeypatch.setattr(windows, "BATCH_BYTES", 4 * 10 * 50_000 * 3)
    plan = windows.Plan(texts.Text("", ""), torch.arange(500), 20, 10, None)
    assert max(len(batch.targets) for batch in plan.batches(50_000)) == 30


def test_an_interval_of_one_window_is_unknown_and_of_equal_ones_a_point():
    ones = torch.ones(6, dtype=torch.float64)
    assert interval(ones, ones, torch.zeros(6, dtype=torch.long)) is None
    assert interval(2 * ones, ones, torch.arange(6)) == [2, 2]


# ---- a real model ----

def test_smollm2_has_the_perplexity_of_a_plain_computation(smollm2):
    assert smollm2["cpu-fp32"].perplexity == pytest.approx(smollm2["plain"], rel=1e-4)
    assert 15 < smollm2["cpu-fp32"].perplexity < 45 and smollm2["cpu-fp32"].eval_tokens_per_s > 0


def test_smollm2_differs_from_itself_by_nothing_and_shuffled_by_all(smollm2):
    assert smollm2["cpu-fp32"].kl_mean == 0 and abs(smollm2["itself"].kl_mean) < 1e-6
    assert smollm2["itself"].top1_agreement == 1
    assert smollm2["shuffled"].kl_mean > 3 and smollm2["shuffled"].top1_agreement < 0.05
    assert smollm2["shuffled"].perplexity > 100 * smollm2["cpu-fp32"].perplexity and not smollm2["shuffled"].keeps_99


def test_the_order_holds_on_smollm2_with_intervals_apart(smollm2):
    order = [smollm2[setting] for setting in ("cpu-fp32", "cpu-bf16", "cpu-int8", "cpu-int4")]
    for better, worse in zip(order, order[1:]):
        assert better.kl_mean < worse.kl_mean and not overlap(better.kl_ci, worse.kl_ci)
        assert better.kl_p99 < worse.kl_p99 and better.top1_agreement > worse.top1_agreement
        assert better.dp_rms < worse.dp_rms
    assert [found.stepwise for found in order] == [False] * 4


# ---- what is refused, and what fails ----

def test_random_weights_have_no_quality(tiny_gpt2, lm):
    with qb.load(tiny_gpt2, "cpu-fp32") as random:
        for refused in (lambda: qb.quality(random), lambda: qb.reference(random)):
            with pytest.raises(ValueError, match="random weights"):
                refused()


def test_a_model_without_its_tokenizer_has_no_quality(tiny, tmp_path):
    for file in Path(tiny).iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with qb.load(str(tmp_path), "cpu-fp32") as lm, pytest.raises(ValueError, match="no tokenizer"):
        qb.quality(lm)


@pytest.mark.parametrize("wrong, message", [
    ({"context": 128}, "over the 64 tokens"), ({"stride": 32}, "below the context"), ({"stride": 0}, "stride must be"),
    ({"tokens": 3}, "tokens must be"), ({"text": "wikitext2"}, "'wikitext-2'"), ({"context": True}, "context")])
def test_a_mistake_is_said_before_anything_runs(lm, wrong, message):
    with pytest.raises(ValueError, match=message):
        qb.quality(lm, **({"context": 32, "progress": False} | wrong))


def test_a_reference_is_the_same_model_and_brings_its_text(tiny, lm, tmp_path):
    with qb.reference(lm, **SMALL) as reference:
        with pytest.raises(ValueError, match="hold here too"):
            qb.quality(lm, reference, tokens=100)
        other = tmp_path / "other"
        other.symlink_to(tiny)
        with qb.load(str(other), "cpu-fp32") as stranger, pytest.raises(ValueError, match="the same model"):
            qb.quality(stranger, reference)
    with pytest.raises(ValueError, match="closed"):
        qb.quality(lm, reference)
    lm.close()
    with pytest.raises(ValueError, match="loaded model"):
        qb.quality(lm)


def test_a_references_files_are_bounded_and_go(lm, tmp_path, monkeypatch):
    with qb.reference(lm, folder=tmp_path, **SMALL):
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) == 2 * 299 * 500
        assert max(file.stat().st_size for file in files) <= windows.BATCH_BYTES // 2
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(module, "DISK_BYTES", 100_000)
    with pytest.raises(ValueError, match="give tokens=100, or the loaded model"):
        qb.reference(lm, folder=tmp_path, **SMALL)


def poison(lm) -> str:
    lm.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf
    return "model.layers.1.mlp.down_proj (Linear)"


def test_logits_that_are_not_finite_are_a_failure_that_names_setting_and_layer(tiny, lm, tmp_path):
    run = Run.open(tmp_path / "rows.jsonl")
    run.add(qb.generate(lm, max_new_tokens=2, repeats=1, progress=False))
    where = poison(lm)
    found = qb.quality(lm, **SMALL)
    assert found.status == "failed" and "CPU FP32" in found.reason and where in found.reason
    assert found.perplexity is None and not lm.model.model.layers[1]._forward_hooks
    run.add_quality(found)
    for rows in (run, Run.read(run.path)):
        assert rows[0].status == "failed" and where in rows[0].reason and rows[0].perplexity is None
        assert rows[0].latencies_s
    assert "NaN" not in run.path.read_text() and "Infinity" not in run.path.read_text()


def test_a_reference_that_is_not_finite_is_no_reference(tiny, lm, tmp_path):
    with qb.load(tiny, "cpu-fp32") as broken:
        poison(broken)
        with pytest.raises(ValueError, match="reference"):
            qb.quality(lm, broken, **SMALL)
        with pytest.raises(NonFiniteLogits):
            qb.reference(broken, folder=tmp_path, **SMALL)
    assert not list(tmp_path.iterdir())
    assert first_non_finite(lm.model, torch.ones(1, 4, dtype=torch.long)) is None


def test_no_number_that_is_not_finite_gets_into_a_quality():
    for wrong in ({"perplexity": math.nan}, {"kl_ci": [0.0, math.inf]}, {"dp_percentiles": {"1": math.nan}}):
        with pytest.raises(ValueError, match="finite"):
            Quality(model="m", setting="cpu-fp32", **wrong)


def test_running_out_of_memory_is_said(lm, monkeypatch):
    def full(*args, **named):
        raise MemoryError("no room")
    monkeypatch.setattr(module, "evaluate", full)
    found = qb.quality(lm, **SMALL)
    assert (found.status, found.reason) == ("out_of_memory", "no room")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_setting_that_cannot_run_says_so_and_adds_nothing(tiny):
    lm, run = qb.load(tiny, "gpu-fp16"), Run()
    run.add(qb.generate(lm, max_new_tokens=2))
    found = run.add_quality(qb.quality(lm))
    assert found.status == "unavailable" and found.reason and run[0].quality is None
    with pytest.raises(ValueError, match="loaded model"):
        qb.reference(lm)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("setting", ["gpu-fp16", "gpu-int8", "gpu-int4"])
def test_gpu_settings_against_a_reference_on_the_cpu_beside_them_and_on_disk(tiny, lm, setting):
    with qb.reference(lm, **SMALL) as stored, qb.load(tiny, setting) as other:
        first, second = qb.quality(other, lm, **SMALL), qb.quality(other, stored, progress=False)
    assert first.kl_mean == pytest.approx(second.kl_mean, rel=0.02, abs=2e-6) and first.peak_bytes > 0
    assert 0 < first.kl_mean < 0.5


# ---- the text ----

def test_the_bundled_text_is_of_the_size_it_says():
    text = texts.find_text()
    assert text.name == "quantbench-eval" and len(text.body.split()) == 2481 and len(text.sha256) == 64
    assert texts.find_text("A text of my own.").name == "own text"


def test_wikitext_falls_back_and_says_so_offline(monkeypatch):
    monkeypatch.setattr(texts, "hub_answers", lambda: False)
    with pytest.warns(UserWarning, match="wikitext-2 cannot be had .* on quantbench-eval instead"):
        assert texts.find_text("wikitext-2") == texts.find_text()


def test_wikitext_is_joined_as_published(monkeypatch, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame({"text": ["", " = A = \n", " words \n"]}).to_parquet(tmp_path / "test.parquet")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **named: tmp_path / "test.parquet")
    assert texts.find_text("wikitext-2") == texts.Text("wikitext-2", "\n\n = A = \n\n\n words \n")


# ---- rows ----

ROW = Measurement(model="m", setting="cpu-int8", max_new_tokens=8, new_tokens=8, latencies_s=[1.0, 1.1, 1.2],
                  weights="pretrained", weights_bytes=10**8, text=" a b <i>c", versions={"torch": "2"})
FOUND = Quality(model="m", setting="cpu-int8", weights="pretrained", versions={"torch": "2"}, text="quantbench-eval",
                text_sha256="0", tokens=2978, context=512, stride=256, windows=11, perplexity=29.6, perplexity_se=2.5,
                accuracy=0.33, reference="cpu-fp32", kl_mean=0.013, kl_ci=[0.012, 0.014], kl_p99=0.06, dp_mean=-0.004,
                dp_rms=0.02, dp_percentiles={"50": 0.0}, top1_agreement=0.92, top1_ci=[0.91, 0.93],
                accuracy_kept=1.001, accuracy_kept_ci=[0.99, 1.01], keeps_99=True, keeps_999=True)


def as_row(setting: str, seconds: float, gigabytes: float, **quality) -> Measurement:
    found = dataclasses.replace(FOUND, setting=setting, **quality).found()
    return dataclasses.replace(ROW, setting=setting, latencies_s=[seconds, seconds * 1.001, seconds * 1.002],
                               weights_bytes=int(gigabytes * 1e9), quality=found)


ROWS = [as_row("cpu-fp32", 1.0, 0.5, kl_mean=0.0, kl_ci=[0.0, 0.0], top1_agreement=1.0, perplexity=29.0,
               accuracy_kept_ci=[1.0, 1.0]),
        as_row("cpu-bf16", 1.1, 0.25, kl_mean=0.001, kl_ci=[0.0009, 0.0011]),
        as_row("cpu-int8", 2.0, 0.16, accuracy_kept_ci=[0.98, 1.01]),
        as_row("cpu-int4", 1.2, 0.11, kl_mean=0.22, kl_ci=[0.21, 0.23], top1_agreement=0.7, perplexity=35.0,
               accuracy_kept=0.91, accuracy_kept_ci=[0.89, 0.93]),
        as_row("cpu-int8-dynamic", 0.5, 0.25, kl_mean=0.15, kl_ci=[0.12, 0.18], accuracy_kept_ci=[0.9, 0.97])]


def test_a_row_without_quality_is_valid_and_has_no_figures():
    row = Measurement.from_json(ROW.to_json())
    assert row == ROW and row.quality is row.perplexity is row.kl_mean is row.kl_ci is row.top1_agreement is None
    assert "Perplexity" not in row.summary()


def test_quality_goes_into_every_row_of_its_setting_and_through_a_file(tmp_path):
    run = Run.open(tmp_path / "rows.jsonl")
    longer, other = dataclasses.replace(ROW, max_new_tokens=9), dataclasses.replace(ROW, setting="cpu-int4")
    elsewhere = dataclasses.replace(ROW, machine={"cpu": "another"})
    for row in (ROW, longer, other, elsewhere):
        run.add(row)
    assert run.add_quality(FOUND) is FOUND
    for rows in (run, Run.read(run.path)):
        by_key = {row.key: row for row in rows}
        assert len(by_key) == 4 and by_key[other.key] == other and by_key[elsewhere.key] == elsewhere
        for row in (ROW, longer):
            new = by_key[row.key]
            assert new == dataclasses.replace(row, quality=FOUND.found())
            assert (new.perplexity, new.kl_mean, new.kl_ci, new.top1_agreement) == (29.6, 0.013, (0.012, 0.014), 0.92)
    assert {"Perplexity", "KL vs reference", "Top-1 agreement"} <= set(by_key[ROW.key].summary())
    assert json.loads(json.dumps(FOUND.found())) == FOUND.found()


def test_a_re_run_keeps_the_quality_of_its_setting(tmp_path):
    run = Run.open(tmp_path / "rows.jsonl")
    run.add(ROW), run.add_quality(FOUND)
    again = dataclasses.replace(ROW, latencies_s=[2.0])
    assert run.add(again).quality == FOUND.found() == Run.read(run.path)[0].quality
    [longer] = run.replace([dataclasses.replace(ROW, max_new_tokens=64)])
    assert longer.quality == FOUND.found() and len(run) == 1 and Run.read(run.path)[0] == longer
    newer = dataclasses.replace(FOUND, perplexity=30.0)
    run.add_quality(newer)
    assert run[0].perplexity == 30.0


def test_a_setting_that_failed_stays_so_until_its_logits_are_finite(tmp_path):
    run = Run([ROW])
    run.add_quality(Quality(model="m", setting="cpu-int8", weights="pretrained", versions={"torch": "2"}, tokens=5,
                            status="failed", reason="CPU INT8: the logits are not finite"))
    assert run[0].status == "failed" and run.add(ROW).status == "failed"
    run.add_quality(FOUND)
    assert run[0].status == "ok" and run[0].reason is None


def test_quality_without_its_row_is_said_with_the_figures():
    with pytest.raises(ValueError, match="generate with the same model.*29.60"):
        Run().add_quality(FOUND)


def test_it_is_never_in_a_timed_region(lm):
    """What times does not know of quality, and samples stay as they were."""
    for name in ("generate", "engines", "graph", "sweep", "child", "meters"):
        names = {alias.name if isinstance(node, ast.Import) else node.module
                 for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text()))
                 if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        assert not names & {f"quantbench.{part}" for part in ("quality", "logits", "pairing", "windows", "texts")}
    run = Run([qb.generate(lm, max_new_tokens=2, repeats=2, progress=False)])
    before = run[0]
    run.add_quality(qb.quality(lm, **SMALL))
    assert dataclasses.replace(run[0], quality=None) == before and run[0].perplexity > 1


# ---- the reading wing ----

def test_the_table_has_a_row_per_setting():
    frame = qb.quality_table(ROWS + [ROW, dataclasses.replace(ROW, setting="gpu-fp16")])
    assert list(frame["Setting"]) == ["CPU FP32", "CPU BF16", "CPU INT8", "CPU INT4", "CPU INT8 dynamic"]
    assert frame["KL vs reference"].tolist() == [0, 0.001, 0.013, 0.22, 0.15]
    shown = show_quality(ROWS)
    assert "against CPU FP32: 2978 tokens" in repr(shown) and "VRAM" not in repr(shown)
    assert repr(show_quality([ROW])) == "no quality measured yet" == repr(qb.quality_findings([ROW]))[2:]


def test_findings_say_what_is_saved_what_it_costs_and_give_a_verdict():
    said = {text.split(":")[0]: text for text in qb.quality_findings(ROWS)}
    assert "saves 50% of the weights and costs 9% speed" in said["m, CPU BF16"]
    assert "worth taking" in said["m, CPU BF16"]
    assert "2978 tokens do not tell" in said["m, CPU INT8"] and "agrees with CPU FP32 on 92%" in said["m, CPU INT8"]
    assert "not for this model" in said["m, CPU INT4"] and "saves 78%" in said["m, CPU INT4"]
    assert "29.0 → 35.0" in said["m, CPU INT4"] and "is 100% faster" in said["m, CPU INT8 dynamic"]


def test_findings_compare_a_gpu_setting_with_the_gpus_own_and_name_what_failed():
    gpu = [dataclasses.replace(as_row(key, seconds, 0.2, kl_mean=kl, kl_ci=[kl, kl]), vram_peak_bytes=vram)
           for key, seconds, kl, vram in (("gpu-fp16", 0.1, 0.001, 300_000_000), ("gpu-int8", 0.3, 0.01, 350_000_000))]
    failed = dataclasses.replace(as_row("gpu-int4", 0.2, 0.1), status="failed", reason="not finite", quality={
        "status": "failed", "reason": "not finite"})
    said = " ".join(qb.quality_findings([ROWS[0], *gpu, failed]))
    assert "takes 17% more VRAM and costs 67% speed against GPU FP16" in said and "nothing gained" in said
    assert "GPU INT4: failed: not finite" in said


def test_rows_of_other_texts_are_not_compared():
    rows = [ROWS[0], as_row("cpu-int4", 1.0, 0.1, text="own text", text_sha256="1")]
    assert len(show_quality(rows)) == 2 and "saves" not in " ".join(qb.quality_findings(rows))
    assert len(qb.plot_quality(rows).axes) == 2


def test_what_a_file_brings_is_data():
    strange = {"status": "ok", "perplexity": 3, "kl_mean": "<b>", "kl_ci": ["x"], "text": "<script>", "tokens": [],
               "reference": ["cpu-fp32"], "accuracy_kept_ci": [], "dp_mean": {}, "keeps_99": "yes", "stepwise": 1}
    rows = [dataclasses.replace(ROW, quality=strange), ROWS[0]]
    assert "<script>" not in show_quality(rows)._repr_html_() + qb.quality_findings(rows)._repr_markdown_()
    qb.quality_table(rows), qb.plot_quality(rows)
    qb.quality_table([dataclasses.replace(ROW, quality={"kl_mean": 1.0, "perplexity": 2.0, "top1_agreement": None})])


def test_the_chart_keeps_its_colours_draws_the_front_and_no_label_covers_another():
    crowd = [as_row(key, 1 + place / 20, 0.1, kl_mean=0.1 + place / 1000, kl_ci=None)
             for place, key in enumerate(qb.SETTINGS)]
    for rows in (ROWS, crowd):
        fig = plot_quality(rows)
        fig.draw_without_rendering()
        ax = fig.axes[0]
        labels = [text.get_window_extent() for text in ax.texts if "GB" in text.get_text()]
        assert len(labels) == len(rows)
        assert not any(a.overlaps(b) for place, a in enumerate(labels) for b in labels[:place])
    drawn = {tuple(mark.get_facecolor()[0]) for mark in plot_quality(ROWS).axes[0].collections
             if isinstance(mark, PathCollection)}
    assert {to_rgba(COLOURS[row.setting]) for row in ROWS} == drawn
    assert [mark.cell.row.setting for mark in front([_mark(cell) for cell in scored(ROWS)])] == [
        "cpu-int8-dynamic", "cpu-fp32"]
    with pytest.raises(ValueError, match="both speed and quality"):
        plot_quality([ROW])


def test_continuations_mark_the_first_difference_and_escape_everything():
    rows = [dataclasses.replace(ROWS[0], text=" once the king slept"),
            dataclasses.replace(ROWS[2], text=" once the <b>queen</b> slept"),
            dataclasses.replace(ROWS[1], text=" once the king slept"), dataclasses.replace(ROWS[3], text=None)]
    shown = qb.continuations(rows)
    [(title, texts_)] = shown
    assert [(text.setting, text.same, text.differs) for text in texts_] == [
        ("CPU FP32", " once the king slept", ""), ("CPU BF16", " once the king slept", ""),
        ("CPU INT8", " once the ", "<b>queen</b>")]
    page = shown._repr_html_()
    assert "<b>queen" not in page and "&lt;b&gt;queen&lt;/b&gt;</mark>" in page and "same for 2 words" in page
    assert "[<b>queen</b>]" in repr(shown) and "random weights" in qb.continuations([])._repr_html_()
