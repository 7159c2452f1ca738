"""Pictures of how a run went: the optimisation of its values, what it did to the weight, and to ordinary text.

As those of :mod:`rome_pl.reports.run_figures`, which lists them all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from rome_pl.editing.edit import Edit
from rome_pl.reports.drawing import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    Figure,
    count_edits,
    fitting,
    legend_below,
    styled,
    subplots,
)

__all__ = ["LABELLED", "loss_curves", "perplexity_trend", "probabilities", "weight_norms"]

Content = Mapping[str, Any]
"""What results.json holds."""
Records = Sequence[Mapping[str, Any]]
"""What records.jsonl holds."""

LABELLED = 10
"""Most curves of one picture that get a label and a colour each; more are drawn as a bundle with its median."""
BUNDLE = 200
"""Most curves of a bundle: evenly spread over the stream."""
LABEL = 50
"""Longest label of a curve, in characters; of a longer one the end is shown, where the answer stands."""


@styled
def probabilities(records: Records) -> Figure | None:
    """The new answer's probability before and after each edit, and on the final model."""
    edits = [record for record in records if record.get("probability", {}).get("before") is not None]
    if not edits:
        return None
    figure, (axes,) = subplots(1)
    size = max(2.0, min(6.0, 300 / len(edits)))
    columns: list[tuple[str, Callable[[Mapping[str, Any]], float | None], dict[str, Any]]] = [
        ("before", lambda r: r["probability"]["before"], {"color": GREY, "marker": "o", "mfc": "none"}),
        ("after", lambda r: r["probability"]["after"], {"color": BLUE, "marker": "o"}),
        ("final model", _final_probability, {"color": ORANGE, "marker": "D", "ms": size * 0.7}),
    ]
    for label, value, style in columns:
        found = [(record["index"] + 1, chance) for record in edits if (chance := value(record)) is not None]
        if found:
            axes.plot(*zip(*found, strict=True), **{"linestyle": "none", "ms": size, "label": label} | style)
    refused = [record["index"] + 1 for record in edits if record["status"] != "applied"]
    if refused:
        axes.plot(refused, [-0.06] * len(refused), "x", color="black", ms=4, clip_on=False, label="not applied")
    axes.set(ylabel="probability of the new answer", ylim=(-0.09, 1.03), title=f"n = {len(edits)}")
    count_edits(axes, "edit")
    return legend_below(figure, axes)


@styled
def loss_curves(edits: Sequence[Edit]) -> Figure | None:
    """Loss and probability of the target at each evaluation; of many edits as a bundle with its median."""
    edits = [edit for edit in edits if edit.steps]
    if not edits:
        return None
    figure, (left, right) = subplots(2)
    few = len(edits) <= LABELLED
    for panel, quantity in ((left, "loss"), (right, "probability")):
        curves = [[getattr(step, quantity) for step in edit.steps] for edit in edits]
        if few:
            for edit, curve, colour in zip(edits, curves, COLOURS, strict=False):
                request = edit.request
                label = f"#{edit.index + 1} " + fitting(f"{request.prompt} → {request.target_new}", LABEL)
                panel.plot(curve, marker=".", color=colour, label=label)
        for curve in [] if few else curves[:: -(-len(curves) // BUNDLE)]:
            panel.plot(curve, color=BLUE, lw=0.6, alpha=max(0.1, min(0.4, 20 / len(edits))))
        if not few:
            # An edit that ended early stays in the median with its last value.
            length = max(map(len, curves))
            columns = zip(*(curve + curve[-1:] * (length - len(curve)) for curve in curves), strict=True)
            panel.plot(
                [median(column) for column in columns], color="black", lw=2, label=f"median of {len(edits)} edits"
            )
        count_edits(panel, "evaluation")
    losses = [step.loss for edit in edits for step in edit.steps]
    left.set(ylabel="loss (nats)", yscale="log" if 0 < 10 * min(losses) < max(losses) else "linear")
    right.set(ylabel="probability of the target", ylim=(-0.02, 1.02))
    return legend_below(figure, left, columns=2 if few else 1)


@styled
def weight_norms(records: Records, changes: Mapping[int, float]) -> Figure | None:
    """Norm of the accumulated change by number of edits, where edits accumulate, and of each update."""
    updates = [r for r in records if r.get("update_norm") is not None]
    accumulated = sorted(changes.items()) if any(changes.values()) else []
    drawn = [bool(accumulated), bool(updates)]
    if not any(drawn):
        return None
    figure, axes = subplots(sum(drawn))
    if accumulated:
        axes[0].plot(*zip(*accumulated, strict=True), color=BLUE, marker="." if len(accumulated) <= 100 else None)
        axes[0].set(title="accumulated", ylabel="‖change‖ / ‖original weight‖", ylim=(0, None))
        count_edits(axes[0], "edits so far")
    for applied, label, style in (
        (True, "applied", {"color": ORANGE}),
        (False, "not applied", {"color": GREY, "mfc": "none"}),
    ):
        norms = [(r["index"] + 1, r["update_norm"]) for r in updates if (r["status"] == "applied") == applied]
        if norms:
            axes[-1].plot(*zip(*norms, strict=True), "o", ms=3.5, label=f"{label} (n = {len(norms)})", **style)
    if updates:
        axes[-1].set(title="each edit's own", ylabel="Frobenius norm of the update", ylim=(0, None))
        count_edits(axes[-1], "edit")
        legend_below(figure, axes[-1])
    return figure


@styled
def perplexity_trend(content: Content) -> Figure | None:
    """Held-out perplexity of the unedited model, at points of the stream, and of the final model."""
    measured = content["perplexity"]
    points = [(0, measured["base"])] if measured["base"] is not None else []
    points += [(p["edits"], p["perplexity"]) for p in content.get("retention") or [] if p["perplexity"] is not None]
    if measured.get("final") is not None:
        last = max((record["index"] or 0 for record in content["records"]), default=0) + 1
        points = [*(point for point in points if point[0] != last), (last, measured["final"])]
    if len(points) < 2:
        return None
    figure, (axes,) = subplots(1)
    if measured["base"] is not None:
        axes.axhline(measured["base"], color=GREY, linestyle="--", label=f"unedited: {measured['base']:.4g}")
    label = f"final: {measured['final']:.4g}" if measured.get("final") is not None else "during the stream"
    axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", label=label)
    values = [value for _, value in points]
    axes.set_ylabel("perplexity per token")
    count_edits(axes, "edits so far")
    if max(values) > 10 * min(values):
        axes.set_yscale("log")
    elif max(values) < 1.02 * min(values):  # rounding is no news
        axes.set_ylim(0.98 * min(values), 1.02 * max(values))
    return legend_below(figure, axes)


def _final_probability(record: Mapping[str, Any]) -> float | None:
    final = record["scores"].get("final")
    return math.exp(final["rewrite"][0]) if final is not None else None
