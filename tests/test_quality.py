"""Quality against independent arithmetic, on real models; what it refuses; how it stands beside speed."""

import dataclasses
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quantbench as qb
from quantbench.evaluation import passes
from tests.conftest import pretrained

SMALL = {"tokens": 300, "context": 32, "stride": 16, "progress": False}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return pretrained(tmp_path_factory.mktemp("tiny-pretrained-"))


@pytest.fixture
def lm(tiny):
    with qb.load(tiny, "cpu-fp32") as lm:
        yield lm


def plain_perplexity(lm, tokens: int, context: int, stride: int) -> float:
    """transformers' guide in a few lines: its own loss, per window, labels of what was scored before masked out."""
    ids, losses, done = torch.tensor(lm.tokenizer.encode(passes.find_text()[1])[:tokens]), [], 1
    for start in range(0, len(ids), stride):
        window = ids[start:start + context][None]
        labels = window.clone()
        labels[:, :done - start] = -100
        with torch.no_grad():
            losses += [lm.model(input_ids=window, labels=labels).loss.double()] * (start + window.shape[1] - done)
        done = start + window.shape[1]
        if done == len(ids):
            return torch.stack(losses).mean().exp().item()


def changed(lm, change) -> None:
    """Let the model's logits go through `change`."""
    def hook(module, given, output):
        output.logits = change(output.logits)

    lm.model.register_forward_hook(hook)


def log_probs(lm) -> torch.Tensor:
    """Of SMALL's tokens, by hand [tokens, vocabulary]."""
    ids = torch.tensor(lm.tokenizer.encode(passes.find_text()[1])[:300])
    seen = [lm.model(input_ids=seen).logits[0, -n - 1:-1] for seen, n in passes.windows_of(ids, 32, 16)]
    return torch.cat(seen).float().log_softmax(-1)


# ---- the arithmetic ----

@pytest.mark.parametrize("context, stride", [(64, 63), (48, 1), (7, 5)])
def test_perplexity_is_that_of_a_plain_computation(lm, context, stride):
    found = qb.quality(lm, tokens=120, context=context, stride=stride, progress=False)
    assert found.perplexity == pytest.approx(plain_perplexity(lm, 120, context, stride), rel=1e-4)
    assert found.tokens == 119 and found.windows == max(1, math.ceil((120 - context) / stride) + 1)


def test_a_model_does_not_differ_from_itself_and_a_loaded_reference_gives_the_same(tiny, lm):
    reference = qb.reference(lm, **SMALL)
    for found in (reference.quality, qb.quality(lm, reference, progress=False)):
        assert abs(found.kl_mean) < 1e-6
        assert found.top1_agreement == found.accuracy_kept == 1 and found.keeps_99
    with qb.load(tiny, "cpu-int4") as other:
        beside, stored = qb.quality(other, lm, **SMALL), qb.quality(other, reference, progress=False)
        p, q = log_probs(lm), log_probs(other)
    assert dataclasses.replace(beside, created_at="") == dataclasses.replace(stored, created_at="")
    assert stored.kl_mean == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=0.05, abs=1e-6)
    assert stored.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=0.01)


def test_one_logit_raised_gives_the_divergence_worked_out_by_hand(lm):
    """q is p with token 7's odds times e^d, so KL(p || q) = log(1 - p7 + p7 e^d) - p7 d."""
    reference, p = qb.reference(lm, **SMALL), log_probs(lm).exp()[:, 7].double()
    changed(lm, lambda logits: logits + 1.5 * (torch.arange(500) == 7))
    found, by_hand = qb.quality(lm, reference, progress=False), (1 - p + p * math.exp(1.5)).log() - p * 1.5
    assert found.kl_mean == pytest.approx(by_hand.mean().item(), rel=1e-3)
    assert found.kl_p99 == pytest.approx(by_hand.quantile(0.99).item(), rel=1e-3)
    assert found.kl_windows[0] == pytest.approx(by_hand[:31].mean().item(), rel=1e-3) and len(found.kl_windows) == 18


