"""The README's charts, drawn from results/published/; its tables are written by cog, which imports this file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import quantbench as qb

ROOT = Path(__file__).parent.parent
CHARTS = ROOT / "docs" / "charts"
PUBLISHED = ROOT / "results" / "published"
# folder under PUBLISHED -> chart -> how it is drawn, of which rows
PLOTS = {
    "": {"throughput": (qb.plot_throughput, lambda row: True), "memory": (qb.plot_vram, lambda row: True),
         "quality": (qb.plot_quality, lambda row: row.perplexity)},
    "quality": {"quality": (qb.plot_quality, lambda row: True)},
    "why": {"floor": (qb.plot_floor, lambda row: row.trace),
            "scaling": (qb.plot_scaling, lambda row: row.engine == "eager")},
}


def published(folder: str = "") -> dict[str, qb.Run]:
    """The published runs of notebook 01, of notebook 02 ("quality") or 03 ("why"), by their machines' names."""
    return {path.stem: qb.Run.read(path) for path in sorted((PUBLISHED / folder).glob("*.jsonl"))}


def drawings() -> dict[str, tuple[Path, Callable]]:
    """Every chart by its file's name: the results that it shows, and the call that draws it."""
    found = {}
    for folder, charts in PLOTS.items():
        for name, run in published(folder).items():
            for chart, (plot, shows) in charts.items():
                if rows := [row for row in run if shows(row)]:
                    found[f"{name}-{chart}.png"] = PUBLISHED / folder / f"{name}.jsonl", partial(plot, rows)
    return found


def digest(source: Path) -> str:
    """What a chart was drawn from; kept in the picture, so that a stale one can be told."""
    return hashlib.sha256(source.read_bytes()).hexdigest()


def draw() -> None:
    """Write every chart of every published run."""
    CHARTS.mkdir(exist_ok=True)
    for old in CHARTS.glob("*.png"):
        old.unlink()
    for name, (source, plot) in drawings().items():
        plot().savefig(CHARTS / name, dpi=110, metadata={"Source": digest(source)})


def pictures() -> str:
    """Markdown of the throughput charts, with words for those who cannot see them."""
    return "\n\n".join(f"![Tokens per second of every setting on {run[0].machine_name}; the figures are in the table "
                       f"below](docs/charts/{name}-throughput.png)" for name, run in published().items())


def tables() -> str:
    """Markdown of every machine: its table, findings and charts; then what is known of quality, and why."""
    qualities, whys = published("quality"), published("why")
    parts = []
    for name, run in published().items():
        parts += [f"### {run[0].machine_name}", made_by(f"{name}.jsonl", run), qb.findings(run)._repr_markdown_(),
                  f"![Memory of every setting on {run[0].machine_name}](docs/charts/{name}-memory.png)",
                  "<details><summary>Every row</summary>", qb.markdown([row for row in run if row.status == "ok"]),
                  "</details>"]
        if scored := [row for row in qualities.get(name, run) if row.perplexity]:
            made = " " + made_by(f"quality/{name}.jsonl", scored) if name in qualities else ""
            parts += [f"**Quality beside speed.**{made}", qb.quality_findings(scored)._repr_markdown_(),
                      f"![Speed of every setting against its KL divergence from FP32](docs/charts/{name}-quality.png)"]
        parts += why(name, whys[name]) if name in whys else []
    return "\n\n".join(parts)


def why(name: str, run: qb.Run) -> list[str]:
    """Markdown of notebook 03's rows: where a decode step's time goes, and where quantising pays."""
    eager = [row for row in run if row.engine == "eager"]
    return ["**Why.** Where the time of one decode step goes, in percent; *· graph* is a captured step that is "
            "replayed. " + made_by(f"why/{name}.jsonl", run),
            "<details><summary>Every traced row</summary>", qb.show_why([row for row in run if row.trace]).markdown(),
            "</details>", f"![One decode step of every setting and its floor on {run[0].machine_name}](docs/charts/{name}-floor.png)",
            qb.crossovers(eager)._repr_markdown_(),
            f"![Tokens per second against the unquantised setting, by batch and model size, on {run[0].machine_name}]"
            f"(docs/charts/{name}-scaling.png)"]


def made_by(file: str, run: qb.Run) -> str:
    """The file, the day, the versions and the commit."""
    packages = ", ".join(f"{key} {value}" for key, value in run[0].versions.items() if key != "commit")
    return (f"[{file}](results/published/{file}), {run[0].created_at[:10]}: {packages}; "
            f"commit {(run[0].versions.get('commit') or 'unknown')[:12]}.")


if __name__ == "__main__":
    draw()
