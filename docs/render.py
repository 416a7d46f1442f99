"""The README's charts, drawn from results/published/; its tables are written by cog, which imports this file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import quantbench as qb

ROOT = Path(__file__).parent.parent
CHARTS = ROOT / "docs" / "charts"
PLOTS = {"throughput": qb.plot_throughput, "memory": qb.plot_vram, "quality": qb.plot_quality}


def published() -> dict[str, qb.Run]:
    """Every published run by its file's name."""
    return {path.stem: qb.Run.read(path) for path in sorted((ROOT / "results" / "published").glob("*.jsonl"))}


def charts(run: qb.Run) -> dict:
    """What can be drawn of a run: quality only where it was measured."""
    return {name: plot for name, plot in PLOTS.items() if name != "quality" or any(row.perplexity for row in run)}


def digest(name: str) -> str:
    """What a chart was drawn from; kept in the picture, so that a stale one can be told."""
    return hashlib.sha256((ROOT / "results" / "published" / f"{name}.jsonl").read_bytes()).hexdigest()


def draw() -> None:
    """Write every chart of every published run."""
    CHARTS.mkdir(exist_ok=True)
    for old in CHARTS.glob("*.png"):
        old.unlink()
    for name, run in published().items():
        for chart, plot in charts(run).items():
            plot(run).savefig(CHARTS / f"{name}-{chart}.png", dpi=110, metadata={"Source": digest(name)})


def pictures() -> str:
    """Markdown of the throughput charts, with words for those who cannot see them."""
    return "\n\n".join(f"![Tokens per second of every setting on {run[0].machine_name}; the figures are in the table "
                       f"below](docs/charts/{name}-throughput.png)" for name, run in published().items())


def tables() -> str:
    """Markdown of every published run: its table, its findings, its charts, and its quality where it was measured."""
    parts = []
    for name, run in published().items():
        commit = run[0].versions.get("commit") or "unknown"
        packages = ", ".join(f"{key} {value}" for key, value in run[0].versions.items() if key != "commit")
        parts.append(f"### {run[0].machine_name}\n\n"
                     f"[{name}.jsonl](results/published/{name}.jsonl), {run[0].created_at[:10]}: {packages}; "
                     f"commit {commit[:12]}.\n\n"
                     f"{qb.markdown([row for row in run if row.status == 'ok'])}\n\n"
                     f"{qb.findings(run)._repr_markdown_()}\n\n"
                     f"![Memory of every setting on {run[0].machine_name}](docs/charts/{name}-memory.png)")
        if "quality" in charts(run):
            parts.append(f"Quality beside speed:\n\n{qb.quality_findings(run)._repr_markdown_()}\n\n"
                         f"![Speed of every setting against its KL divergence from FP32](docs/charts/{name}-quality.png)")
    return "\n\n".join(parts)


if __name__ == "__main__":
    draw()
