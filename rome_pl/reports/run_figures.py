"""The pictures of a run: each is drawn in one place, from the run's results, for TensorBoard, PNG files and the report.

A function returns ``None`` where the data for its picture are missing. Pictures are :class:`matplotlib.figure.Figure`
objects of their own: pyplot would keep them alive.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from rome_pl.editing.edit import Edit
from rome_pl.files.whole_files import whole_file
from rome_pl.metrics.intervals import bootstrap_interval, wilson_interval
from rome_pl.metrics.scores import SCORES
from rome_pl.reports.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Figure,
    count_edits,
    fitting,
    legend_below,
    mark,
    png,
    styled,
    subplots,
)
from rome_pl.reports.score_tables import STAGES
from rome_pl.reports.stream_figures import loss_curves, perplexity_trend, probabilities, weight_norms

__all__ = ["CAPTIONS", "PANELS", "accuracy_trend", "draw_figures", "relation_bars", "retention_curves", "write_figures"]

Content = Mapping[str, Any]
"""What results.json holds."""
Records = Sequence[Mapping[str, Any]]
"""What records.jsonl holds."""

CAPTIONS = {
    "accuracy": "Accuracy over the stream: means over the edits so far, unedited and right after each edit; "
    "at the end over all records, with 95 % intervals.",
    "retention": "Retention: what earlier edits are worth later in the stream; and of the edits that had taken the "
    "share that still holds, by the number of edits made since.",
    "relations": "Scores by relation, with 95 % intervals and the number of records.",
    "probabilities": "Probability of the new answer (geometric mean over its tokens) before and after each edit.",
    "loss_curves": "Loss and probability of the target during the optimisation of each value.",
    "weight_change": "Norm of the weight's change so far, relative to the original weight, and of each update.",
    "perplexity": "Perplexity of held-out text over the stream.",
}
"""What each picture shows, in the order in which reports show them."""

RELATIONS = 20
"""Most bars of one panel; what is left shares the last one."""
AGES = 8
"""Most groups of ages in the retention curve."""

PANELS = (
    (("ES", "rewrite_acc"), "the edit itself"),
    (("PS", "rephrase_acc"), "paraphrases"),
    (("NS", "locality", "neighbour_acc", "locality_acc"), "what shall stay"),
)
"""For each panel the scores it may show, the first one that there is, and what they are about."""


def draw_figures(
    content: Content, records: Records, edits: Sequence[Edit], changes: Mapping[int, float]
) -> dict[str, Figure]:
    """All pictures of a run that there are data for, by name.

    Args:
        content: What results.json holds.
        records: What records.jsonl holds.
        edits: The run's edits, for their loss curves.
        changes: Norm of the weight's change, relative to the original, by number of edits.
    """
    ordered = sorted(edits, key=lambda edit: edit.index)
    figures = {
        "accuracy": accuracy_trend(content, records),
        "retention": retention_curves(content, records),
        "relations": relation_bars(records),
        "probabilities": probabilities(records),
        "loss_curves": loss_curves(ordered),
        "weight_change": weight_norms(records, changes),
        "perplexity": perplexity_trend(content),
    }
    return {name: figures[name] for name in CAPTIONS if figures[name] is not None}


@styled
def accuracy_trend(content: Content, records: Records) -> Figure | None:
    """Means over the edits so far, before and right after each, and all records' on the final model."""
    ordered = [record for record in records if "immediate" in record.get("values", {})]
    panels = _panels([record["values"]["immediate"] for record in ordered])
    if not panels:
        return None
    figure, axes = subplots(len(panels))
    last = max(record["index"] for record in ordered) + 1
    for panel, (score, subject) in zip(axes, panels, strict=True):
        for stage, style in (("base", {"color": GREY, "linestyle": "--"}), ("immediate", {"color": BLUE})):
            means = _running_mean(ordered, stage, score)
            if means:
                panel.plot(*zip(*means, strict=True), label=STAGES[stage], **style)
        _mark_totals(panel, content, score, last)
        number = content["immediate"][score]["n"]
        panel.set(title=f"{score}: {subject} (n = {number})", ylim=(-0.03, 1.03))
        count_edits(panel, "edits so far", last)
    axes[0].set_ylabel("mean over records")
    return legend_below(figure, axes[0])


