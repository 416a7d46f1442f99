"""Run the notebooks as Colab does, in a replica of its image without the GPU: Python 3.13 and the versions of pins.txt.

usage: python tests/colab/replica.py PYTHON313 [NOTEBOOK ...]

Each notebook starts from the image alone. Its setup cell's own %pip lines install from the working copy, and must
change nothing that the image pins and add no more than ADDED. The environment is kept in build/colab.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PINS = Path(__file__).with_name("pins.txt")
BUILD = ROOT / "build" / "colab"
BIN = BUILD / "env" / "bin"
ADDED = {"bitsandbytes", "quantbench"}
HEADLESS = "papermill==2.7.0"  # what it takes to run a notebook without Colab's page; the rest of it is pinned
MODEL = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 1024, "vocab_size": 500,
         "bos_token_id": 0, "eos_token_id": 0}
TINY = {"models": [str(BUILD / "tiny-gpt2")], "sizes": [str(BUILD / "tiny-gpt2"), str(BUILD / "trained-gpt2")],
        "max_new_tokens": [3, 5], "compare_tokens": 4, "batch_sizes": [1, 2], "cell_budget_s": 0.1, "tokens": 300}
# Colab's kernel has google.colab from the start: so the setup cell knows where it is, and so does accelerate.
STARTUP = "import google.colab\n"


def main(python: str, *notebooks: str) -> None:
    build(python)
    base = freeze()
    pins = dict(line.split("==") for line in PINS.read_text().split() if "==" in line)
    wrong = {name: base.get(plain(name)) for name, pin in pins.items() if base.get(plain(name)) != pin}
    if wrong:
        raise SystemExit(f"the replica is not what pins.txt says: {wrong}")
    for path in map(Path, notebooks or sorted((ROOT / "notebooks").glob("*.ipynb"))):
        start = time.monotonic()
        forget(base)
        outputs = run(path.resolve())
        added = check(base)
        print(f"{path.name}: {len(outputs)} outputs without an error in {time.monotonic() - start:.0f} s; the install "
              f"added {', '.join(added)} and changed none of {len(base)} packages", flush=True)
    installed()


def build(python: str) -> None:
    """The image's packages, installed once for each list of pins."""
    built = BUILD / "pins.txt"
    if not (built.is_file() and built.read_text() == PINS.read_text()):
        shutil.rmtree(BUILD, ignore_errors=True)
        command(python, "-m", "venv", BUILD / "env")
        pip("install", "--requirement", PINS)
        pip("install", "--constraint", PINS, HEADLESS)
        shutil.copy(PINS, built)
        (BUILD / "base.json").write_text(json.dumps(freeze(), indent=1))
    startup = BUILD / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    (startup / "00-colab.py").write_text(STARTUP)
    (BUILD / "stub" / "google" / "colab").mkdir(parents=True, exist_ok=True)
    (BUILD / "stub" / "google" / "colab" / "__init__.py").touch()
    (BUILD / "tiny-gpt2").mkdir(exist_ok=True)
    (BUILD / "tiny-gpt2" / "config.json").write_text(json.dumps(MODEL))
    if not (BUILD / "trained-gpt2" / "tokenizer.json").is_file():
        command(BIN / "python", ROOT / "tests" / "colab" / "trained.py", BUILD / "tiny-gpt2",
                ROOT / "quantbench" / "data" / "evaluation.txt", BUILD / "trained-gpt2")
    forget(json.loads((BUILD / "base.json").read_text()))


def forget(base: dict) -> None:
    """Back to the image: remove what an earlier notebook installed."""
    extra = sorted(freeze().keys() - base.keys())
    if extra:
        pip("uninstall", "--yes", *extra)


def run(path: Path) -> list[dict]:
    """Run all with tiny parameters; the outputs of every cell."""
    out = BUILD / "out" / path.stem
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    parameters = tiny(path, out)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    command(BIN / "python", "-m", "papermill", path, out / path.name, "--cwd", ROOT / "notebooks", "--no-progress-bar",
            "-y", json.dumps(parameters), env=environment | {
                "IPYTHONDIR": str(BUILD / "ipython"), "PYTHONPATH": str(BUILD / "stub"), "HF_HUB_OFFLINE": "1",
                "PATH": f"{BIN}:{os.environ['PATH']}", "QUANTBENCH_CACHE": str(BUILD / "cache")})
    cells = json.loads((out / path.name).read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    text = "".join("".join(output.get("text", "")) for output in outputs)
    if any(output["output_type"] == "error" for output in outputs) or "dependency resolver" in text:
        raise SystemExit(f"{path.name}: see {out / path.name}\n{text}")
    for output in outputs:
        if output.get("name") == "stderr":
            print(f"  {path.name} wrote to stderr: {''.join(output['text'])[:300]!r}")
    return outputs


def tiny(path: Path, out: Path) -> dict:
    """Small values for those of the notebook's parameters that have one here, a list where it has a list."""
    known = TINY | {"model": str(BUILD / "trained-gpt2"), "results": str(out / "rows.jsonl")}
    cell = next(cell for cell in json.loads(path.read_text())["cells"]
                if "parameters" in cell["metadata"].get("tags", []))
    found = {}
    for node in ast.parse("".join(cell["source"])).body:
        name, default = node.targets[0].id, ast.literal_eval(node.value)
        if name in known:
            value = known[name]
            found[name] = value[0] if isinstance(value, list) and not isinstance(default, list) else value
    return found


def check(base: dict) -> list[str]:
    """What the install added. Stops where it changed the image or brought more than ADDED."""
    now = freeze()
    changed = {name: (version, now.get(name)) for name, version in base.items() if now.get(name) != version}
    added = sorted(now.keys() - base.keys())
    if changed or set(added) - ADDED:
        raise SystemExit(f"the install changed {changed or 'nothing'} and added {added}; only {sorted(ADDED)} may come")
    return added


def installed() -> None:
    """The package as installed, not the working copy beside the notebooks, finds what it ships."""
    code = ("import quantbench as qb; qb.reference_table(); assert 'site-packages' in qb.__file__, qb.__file__; "
            "import sys; assert 'torch' not in sys.modules")
    command(BIN / "python", "-I", "-c", code, cwd=BUILD)


def freeze() -> dict[str, str]:
    found = subprocess.run([BIN / "python", "-m", "pip", "list", "--format", "json"], capture_output=True, check=True)
    return {plain(package["name"]): package["version"] for package in json.loads(found.stdout)}


def plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def pip(*words: object) -> None:
    command(BIN / "python", "-m", "pip", "--quiet", "--disable-pip-version-check", *words)


def command(*words: object, **options: object) -> None:
    done = subprocess.run(list(map(str, words)), **options)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, words))}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