def test_stepwise_is_the_same_sum_and_the_default_where_a_pass_shares_a_scale(tiny, lm):
    few = SMALL | {"tokens": 50}
    assert qb.quality(lm, stepwise=True, **few).perplexity == pytest.approx(qb.quality(lm, **few).perplexity, rel=1e-5)
    with qb.load(tiny, "cpu-int8-dynamic") as dynamic:
        assert qb.quality(dynamic, **few).stepwise and not qb.quality(dynamic, stepwise=False, **few).stepwise


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_every_token_is_scored_once_with_its_context(tokens, context, data):
    stride = data.draw(st.integers(1, context - 1))
    found, done = passes.windows_of(torch.arange(tokens), context, stride, bos=777), 1
    for seen, scored in found:
        end = done + scored
        start = end - seen.shape[1]
        assert seen[0].tolist() == [777, *range(start + 1, end)] and seen.shape[1] <= context
        assert not start or done - start >= context - stride
        done = end
    assert done == tokens


def test_an_interval_is_of_six_windows_and_covers():
    """Of a ratio of sums whose windows share an effect, at 11 windows, as the bundled text has."""
    ones = torch.ones(6, dtype=torch.float64)
    assert passes.ratio(ones[:5], ones[:5]) == (1, None, None) and passes.ratio(ones, 0 * ones)[0] is None
    assert passes.ratio(2 * ones, ones) == (2, 0, (2, 2))
    held, generator, sizes = 0, torch.Generator().manual_seed(0), torch.full((11,), 256.0, dtype=torch.float64)
    for _ in range(400):
        noise = torch.randn(11, 257, generator=generator, dtype=torch.float64)
        low, high = passes.ratio((1 + 0.3 * noise[:, :1] + noise[:, 1:]).sum(1), sizes)[2]
        held += low <= 1 <= high
    assert held / 400 > 0.925  # 0.95 less twice the error of 400 looks


def test_the_real_model_has_the_perplexity_of_a_plain_computation_and_an_order():
    """SmolLM2 on 60 tokens: FP32, INT8, and FP32 with its logits shuffled, with intervals apart."""
    pytest.importorskip("gguf")
    with qb.load("smollm2-135m", "cpu-fp32") as lm, qb.load("smollm2-135m", "cpu-int8") as other:
        reference = qb.reference(lm, tokens=60, context=20, stride=8, progress=False)
        plain, int8 = plain_perplexity(lm, 60, 20, 8), qb.quality(other, reference, progress=False)
        changed(lm, lambda logits: logits.roll(1000, dims=-1))
        shuffled = qb.quality(lm, reference, progress=False)
    assert reference.quality.perplexity == pytest.approx(plain, rel=1e-4) and 15 < plain < 200 < shuffled.perplexity
    assert 0 == reference.quality.kl_ci[1] < int8.kl_ci[0] < int8.kl_ci[1] < 0.2 < 3 < shuffled.kl_ci[0]
    assert shuffled.top1_agreement < 0.05 < 0.7 < int8.top1_agreement < 1 and shuffled.keeps_99 is False


# ---- what is refused, and what fails ----

def test_random_weights_and_a_strange_tokenizer_have_no_quality(tiny, tiny_gpt2, tmp_path):
    for file in Path(tiny).iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for folder, why in ((tiny_gpt2, "random weights"), (str(tmp_path), "no tokenizer")):
        with qb.load(folder, "cpu-fp32") as lm:
            for refused in (qb.quality, qb.reference):
                with pytest.raises(ValueError, match=why):
                    refused(lm)


@pytest.mark.parametrize("wrong, message", [
    ({"context": 128}, "over the 64 tokens"), ({"stride": 32}, "below the context"), ({"stride": 0}, "stride must be"),
    ({"tokens": 3}, "tokens must be"), ({"text": "wikitext2"}, "'wikitext-2'"), ({"context": True}, "context"),
    ({"text": 3}, "text must be the text itself"), ({"reference": "x"}, "reference must be what qb.reference"),
    ({"reference": ""}, "reference must be")])
def test_a_mistake_is_said_before_anything_runs(lm, wrong, message):
    with pytest.raises(ValueError, match=message):
        qb.quality(lm, **({"context": 32, "progress": False} | wrong))


