"""What README.md and results/README.md say of results/published/: charts, and the text that cog writes into them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import quantbench as qb
from quantbench.conclusions import compared
from quantbench.labels import cells
from quantbench.quantisers import QUANTISERS
from quantbench.settings import BASELINES
from quantbench.tables import Table
from quantbench.wording import listed, markdown_text, span

ROOT = Path(__file__).parent.parent
CHARTS = ROOT / "docs" / "charts"
PUBLISHED = ROOT / "results" / "published"
FIRST_EDITION = (" These rows are of the first edition, whose graph engine joined kernels by hand and whose traces are "
                 "not read ([why](../docs/lab-notes.md)): verdicts come when they are measured anew.")
FOLDERS = ("", "why", "methods", "engines", "prompts", "gpus")  # under PUBLISHED
NAMED = 4  # settings in a sentence: of more their number
STUDENT = "gpt2"  # the model whose speeds the front page says
COSTS = {"Tokens/sec": 1, "VRAM (GB)": 3, "Weights (GB)": 3, "Top-1 agreement": 3, "Accuracy kept": 3}  # -> decimals


@cache
def published(folder: str = "") -> dict[str, qb.Run]:
    """The published runs of a folder by file: what notebooks 01 and 02 measure, or of FOLDERS; GPUs come first, of
    these what has the most rows."""
    runs = {path.stem: qb.Run.read(path) for path in sorted((PUBLISHED / folder).glob("*.jsonl"))}
    return dict(sorted(runs.items(), key=lambda item: (not machine(item[1]).get("gpu"), -len(item[1]))))


def machine(run: qb.Run) -> dict:
    return first(run).machine


def first(run: qb.Run) -> object:
    """A record that says where and with what all of them were made."""
    return next(iter([*run, *run.qualities]))


def eager(run: qb.Run) -> qb.Run:
    return run.only(engine="eager")


def judged(run: qb.Run) -> qb.Run | None:
    return run if run.qualities else None


def steps(run: qb.Run) -> qb.Run:
    """The rows with a trace, of every engine; where none has one, those of batch 1."""
    return qb.Run([*([row for row in run if row.trace] or run.only(batch_size=1)), *run.limits])


def grown(run: qb.Run) -> qb.Run | None:
    """What scaling is drawn from: eager rows, where a baseline is there at two batch sizes or for two models."""
    places = {(row.model, row.batch_size) for row in run
              if row.setting in BASELINES and row.status == "ok" and row.engine == "eager"}
    return eager(run) if len(places) > 1 else None


# folder under PUBLISHED -> chart -> how it is drawn, of which part of a run (None: of none)
PLOTS = {
    "": {"throughput": (qb.plot_throughput, eager), "memory": (qb.plot_vram, eager),
         "quality": (qb.plot_quality, judged)},
    "why": {"floor": (qb.plot_floor, steps), "scaling": (qb.plot_scaling, grown)},
    "prompts": {"prompts": (qb.plot_prompts, lambda run: run)},
}


def drawings() -> dict[str, tuple[Path, Callable]]:
    """Every chart by its file's name: the results that it shows, and the call that draws it."""
    return {f"{name}-{chart}.png": (PUBLISHED / folder / f"{name}.jsonl", partial(plot, shown))
            for folder, charts in PLOTS.items() for name, run in published(folder).items()
            for chart, (plot, part) in charts.items() if (shown := part(run)) is not None}


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


# ---- the front page ----

def chart() -> str:
    """Markdown of one chart, the first machine's, with words for those who cannot see it."""
    name, run = next(iter(published().items()))
    return (f"![Tokens per second of every setting on {first(run).machine_name}; the figures are in "
            f"results/README.md](docs/charts/{name}-throughput.png)")


def results() -> str:
    """A sentence on the speed of each machine, and one on quality, as bullets."""
    said = [f"**{markdown_text(first(run).machine_name)}.** {speed(run.only(model=STUDENT))}"
            for run in published().values()]
    return "\n".join(f"- {sentence}" for sentence in [*said, library(next(iter(published("methods")))), *kept()])


