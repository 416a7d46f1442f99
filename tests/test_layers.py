"""The house's order: a module imports only from lower floors, and what shows results never needs torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "quantbench"
FLOORS = [  # a new module gets its place here
    {"settings", "models", "stats", "plain", "figures", "roofline", "record", "score", "run", "progress"},
    {"meters", "machine", "weights", "texts", "child", "pairing", "fuse"},
    {"estimate", "loaded"},
    {"audit"},
    {"loaders", "windows", "limits"},
    {"graph", "logits"},
    {"engines", "quality"},
    {"trace"},
    {"generate"},
    {"sweep"},
    {"panel"},  # measures and shows: the one place above both wings
]
READING = {"view", "bars", "grid", "tables", "charts", "findings", "published", "memory", "save",
           "report", "sides", "compare", "changes", "quality_view", "pareto", "continuations", "explain", "scaling"}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
HEAVY = {"torch", "transformers", "bitsandbytes", "accelerate"}


def imported(module: str) -> set[str]:
    """Every module that `module` imports, wherever in its file."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}.py: a relative import"
            found |= {f"quantbench.{alias.name}" for alias in node.names} if node.module == "quantbench" else {node.module}
    return found


def ours(module: str) -> set[str]:
    return {name.split(".")[1] for name in imported(module) if name.startswith("quantbench.")}


def others(module: str) -> set[str]:
    return {name.split(".")[0] for name in imported(module)} - {"quantbench"}


def floor(module: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if module in names)


@pytest.mark.parametrize("module", MODULES)
def test_it_has_a_place(module):
    assert module in set().union(*FLOORS, READING), f"give {module}.py a floor in tests/test_layers.py"


@pytest.mark.parametrize("module", sorted(set(MODULES) - READING))
def test_it_imports_only_from_lower_floors(module):
    allowed = set().union(*FLOORS[: floor(module)]) | FLOORS[floor(module)] - {module}
    allowed |= READING if module in FLOORS[-1] else set()
    assert ours(module) <= allowed


@pytest.mark.parametrize("module", sorted(FLOORS[0]))
def test_the_plain_data_floor_needs_only_the_standard_library(module):
    assert others(module) <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", sorted(READING))
def test_the_reading_wing_meets_the_measuring_wing_only_in_plain_data(module):
    assert not others(module) & HEAVY and ours(module) <= FLOORS[0] | READING


def test_only_the_loaders_know_transformers_and_bitsandbytes():
    knowing = {module for module in MODULES if others(module) & {"transformers", "bitsandbytes", "accelerate"}}
    assert knowing == {"loaders", "fuse"}  # and what puts its own in place of transformers' parts


def test_there_are_no_cycles():
    graph, done = {module: ours(module) for module in MODULES}, set()
    while graph:
        free = {module for module, needs in graph.items() if needs <= done}
        assert free, f"a cycle among {sorted(graph)}"
        done |= free
        graph = {module: needs for module, needs in graph.items() if module not in free}


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_small(module):
    text = (PACKAGE / f"{module}.py").read_text()
    assert len(text.splitlines()) <= (320 if module == "record" else 250)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 45, f"{module}.{node.name}"


def test_importing_the_package_is_instant_and_needs_no_torch():
    code = ("import sys, time; start = time.perf_counter(); import quantbench; took = time.perf_counter() - start; "
            "assert 'torch' not in sys.modules and 'pandas' not in sys.modules; print(took)")
    took = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
            for _ in range(3)]
    assert min(took) < 0.3


def test_reading_results_needs_no_torch():
    code = ("import sys, quantbench as qb; qb.table(qb.Run()); qb.findings(qb.Run()); qb.plot_throughput; "
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_function_keeps_its_name_though_a_module_shares_it():
    code = ("import quantbench as qb, quantbench.generate, quantbench.findings, quantbench.sweep\n"
            "assert all(callable(f) for f in (qb.generate, qb.findings, qb.sweep, qb.save))")
    subprocess.run([sys.executable, "-c", code], check=True)