def test_a_model_of_fewer_positions_than_a_window_has_smaller_ones(lm):
    found = qb.quality(lm, tokens=300, progress=False)
    assert (found.context, found.stride, found.tokens) == (64, 32, 299)


def test_a_reference_is_the_same_model_and_brings_its_text(tiny, lm, tmp_path, monkeypatch):
    with qb.reference(lm, **SMALL) as reference:
        with pytest.raises(ValueError, match="brings its text"):
            qb.quality(lm, reference, tokens=100)
        (tmp_path / "other").symlink_to(tiny)
        with qb.load(str(tmp_path / "other"), "cpu-fp32") as stranger, pytest.raises(ValueError, match="same model"):
            qb.quality(stranger, reference)
    with pytest.raises(ValueError, match="closed"):
        qb.quality(lm, reference)
    monkeypatch.setattr(passes, "MOST_SAMPLES", 4)  # else a record refuses it, when all is evaluated
    with pytest.raises(ValueError, match="windows .* at most 4, not"):
        qb.quality(lm, lm, **SMALL)
    monkeypatch.setattr(passes, "MOST_BYTES", 100_000)
    with pytest.raises(ValueError, match="give tokens=100"):
        qb.reference(lm, **SMALL)


def test_logits_that_are_not_finite_and_a_lack_of_memory_are_rows(tiny, lm, tmp_path):
    def full(logits):
        raise MemoryError("no room")

    run = qb.Run.open(tmp_path / "rows.jsonl")
    lm.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf
    found = run.add(qb.quality(lm, **SMALL))
    assert (found.status, found.perplexity) == ("failed", None) and qb.Run.read(run.path).qualities == [found]
    assert "CPU FP32: failed: the logits are not finite" in qb.quality_findings(run)[0]
    with qb.load(tiny, "cpu-fp32") as sound, pytest.raises(ValueError, match="can be no reference"):
        qb.quality(sound, lm, **SMALL)
    changed(lm, full)
    found = qb.quality(lm, **SMALL)
    assert (found.status, found.reason) == ("out_of_memory", "no room")


def test_what_was_read_since_is_not_told_to_have_failed():
    def at(day, **fields):
        return qb.Quality(model="gpt2", setting="gpu-fp16", created_at=f"2026-11-0{day}T00:00:00+00:00", **fields)

    windows = {"text": "t", "text_sha256": "s", "tokens": 300, "stride": 16, "revision": "r"}
    read = at(2, perplexity=3.0, context=32, versions={"torch": "2"}, **windows)
    missed = at(1, status="unavailable", reason="no package")
    full, longer = (at(1, status="out_of_memory", reason="no room", context=size, **windows) for size in (32, 64))
    for run, said in (([missed, full, read], 1), ([missed], 1), ([read, longer], 2),
                      ([read, dataclasses.replace(missed, created_at="2026-11-03")], 2)):
        assert len(qb.quality_findings(run)) == said


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_setting_that_cannot_run_says_so(tiny):
    found = qb.quality(lm := qb.load(tiny, "gpu-fp16"))
    assert found.status == "unavailable" and "no NVIDIA GPU" in " ".join(qb.quality_findings([found]))
    with pytest.raises(ValueError, match="loaded model"):
        qb.reference(lm)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("setting", ["gpu-fp16", "gpu-int8", "gpu-int4"])
def test_gpu_settings_against_a_reference_on_the_cpu(tiny, lm, setting):
    with qb.load(tiny, setting) as other:
        assert 0 < qb.quality(other, lm, **SMALL).kl_mean < 0.5


# ---- beside speed ----

def both(setting: str, speed: float, gigabytes: float, kl: float, kept: tuple, **more) -> list:
    """A setting's row, in six rounds, and its quality in eleven windows."""
    whose = {"model": "m", "weights": "pretrained", "setting": setting, "versions": {"torch": "2"}}
    vram = int(1.2e9 * gigabytes) if "gpu" in setting else None
    row = qb.Measurement(**whose, max_new_tokens=8, new_tokens=8, rounds=list("abcdef"), text=more.pop("wrote", " a b"),
                         latencies_s=[8 / speed * (1 + place / 1000) for place in range(6)],
                         weights_bytes=int(gigabytes * 1e9), vram_peak_bytes=vram)
    found = {"text": "quantbench-eval", "text_sha256": "0", "tokens": 2978, "context": 512, "stride": 256,
             "windows": 11, "perplexity": 29.0 + 10 * kl, "perplexity_se": 2.5, "reference": "cpu-fp32",
             "kl_mean": kl, "kl_ci": (0.9 * kl, 1.1 * kl), "top1_agreement": max(1 - 2 * kl, 0.0),
             "kl_windows": [kl * (1 + place / 100) for place in range(11)],
             "accuracy_kept": sum(kept) / 2, "accuracy_kept_ci": kept}
    return [row, qb.Quality(**whose, **(found | more))]