def _running_mean(records: Records, stage: str, score: str) -> list[tuple[int, float]]:
    """The mean of a score over the records so far, at each record that has a value, by number of edits."""
    found = [(record["index"] + 1, record["values"].get(stage, {}).get(score, math.nan)) for record in records]
    known = [(edits, value) for edits, value in found if not math.isnan(value)]
    sums = accumulate(value for _, value in known)
    return [(edits, total / number) for number, ((edits, _), total) in enumerate(zip(known, sums, strict=True), 1)]


def _mark_totals(axes: Any, content: Content, score: str, last: int) -> None:
    """The mean over all records at each stage, with its interval, to the right of the last edit."""
    marks = (("base", GREY, "s"), ("immediate", BLUE, "o"), ("final", ORANGE, "D"))
    for place, (stage, colour, marker) in enumerate(marks, start=1):
        entry = content[stage][score] if content[stage] is not None else None
        if entry is not None and entry["value"] is not None:
            label = STAGES[stage] if stage == "final" else None
            mark(axes, last * (1 + 0.05 * place), entry, color=colour, marker=marker, label=label)


@styled
def retention_curves(content: Content, records: Records) -> Figure | None:
    """What earlier edits are worth at points of the stream, and how many still hold by age."""
    if not content.get("retention"):
        return None
    figure, (left, right) = subplots(2)
    _sample_panel(left, content, records)
    _age_panel(right, _by_age(content, records))
    return legend_below(figure, left)


def _sample_panel(axes: Any, content: Content, records: Records) -> None:
    """The score of a sample of earlier edits, by number of edits made."""
    points = content["retention"]
    score = next((name for name in PANELS[0][0] if points[-1]["scores"][name]["value"] is not None), None)
    if score is not None:
        known = [(p["edits"], p["scores"][score]) for p in points if p["scores"][score]["value"] is not None]
        places = [edits for edits, _ in known]
        low, value, high = ([entry[name] for _, entry in known] for name in ("low", "value", "high"))
        axes.fill_between(places, low, high, color=BLUE, alpha=0.15, lw=0)
        axes.plot(places, value, color=BLUE, marker="o", label="sample of earlier edits")
        final = content["final"][score] if content["final"] is not None else None
        if final is not None and final["value"] is not None:
            last = max(record["index"] or 0 for record in records) + 1
            label = f"all records, final model (n = {final['n']})"
            mark(axes, last, final, color=ORANGE, marker="D", label=label)
    numbers = [len(point["held"]) for point in points]
    sample = str(numbers[0]) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
    title = f"{score or 'score'} of earlier edits (n = {sample})"
    axes.set(title=title, ylabel="mean over sampled edits", ylim=(-0.03, 1.03))
    count_edits(axes, "edits so far")


def _age_panel(axes: Any, groups: Sequence[Sequence[tuple[int, bool]]]) -> None:
    """The share of edits that still hold, by groups of similar age."""
    points = []
    for group in groups:
        age = sum(age for age, _ in group) / len(group)
        held = torch.tensor([float(held) for _, held in group])
        low, high = wilson_interval(held)
        mark(axes, age, {"value": float(held.mean()), "low": low, "high": high}, color=BLUE, marker="o")
        points.append((age, sum(held for _, held in group) / len(group)))
    if points:
        axes.plot(*zip(*points, strict=True), color=BLUE, lw=1)
    title = f"edits that had taken (n = {sum(map(len, groups))} looks)"
    axes.set(title=title, ylabel="share that still holds", ylim=(-0.03, 1.03))
    count_edits(axes, "age of the edit (edits begun since)")


