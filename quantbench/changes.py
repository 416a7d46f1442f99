"""What changed on a machine between two versions of a library, in sentences computed from the rows."""

from __future__ import annotations

from quantbench.findings import Findings
from quantbench.sides import Entry, Side, Source, differences, holds_one, keys, ratio, sides
from quantbench.view import plain

_GREW = 0.01  # memory is read, not sampled: a change above this share is one


def changes(*runs: Source) -> Findings:
    """What changed on each machine from one run, or one set of versions, to the next, in the order they come.

    A speed is named only where the 95% interval of its ratio excludes 1: "slower by 12% (interval 9–15%)".
    """
    found, said = [side for side in sides(runs, per_source=True) if side.versions], []
    for machine in dict.fromkeys(side.machine for side in found):
        own = [side for side in found if side.machine == machine]
        if len(own) == 1:
            said.append(f"{machine}: measured once, nothing to hold it against.")
        for before, after in zip(own, own[1:]):
            said += [f"{machine}: {_versions(before, after)}", *_changed(before, after)]
    if any("% (interval " in sentence for sentence in said):
        said.append("Percentages are of tokens/sec. An interval knows the repeats of one process, not how a machine "
                    "differs from day to day: measure a change twice before you believe it.")
    return Findings(said)


def _versions(before: Side, after: Side) -> str:
    differ = [f"{plain(name)} {_short(before.versions.get(name))} → {_short(after.versions.get(name))}"
              for name in differences([before.versions, after.versions])]
    return f"{', '.join(differ)}." if differ else "the same versions of everything, measured twice."


def _short(version: object) -> str:
    return "none" if version is None else plain(version)[:12]


def _changed(before: Side, after: Side) -> list[str]:
    said, ties, shared = [], 0, [key for key in keys([before, after]) if key in before.entries and key in after.entries]
    for key in shared:
        old, new = before.entries[key], after.entries[key]
        texts = [text for text in (_speed(old, new), _memory(old, new)) if text]
        said += [f"{key.model}, {key.setting}, {key.workload}: {text}" for text in texts]
        ties += not texts
    if not shared:
        return ["No cell was measured in both."]
    same = f"No change that these repeats can tell from noise: {ties} of {len(shared)} cells."
    return said + ([same] if ties else [])


def _speed(old: Entry, new: Entry) -> str:
    over, span = ratio(new, old)
    if over is None:
        return f"was {old.status or 'measured'}, now {new.status or 'measured'}." if old.rate != new.rate else ""
    if span is None or holds_one(span):
        return ""
    word, least, most = ("slower", 1 - span[1], 1 - span[0]) if over < 1 else ("faster", span[0] - 1, span[1] - 1)
    decimals = 0 if least >= 0.01 else 1
    return (f"{word} by {100 * abs(over - 1):.{decimals}f}% (interval {100 * least:.{decimals}f}–"
            f"{100 * most:.{decimals}f}%), {old.rate:.1f} → {new.rate:.1f} tokens/sec.")


def _memory(old: Entry, new: Entry) -> str:
    said = []
    for name, label in (("weights_gb", "weights"), ("vram_gb", "peak VRAM")):
        was, now = getattr(old.row, name, None), getattr(new.row, name, None)
        if was and now and abs(now / was - 1) > _GREW:
            said.append(f"{label} {was:.3f} → {now:.3f} GB")
    return f"{', '.join(said)}." if said else ""