RUN = qb.Run(record for facts in (
    ("cpu-fp32", 30.0, 0.5, 0.0, (1.0, 1.0)), ("cpu-bf16", 25.0, 0.25, 0.001, (0.992, 1.007)),
    ("cpu-int8", 15.0, 0.16, 0.013, (0.98, 1.01)), ("cpu-int4", 28.0, 0.11, 0.22, (0.89, 0.93)),
    ("cpu-int8-dynamic", 60.0, 0.25, 0.15, (0.9, 0.97)), ("gpu-fp16", 100.0, 0.25, 1.6e-5, (0.994, 1.0)),
    ("gpu-bf16", 100.0, 0.25, 9.6e-4, (0.992, 1.004)), ("gpu-int8", 40.0, 0.16, 0.0135, (0.98, 1.003)),
    ("gpu-int8-nosplit", 80.0, 0.16, 0.01, (0.98, 1.003)), ("gpu-int4-dq", 120.0, 0.1, 0.1, (0.9, 0.995)),
) for record in both(*facts))


def said(run) -> dict[str, str]:
    """Setting -> what the findings say of it."""
    return {line.partition(": ")[0].removeprefix("m, "): line.partition(": ")[2] for line in qb.quality_findings(run)}


def test_findings_hold_a_setting_against_the_closest_unquantised_one_of_its_device():
    lines = said(RUN)
    assert "against CPU FP32: 2978 tokens" in lines["m"] and "CPU FP32" not in lines
    for setting, start, numbers in (
            ("CPU BF16", "worth taking: it keeps 99%", "against CPU FP32 50% less weights and 0.83 × the speed"),
            ("CPU INT8", "worth trying: 2,978 tokens do not tell", "0.50 × the speed"),
            ("CPU INT4", "not for this model", "KL 0.22"),
            ("CPU INT8 dynamic", "not for this model", "2.00 × the speed"),
            ("GPU FP16", "what its device's others are held against (KL 1.6e-05", "same first choice)"),
            ("GPU BF16", "nothing gained over GPU FP16", "as much VRAM and as fast"),
            ("GPU INT8", "GPU INT8 no split is closer, no larger and no slower", "36% less VRAM"),
            ("GPU INT4 double quant", "worth trying", "1.20 × the speed")):
        assert lines[setting].startswith(start) and numbers in lines[setting]


def test_no_claim_without_rounds_or_windows_and_column_and_sentence_agree():
    bare = qb.Run([dataclasses.replace(row, rounds=[]) for row in RUN] + RUN.qualities)
    assert "× the speed" not in repr(qb.quality_findings(bare)) and "fast" not in repr(qb.quality_findings(bare))
    assert "nothing gained" not in said(bare)["GPU BF16"] and "closer" not in said(bare)["GPU INT8"]
    column = dict(zip(*(qb.quality_table(RUN)[name] for name in ("Setting", "Keeps 99%"))))
    assert column["CPU BF16"] == "yes" and column["CPU INT8"] == "not told" and column["CPU INT4"] == "no"
    few = [dataclasses.replace(found, windows=5) for found in RUN.qualities]
    assert {found.keeps_99 for found in few} == {None} and set(qb.quality_table(few)["Keeps 99%"]) == {"not told"}