def library(name: str) -> str:
    """Per engine, how fast ways of quantising decode beside the unquantised setting in the same engine, by rounds; and
    from which length of the prompt on another one answers first."""
    run, prompts, rates = published("methods")[name], published("prompts"), []
    named = [cell for cell in cells(run) if cell.measured]
    for engine in dict.fromkeys(cell.row.engine for cell in named):
        base, *others = sorted((cell for cell in named if cell.row.engine == engine),
                               key=lambda cell: QUANTISERS[qb.SETTINGS[cell.row.setting].quantisation] is not
                               QUANTISERS["none"])
        ratios = [(cell.row.setting_label, compared(cell, base, "decode_tokens_per_s")) for cell in others]
        told = listed([f"{label} {one.value:.2f} ({span(one.interval, '.2f')})" for label, one in ratios])
        rates.append(f"{told} times {base.row.setting_label} in {engine}")
    said = f"**Which library.** {markdown_text(f'{named[0].title}, decode on {first(run).machine_name}')}: " \
           f"{markdown_text('; '.join(rates))}."
    if name in prompts:
        where, found = qb.prompt_findings(prompts[name])[0].split(": ", 1)
        on = f"{where.split(', ', 1)[1]}, {prompts[name][0].max_new_tokens} new tokens"
        said += " " + markdown_text(f"Prompt included ({on}): {found}")
    return said


def speed(run: qb.Run) -> str:
    """Which settings are faster and slower than the baseline at the longest length, as far as rounds tell, and the most
    that each other engine makes of one; else what the findings say."""
    every, run = qb.ratios(run).dropna(subset=["Low", "High"]), eager(run)
    found = every[every["Engine"] == "eager"]
    if found.empty:
        return markdown_text(qb.findings(run)[0])
    verdicts = {"faster": "faster than", "slower": "slower than", "tie": "a tie with"}
    length, measured = found["Workload"].iloc[-1], {row.setting for row in run if row.status == "ok"}
    base = next(qb.SETTINGS[key].label for key in BASELINES if key in measured)
    said = []
    for verdict, rows in found[found["Workload"] == length].groupby("Verdict", sort=False):
        times = dict.fromkeys(f"{end:.2f}" for end in (rows["Ratio"].min(), rows["Ratio"].max()))
        named = listed(list(rows["Setting"])) if len(rows) <= NAMED else f"{len(rows)} settings"
        said.append(f"{named} {'are' if len(rows) > 1 else 'is'} {verdicts[verdict]} {base} "
                    f"({' to '.join(times)} times)")
    for engine, rows in every[(every["Workload"] == length) & (every["Engine"] != "eager")].groupby("Engine"):
        best = rows.loc[rows["Ratio"].idxmax()]
        said.append(f"the most in {engine} is {best['Setting']}, {best['Ratio']:.1f} "
                    f"({span((best['Low'], best['High']), '.1f')}) times {base} in eager")
    return markdown_text(f"{cells(run)[0].title}, {length}: {'; '.join(said)}.")


def kept() -> list[str]:
    """Of the first model with a quality: which of its settings keep 99% of the reference's accuracy."""
    words = {True: "kept by", False: "not kept by", None: "not told of"}
    for run in filter(judged, published().values()):
        found = [one for one in run.qualities if one.status == "ok" and one.setting != one.reference]
        said = [f"{words[answer]} {listed(names)}" for answer in words
                if (names := [one.setting_label for one in found if one.keeps_99 is answer])]
        if said:
            return [f"**Quality.** {markdown_text(qb.MODELS[found[0].model].label)}, {found[0].tokens:,} tokens: 99% "
                    f"of the accuracy of {qb.SETTINGS[found[0].reference].label} is {markdown_text('; '.join(said))}."]
    return []


def costs() -> str:
    """Markdown of five settings of a model with real weights: what they cost and what they keep."""
    run = next(filter(judged, published().values()))
    frame = qb.quality_table(run)
    frame = frame[frame.index == frame.index[0]].head(5)
    caption = [frame.index[0], first(run).machine_name, str(frame["Workload"].iloc[0]), "real weights"]
    return Table(frame[["Setting", *COSTS, "Keeps 99%"]], caption, decimals=COSTS).markdown()


# ---- results/README.md ----

