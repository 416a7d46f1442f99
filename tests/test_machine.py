"""What a machine allows: control groups of both versions, as trees of files; GPUs that a process may see."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pynvml
import pytest
import torch

from quantbench import machine
from quantbench.records import Measurement

GB = 10**9


def tree(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A system of these /proc/self/cgroup and files below /sys/fs/cgroup."""
    everything = {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in everything.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def memory(folder: str, most: str | int, used: int, cache: int = 0, version: int = 2) -> dict[str, str]:
    names = ("memory.max", "memory.current", "inactive_file") if version == 2 else \
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "inactive_file 7\ntotal_inactive_file")
    texts = (f"{most}\n", f"{used}\n", f"anon 5\n{names[2]} {cache}\nslab 3\n")
    return {f"{folder}/{name}": text for name, text in zip((*names[:2], "memory.stat"), texts)}


@pytest.mark.parametrize("groups, files, expected", [
    ("0::/\n", memory("", 8 * GB, 3 * GB, GB) | {"cpu.max": "150000 100000\n"}, (8 * GB, 6 * GB, 1.5)),
    ("0::/\n", memory("", "max", GB) | {"cpu.max": "max 100000\n"}, (math.inf,) * 3),
    ("0::/pod/box\n",  # nested: the parent allows less, and others used more of it
     memory("pod", 4 * GB, 3 * GB) | memory("pod/box", 6 * GB, GB) | {
         "pod/box/cpu.max": "max 100000\n", "pod/cpu.max": "50000 100000\n"}, (4 * GB, GB, 0.5)),
    ("0::/elsewhere/box\n", memory("", 2 * GB, 3 * GB), (2 * GB, 0, math.inf)),  # a container's own group is its top
    ("4:memory:/a/b\n3:cpuset:/\n2:cpu,cpuacct:/a\n1:name=systemd:/\n0::/\n",
     memory("memory", 2**63 - 4096, 9 * GB, 0, 1) | memory("memory/a", 5 * GB, 2 * GB, GB, 1) | {
         "cpu/a/cpu.cfs_quota_us": "200000\n", "cpu/a/cpu.cfs_period_us": "100000\n", "cpu/cpu.cfs_quota_us": "-1\n",
         "cpu/cpu.cfs_period_us": "100000\n"}, (5 * GB, 4 * GB, 2)),
    ("1:memory:/\n0::/x\n", memory("unified/x", 3 * GB, GB), (3 * GB, 2 * GB, math.inf)),  # both versions at once
    ("0::/\n", {"memory.max": "5000000000\n"}, (5 * GB, math.inf, math.inf)),
    ("0::/\n", {"memory.max": "", "cpu.max": "a b c\n", "memory.current": "3"}, (math.inf,) * 3)])
def test_the_smallest_limit_up_the_tree_of_control_groups_holds(tmp_path, groups, files, expected):
    assert tuple(machine.group_limits(tree(tmp_path, groups, files)).values()) == expected


def test_a_processors_name_tells_it_from_the_next_years():
    assert any(map(str.isdigit, machine.facts()["cpu"]))  # "AMD EPYC" is what several generations say of themselves


def test_limits_are_in_the_facts_and_in_what_is_free(monkeypatch, tmp_path):
    assert set(machine.group_limits(tmp_path).values()) == {math.inf}  # no such system
    monkeypatch.setattr(machine, "group_limits", lambda: {"bytes": 5 * 10**7, "free": 10**7, "cores": 0.5})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = machine._hardware.__wrapped__()
    assert (found["ram_bytes"], found["cores"], machine.free_bytes("cpu")) == (5 * 10**7, 1, 10**7)
    assert Measurement(model="m", setting="cpu-fp32", max_new_tokens=1, machine=found).machine["gpu_visible"] == ""


def test_threads_are_those_of_now():
    before = machine.facts()["torch_threads"]
    try:
        torch.set_num_threads(before + 1)
        assert machine.facts()["torch_threads"] == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tracked", [True, False])
def test_the_commit_is_that_of_the_checkout_which_has_the_package_not_of_one_around_it(tmp_path, tracked):
    inside = tmp_path / ".venv"
    shutil.copytree(Path(machine.__file__).parent, inside / "quantbench", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".gitignore").write_text("" if tracked else ".venv\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    for asked in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "all of it"]):
        subprocess.run(["git", *asked], cwd=tmp_path, check=True)
    said = subprocess.check_output([sys.executable, "-c", "from quantbench import machine as m; print(m._commit())"],
                                   cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(inside)}, text=True).strip()
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path, text=True).strip()
    assert said == (head if tracked else "None")


@pytest.mark.parametrize("kind, parted, joules", [("GPU", 0, 2.0), ("GPU", 1, None), ("MIG", 1, None)])
def test_meters_read_the_gpu_or_the_part_of_one_that_torch_has(monkeypatch, kind, parted, joules):
    def handle(name):
        if name != f"{kind}-1234":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return name

    monkeypatch.setattr(machine.torch.cuda, "get_device_properties", lambda _: type("Properties", (), {"uuid": "1234"}))
    fake = {"Init": lambda: None, "DeviceGetHandleByUUID": handle, "DeviceGetMigMode": lambda _: [parted, parted],
            "DeviceGetTotalEnergyConsumption": lambda _: 2000}
    for name, does in fake.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", does)
    machine._gpu.cache_clear()
    assert machine._gpu(0) == f"{kind}-1234" and machine.energy_j("cuda") == joules and machine.energy_j("cpu") is None
    machine._gpu.cache_clear()


def test_the_plan_for_many_gpus_is_what_its_code_prints(capsys):
    text = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    code, table = re.search(r"```python\n((?:(?!```).)*)```\n\n(\|.*?)\n\n", text, re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out.strip() == table