def test_quality_without_speed_and_speed_without_quality():
    only = RUN.qualities[:3]
    frame = qb.quality_table(only)
    assert list(frame["Setting"]) == ["CPU FP32", "CPU BF16", "CPU INT8"] and frame["Tokens/sec"].isna().all()
    assert "it keeps 99% of the accuracy (KL 0.001" in said(only)["CPU BF16"]
    assert "Tokens/sec" not in repr(qb.show_quality(only))
    assert repr(qb.show_quality(list(RUN))) == "no quality measured yet" == qb.quality_findings(list(RUN))[0]
    for neither in (only, list(RUN)):
        with pytest.raises(ValueError, match="both speed and quality"):
            qb.plot_quality(neither)


def test_other_texts_and_machines_are_not_compared_and_settings_meet_at_the_workload_that_most_have():
    other = both("cpu-int4", 28.0, 0.1, 0.22, (0.89, 0.93), text="own text", text_sha256="1")
    run = qb.Run([*RUN.only(setting="cpu-fp32"), RUN.qualities[0], *other])
    assert len(qb.show_quality(run)) == 2 == len(qb.plot_quality(run).axes)
    assert "against CPU FP32 " not in said(run)["CPU INT4"]
    longer = [dataclasses.replace(row, max_new_tokens=n, new_tokens=n) for row in list(RUN)[:2] for n in (16, 32)]
    captured = [dataclasses.replace(row, engine="graph") for row in RUN]
    spread = [dataclasses.replace(row, gpus=2, latencies_s=[9.0] * 6) for row in RUN if "gpu" in row.setting]
    pd.testing.assert_frame_equal(qb.quality_table([*RUN, *RUN.qualities, *spread]), qb.quality_table(RUN))
    assert "speed at 8 tokens (eager)" in repr(qb.show_quality([*RUN, *RUN.qualities, *longer, *captured]))
    elsewhere = dataclasses.replace(RUN.qualities[1], machine={"cpu": "another"})
    for refused in (qb.quality_findings, qb.plot_quality):
        with pytest.raises(ValueError, match="2 machines"):
            refused([*RUN, *RUN.qualities, elsewhere])


def test_a_perplexity_alone_and_what_a_file_brings():
    alone = {"reference": None, "kl_mean": None, "kl_ci": None, "kl_windows": None, "text": "<b>$x$|"}
    run = qb.Run(one for key in ("cpu-fp32", "cpu-bf16") for one in both(key, 1.0, 0.1, 0.0, (1.0, 1.0), **alone))
    shown = qb.show_quality(run)
    assert "not told" not in repr(shown) and shown.markdown() and len(qb.quality_findings(run)) == 1
    assert "<b>$" not in shown._repr_html_() + qb.quality_findings(run)._repr_markdown_()
    qb.plot_quality(qb.Run(both("cpu-fp32", 1.0, 0.1, 0.1, (1.0, 1.0), text="$x_{$"))).draw_without_rendering()


def test_the_chart_marks_every_setting_and_no_text_covers_another():
    crowd = qb.Run(record for place, key in enumerate(qb.SETTINGS)
                   for record in both(key, 30.0, 0.1, 0.1 + place / 1e3, (0.9, 1.0)))
    for run in (RUN, crowd):
        fig = qb.plot_quality(run)
        fig.draw_without_rendering()
        texts = fig.axes[0].get_legend().get_texts()
        boxes = [text.get_window_extent() for text in [*texts, fig.axes[0].yaxis.label, *fig.axes[0].get_yticklabels()]]
        assert len(texts) == len(run) and all(0 <= box.x0 and box.x1 <= fig.bbox.x1 for box in boxes)
        assert not any(a.overlaps(b) for place, a in enumerate(boxes[:len(texts)]) for b in boxes[:place])
    hollow = [mark.get_label() for mark in qb.plot_quality(RUN).axes[0].collections if not len(mark.get_facecolor())]
    assert [label.partition(" · ")[0] for label in hollow if not label.startswith("_")] == ["GPU BF16", "GPU INT8"]


