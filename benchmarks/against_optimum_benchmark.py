"""Wall time of our sweep against optimum-benchmark 0.6.0 for the same work, on this machine, in one run.

The work: random-weights distilgpt2 and gpt2, CPU FP32, 12 prompt tokens, 64 new tokens, a warm-up and 3 repeats, each
model in a process of its own. Both start from the same checkpoint folders, made before the clock starts; each side is
a whole process, imports included, and the two take turns. A hand-written loop over transformers' generate gives the
tokens/sec that ours are held against.

usage: python benchmarks/against_optimum_benchmark.py PYTHON [ROUNDS [MEMORY]]
where PYTHON has optimum-benchmark==0.6.0, transformers==4.57.3 and datasets 3.6. MEMORY (True or False) is its own
tracking of memory, a second process that polls; ours is in every row and cannot be left out.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODELS = ("distilgpt2", "gpt2")
OURS = """
import json, sys, quantbench as qb
rows = list(qb.sweep(sys.argv[1:], "cpu-fp32", 64, repeats=3, weights="random", progress=False))
print("RATES", json.dumps([row.tokens_per_s for row in rows]))
"""
BY_HAND = """
import json, sys, time, torch
from statistics import median
from transformers import AutoModelForCausalLM
rates = []
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt, seconds = torch.arange(12)[None], []
    for _ in range(4):
        start = time.perf_counter()
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=64, max_new_tokens=64,
                       do_sample=False)
        seconds.append(time.perf_counter() - start)
    rates.append(64 / median(seconds[1:]))
print("RATES", json.dumps(rates))
"""
THEIRS = """
import json, sys
from optimum_benchmark import Benchmark, BenchmarkConfig, InferenceConfig, ProcessConfig, PyTorchConfig
if __name__ == "__main__":
    rates = []
    for folder in sys.argv[1:]:
        scenario = InferenceConfig(latency=True, memory=MEMORY, warmup_runs=1, iterations=3, duration=0,
                                   input_shapes={"batch_size": 1, "sequence_length": 12},
                                   generate_kwargs={"max_new_tokens": 64, "min_new_tokens": 64})
        backend = PyTorchConfig(model=folder, processor=folder, device="cpu", library="transformers",
                                task="text-generation", model_type="gpt2")
        report = Benchmark.launch(BenchmarkConfig(name="run", scenario=scenario, launcher=ProcessConfig(),
                                                  backend=backend))
        rates.append(64 / (report.prefill.latency.mean + report.decode.latency.mean))
    print("RATES", json.dumps(rates))
"""


def checkpoints() -> list[str]:
    """The folders with the random weights, made once by our own loader."""
    from quantbench.loaders import checkpoint
    from quantbench.weights import find

    return [str(checkpoint(find(model, "random"))) for model in MODELS]


def timed(python: str, code: str, arguments: list[str]) -> tuple[float, list[float]]:
    """Wall seconds of a whole process, and the tokens/sec it reports."""
    with tempfile.TemporaryDirectory() as folder:  # optimum-benchmark writes a log where it runs
        script = Path(folder) / "side.py"
        script.write_text(code)
        start = time.perf_counter()
        done = subprocess.run([python, script, *arguments], capture_output=True, text=True, cwd=folder,
                              env=os.environ | {"HF_HUB_OFFLINE": "1"})
        seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    return seconds, json.loads(done.stdout.partition("RATES ")[2].splitlines()[0])


def main(python: str, rounds: str = "3", memory: str = "True") -> None:
    folders, ratios = checkpoints(), []
    for number in range(int(rounds)):
        ours, our_rates = timed(sys.executable, OURS, list(MODELS))
        theirs, their_rates = timed(python, THEIRS.replace("MEMORY", memory), folders)
        _, by_hand = timed(sys.executable, BY_HAND, folders)
        ratios.append(ours / theirs)
        print(f"round {number + 1}: ours {ours:.1f} s, theirs {theirs:.1f} s, ratio {ratios[-1]:.2f}; tokens/sec ours "
              f"{[round(rate, 1) for rate in our_rates]}, theirs {[round(rate, 1) for rate in their_rates]}, by hand {[round(rate, 1) for rate in by_hand]}",
              flush=True)
    print(f"median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