def _by_age(content: Content, records: Records) -> list[list[tuple[int, bool]]]:
    """Ages at which edits that had taken were looked at, and whether they held; in groups of similar age."""
    reached = {str(record["case_id"]): record for record in records if "immediate" in record.get("values", {})}
    taken = {name: record for name, record in reached.items() if took(record["values"]["immediate"])}
    looks = [
        (look["age"], bool(look["held"]))
        for point in content["retention"]
        for look in point["held"]
        if str(look["case_id"]) in taken
    ]
    begun = max((record["index"] for record in reached.values()), default=0) + 1
    if content["final"] is not None:
        looks += [(begun - r["index"], took(r["values"]["final"])) for r in taken.values() if "final" in r["values"]]
    looks.sort()
    size = max(1, math.ceil(len(looks) / AGES))
    return [looks[start : start + size] for start in range(0, len(looks), size)]


@styled
def relation_bars(records: Records, stages: Sequence[str] = ("final", "immediate")) -> Figure | None:
    """Mean scores by relation, of each record at the first of some stages at which it was measured."""
    groups = _by_relation(records, stages)
    panels = _panels([values for group in groups.values() for values in group])
    if not panels or groups.keys() <= {"none"}:
        return None
    labels = [f"{fitting(name, 24)} (n = {len(group)})" for name, group in groups.items()]
    left = 0.3 + 0.075 * max(map(len, labels))
    figure, axes = subplots(len(panels), 0.9 + 0.26 * len(groups), left, sharey=True)
    for panel, (score, subject), colour in zip(axes, panels, (BLUE, ORANGE, GREEN), strict=False):
        for place, group in enumerate(groups.values()):
            _bar(panel, place, [values[score] for values in group if score in values], score, colour)
        panel.set(title=f"{score}: {subject}", xlabel="mean over records", xlim=(0, 1.03))
        panel.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set_ylim(len(labels) - 0.4, -0.6)  # the first on top
    return figure


def _by_relation(records: Records, stages: Sequence[str]) -> dict[str, list[Mapping[str, float]]]:
    """Each relation's scores at the first stage that a record has, the largest relation first, the rest together."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for record in records:
        values = record.get("values", {})
        measured = next((values[stage] for stage in stages if stage in values), None)
        if measured is not None:
            groups.setdefault(record["request"]["relation"] or "none", []).append(measured)
    names = sorted(groups, key=lambda name: (-len(groups[name]), name))
    shown, rest = (names, []) if len(names) <= RELATIONS else (names[: RELATIONS - 1], names[RELATIONS - 1 :])
    together = {f"{len(rest)} others": [values for name in rest for values in groups[name]]} if rest else {}
    return {name: groups[name] for name in shown} | together


def _bar(axes: Any, place: int, values: Sequence[float], score: str, colour: str) -> None:
    """The mean of some values as a bar with its interval; none where no value is known."""
    found = torch.tensor([value for value in values if not math.isnan(value)])
    if len(found):
        mean = float(found.mean())
        low, high = wilson_interval(found) if SCORES[score].rate else bootstrap_interval(found)
        arms = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        axes.barh(place, mean, xerr=arms, color=colour, height=0.7, capsize=2, error_kw={"elinewidth": 0.8})


def took(values: Mapping[str, float]) -> bool:
    """Whether a record's scores say that the model gives the new answer: as results.json's ``held`` has it."""
    return values.get("rewrite_match", 0.0) == 1.0


def _panels(values: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """The score that each panel shows, where some record has one, and what it is about."""
    chosen = []
    for scores, subject in PANELS:
        score = next((name for name in scores if any(name in found for found in values)), None)
        if score is not None:
            chosen.append((score, subject))
    return chosen


def write_figures(folder: Path, figures: Mapping[str, Figure]) -> dict[str, bytes]:
    """Write the pictures of a run below its folder, and remove those that an earlier run left there.

    Returns:
        Their contents by name.
    """
    pictures = {name: png(figure) for name, figure in figures.items()}
    for name in CAPTIONS:
        path = folder / "figures" / f"{name}.png"
        if name not in pictures:
            path.unlink(missing_ok=True)
            continue
        with whole_file(path) as work:
            work.write_bytes(pictures[name])
    return pictures