def test_continuations_part_at_the_first_word_that_differs():
    texts = {"cpu-bf16": " once the <b>queen</b> slept\n\nwell", "cpu-fp32": " once the king slept",
             "cpu-int8": " once the king slept well", "cpu-int4": None}
    shown = qb.continuations(record for key, text in texts.items()
                             for record in both(key, 1.0, 1.0, 0.1, (0.9, 1.0), wrote=text))
    assert shown[0].frame.values.tolist() == [
        ["CPU FP32", " once the king slept", ""], ["CPU BF16", " once the ", "<b>queen</b> slept\n\nwell"],
        ["CPU INT8", " once the king slept well", ""]]
    assert "<b>queen" not in shown._repr_html_() and "random weights" in repr(qb.continuations([]))
    rows = [record for key, text in texts.items() for record in both(key, 1.0, 1.0, 0.1, (0.9, 1.0), wrote=text)]
    for other in ({"prompt_length": 1024}, {"depth": 64}, {"batch_size": 4}, {"cache": "static"}):  # no prompt by itself
        more = [dataclasses.replace(row, text=" else", max_new_tokens=99, **other) for row in rows[::2]]
        assert repr(qb.continuations([*rows, *more])) == repr(shown) and not qb.continuations(more)
    there = [dataclasses.replace(row, text=" else", machine={"cpu": "another"}) for row in rows[::2]]
    assert repr(qb.continuations([*rows, *there])).startswith(repr(shown)) and len(qb.continuations([*rows, *there])) == 2


# ---- other caches ----

def test_a_static_cache_reads_as_the_reference_does_and_is_a_quality_of_its_own(lm):
    run = qb.Run([qb.reference(lm, **SMALL).quality, qb.quality(lm, lm, **SMALL)])
    found = run.add(qb.quality(lm, lm, cache="static", **SMALL))
    assert found.kl_mean < 1e-6 and (found.cache, found.stepwise) == ("static", True)
    assert len(run.qualities) == 2 and "CPU FP32, static cache" in set(qb.quality_table(run)["Setting"].str[:22])
    assert qb.quality_findings(run) and "CPU FP32, static cache" in repr(found)


def test_the_fewer_bits_a_cache_has_the_further_it_is_from_the_reference(lm):
    for layer in lm.model.model.layers:  # else attention has hardly a say in what a tiny model predicts
        layer.self_attn.v_proj.weight.data *= 100
    four, eight, whole = (qb.quality(lm, lm, cache=name, **SMALL) for name in ("quantized-4", "quantized-8", "static"))
    if four.status == "unavailable":
        assert four.reason == "a quantised cache needs hqq: pip install quantbench[cache]" and four.kl_mean is None
        pytest.skip("needs hqq")
    assert four.kl_mean > 10 * eight.kl_mean > 20 * whole.kl_mean and four.key != eight.key, (four, eight, whole)


# ---- the batch ----

def test_a_batch_changes_no_text_where_each_sequence_is_computed_by_itself(lm):
    found = qb.batch_effect(lm, max_new_tokens=6, batch_size=[2, 3])
    assert [(one["Batch"], one["Other texts"]) for one in found] == [(2, 0), (3, 0)]


def test_where_a_batch_changes_the_texts_the_first_token_and_its_margin_are_told(lm):
    """The second token, counted from 1, falls the other way for all sequences but the first of a batch."""
    best = {}

    def second_best(logits):
        alone, step = logits.shape[0] == 1, lm.calls
        lm.calls += 1
        top = logits[:, -1].topk(2)
        if step % 4 == 1:
            if alone:
                best.setdefault("margins", []).append((top.values[0, 0] - top.values[0, 1]).item())
            else:
                logits = logits.clone()
                logits[1:, -1] = logits[1:, -1].scatter(1, top.indices[1:], top.values[1:].flip(1))
        return logits

    lm.calls = 0
    changed(lm, second_best)
    told, = qb.batch_effect(lm, max_new_tokens=4, batch_size=3)
    assert (told["Other texts"], told["From token"]) == (2, 2)
    assert told["Margin there"] == pytest.approx(best["margins"][1], rel=0.1)


def test_a_batch_effect_that_cannot_be_measured_says_why_or_raises(lm):
    if not torch.cuda.is_available():
        with qb.load("gpt2", "gpu-fp16") as away:
            assert qb.batch_effect(away)[0]["Status"] == "unavailable"
    for bad in ({"batch_size": 1}, {"batch_size": []}, {"max_new_tokens": 0}, {"max_new_tokens": 1000}):
        with pytest.raises(ValueError):
            qb.batch_effect(lm, **bad)