def tables() -> str:
    """Markdown of every machine: findings, charts and tables; then what is known of quality, and why."""
    parts = []
    for name in dict.fromkeys(name for folder in FOLDERS for name in published(folder)):
        run = published().get(name)
        here = next(first(published(folder)[name]) for folder in FOLDERS if name in published(folder)).machine_name
        parts += [f"## {here}"] + ([] if run is None else [
            made_by(f"{name}.jsonl", run), qb.findings(run)._repr_markdown_(),
            picture(name, "throughput", f"Tokens per second of every setting on {here}"),
            picture(name, "memory", f"Memory of every setting on {here}"),
            folded("Every row", qb.show(row for row in run if row.status == "ok").markdown()), *quality(name, run)])
        parts += why(name, published("why")[name]) if name in published("why") else []
        parts += beside("methods", "Which library quantises", name, "decode")
        parts += beside("engines", "Three engines", name, "decode")
        parts += prompts(name)
        parts += beside("gpus", "One GPU and two", name, "decode", "prefill")
    return "\n\n".join(parts)


def quality(name: str, run: qb.Run) -> list[str]:
    """Markdown of a run's qualities."""
    return [] if judged(run) is None else [
        "### Quality beside speed", qb.quality_findings(run)._repr_markdown_(),
        folded("Every setting", qb.show_quality(run).markdown()),
        picture(name, "quality", "Speed of every setting against its KL divergence from the reference")]


def why(name: str, run: qb.Run) -> list[str]:
    """Markdown of notebook 03's rows: where a decode step's time goes, and where quantising pays."""
    here = first(run).machine_name
    return ["### Why", made_by(f"why/{name}.jsonl", run), "One decode step; *· graph* and *· compile* replay a captured"
            " one." + ("" if any(row.trace for row in run) else FIRST_EDITION),
            picture(name, "floor", f"One decode step and its floor on {here}"),
            folded("Every row", qb.show(qb.why_table(steps(run))).markdown())] + ([] if grown(run) is None else [
            picture(name, "scaling", f"Tokens per second over the unquantised setting's, on {here}")])


def prompts(name: str) -> list[str]:
    """Markdown of prompt lengths by batch sizes on a machine: which setting answers first, and every rate."""
    if (run := published("prompts").get(name)) is None:
        return []
    return ["### Prompts and batches", made_by(f"prompts/{name}.jsonl", run), qb.prompt_findings(run)._repr_markdown_(),
            picture(name, "prompts", f"Prefill and decode by prompt length on {first(run).machine_name}"),
            folded("Every row", qb.show(qb.prompt_table(run)).markdown())]


def beside(folder: str, title: str, name: str, *figures: str) -> list[str]:
    """Markdown of one comparison on a machine: its rates over the unquantised setting's, by rounds; and every row."""
    if (run := published(folder).get(name)) is None:
        return []
    base = next(key for key in ("gpu-bf16", *BASELINES) if any(row.setting == key for row in run))
    parts = [f"### {title}", made_by(f"{folder}/{name}.jsonl", run)] + ([library(name)] if folder == "methods" else [])
    for figure in figures:
        ratios = qb.ratios(run, base, f"{figure}_tokens_per_s").reset_index(drop=True)
        caption = [f"{figure.title()} tokens/sec over {qb.SETTINGS[base].label}, eager", first(run).machine_name]
        ratios = ratios[ratios["Rounds"] > 0].drop(columns="Model")  # none where all were measured apart
        told = Table(ratios, caption, decimals={"Ratio": 2, "Low": 2, "High": 2, "Rounds": 0})
        parts += [told.markdown()] * bool(len(ratios))
    return [*parts, folded("Every row", qb.show(run).markdown())]


def reference() -> str:
    """Markdown of the student's T4 table, corrected by inference, with the first machine's rates beside it."""
    return qb.show(qb.reference_table(next(iter(published().values())))).markdown()


def picture(name: str, chart: str, words: str) -> str:
    return f"![{words}](../docs/charts/{name}-{chart}.png)"


def folded(title: str, markdown: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{markdown}\n</details>"


def made_by(file: str, run: qb.Run) -> str:
    """The file, the day, the versions and the commit."""
    made = first(run)
    packages = ", ".join(f"{key} {value}" for key, value in made.versions.items() if key != "commit")
    commit = made.versions.get("commit") or "unknown"
    changed = " and changes not committed then" if commit.endswith("-dirty") else ""
    return f"[{file}](published/{file}), {made.created_at[:10]}: {packages}; commit {commit[:12]}{changed}."


if __name__ == "__main__":
    draw()
