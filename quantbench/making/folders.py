"""What a folder of weights holds: whether it is whole, and a revision that changes when any of it does."""

import hashlib
import json
from pathlib import Path

import safetensors

from quantbench.weights import INDEX, ONE_FILE, SEED, TOKENIZERS, Source, files_of
from quantbench.wording import cut

SAMPLE = 2**16  # bytes
NUMBERS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}  # others are codes: nothing without a scale


def local(name: str, folder: Path, weights: str | None) -> Source:
    """The source of a local folder or GGUF file. Raises ValueError for none, or for others than `weights`."""
    if folder.is_file():
        if weights not in (None, "pretrained"):
            raise ValueError(f"{name!r} has weights of its own, not {weights} ones")
        return Source(name, "pretrained", _digest([folder]), gguf=folder)
    has = {file.name for file in folder.iterdir()}
    wrong = "holds an adapter: merge it into its model, and save that" if "adapter_config.json" in has else \
        "holds no config.json: not a transformers checkpoint" if "config.json" not in has else \
        "is no package: ask for 'pretrained' or 'random' weights" if weights == "bundled" else None
    if wrong:
        raise ValueError(f"the folder {name!r} {wrong}")
    if weights != "random" and has & {ONE_FILE, INDEX}:
        return Source(name, "pretrained", revision(folder), folder)
    others = files_of(folder, [f"*.{end}" for end in "safetensors index.* bin pt* ckpt h5 msgpack onnx gguf".split()])
    if weights == "random" or weights is None and not others:
        return Source(name, "random", f"seed {SEED}, {revision(folder)}", like=folder)
    raise ValueError(no_weights(f"the folder {name!r}", others))


def no_weights(where: str, others: list[Path]) -> str:
    found = f", only {others[0].name}" if others else ""
    return f"{where} holds no {ONE_FILE}{found}: pickled weights are never loaded"


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, by name: missing, cut short, or pointers that git-lfs left."""
    names = [ONE_FILE]
    if not (folder / ONE_FILE).is_file() and (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())) or [""]
            if any(Path(name).name != name or Path(name).suffix != ".safetensors" for name in names):
                raise ValueError(names)
        except (LookupError, AttributeError, TypeError, ValueError, OSError, RecursionError):
            return f"{INDEX} is no index of weights beside it"
    for file in [*files_of(folder), *(folder / name for name in names)]:
        if not file.is_file():
            return f"{file.name} is missing"
        with file.open("rb") as content:
            if content.read(20).startswith(b"version https://git"):
                return f"{file.name} is a pointer that git-lfs left, not the file: run `git lfs pull`"
        try:
            if file.suffix == ".safetensors":
                with safetensors.safe_open(file, framework="np") as held:
                    kinds = {held.get_slice(key).get_dtype() for key in held.keys() if key.endswith(".weight")}
                if (codes := kinds - NUMBERS) and b'ion_config"' not in (folder / "config.json").read_bytes():
                    return f"{file.name} holds weights of type {min(codes)}, and config.json tells of no quantisation"
        except (safetensors.SafetensorError, OSError) as error:
            return f"{file.name} is cut short or damaged ({cut(error, 100)})"
    return None


def revision(folder: Path) -> str:
    """Of configuration, tokenizer and weights, and whether there is a tokenizer."""
    own = files_of(folder, ("*.json", "*.safetensors", *TOKENIZERS))
    return _digest(own) + ("" if files_of(folder) else ", no tokenizer")


def _digest(files: list[Path]) -> str:
    """Of a large file its size, its time and samples throughout: reading gigabytes would take longer than a load."""
    digest = hashlib.sha256()
    for file in files:
        facts, step = file.stat(), SAMPLE
        digest.update(f"{file.name} {facts.st_size}".encode())
        if facts.st_size > 256 * SAMPLE:
            step = facts.st_size // 256
            digest.update(str(facts.st_mtime_ns).encode())
        with file.open("rb") as content:
            for place in range(0, facts.st_size, step):
                content.seek(place)
                digest.update(content.read(SAMPLE))
    return f"files {digest.hexdigest()[:12]}"
