"""The pictures of causal tracing: heat maps of effects by token and layer, and what trial edits say of the layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rome_pl.reports.drawing import BLUE, COLOURS, GREY, Figure, fitting, mark, styled, subplots
from rome_pl.tracing.indirect_effects import ROLE_NAMES, ROLES, TracedFact

__all__ = ["KIND_TITLES", "effect_maps", "fact_maps", "trial_curve"]

KIND_TITLES = {"hidden": "state after the layer", "mlp": "MLP output", "attention": "attention output"}
"""What was put back, as titles."""
_COLOUR_MAPS = {"hidden": "Purples", "mlp": "Greens", "attention": "Reds"}


@styled
def effect_maps(content: Mapping[str, Any]) -> Figure:
    """Average indirect effect by role and layer, a panel for each kind.

    Args:
        content: What results.json holds.
    """
    tables = {
        kind: torch.tensor([[_number(entry["value"]) for entry in roles[role]] for role in ROLES])
        for kind, roles in content["effects"].items()
    }
    return _maps(tables, [ROLE_NAMES[role] for role in ROLES], content["window"], "average indirect effect")


@styled
def fact_maps(fact: TracedFact, window: int) -> Figure:
    """Indirect effect by token and layer of one fact; subject tokens have a star."""
    labels = [
        fitting(repr(token)[1:-1], 16) + ("*" if (role or "").startswith("subject") else "")
        for token, role in zip(fact.tokens, fact.roles, strict=True)
    ]
    tables: dict[str, torch.Tensor] = {kind: fact.trace.effect(kind) for kind in fact.trace.restored}
    return _maps(tables, labels, window, "indirect effect")


@styled
def trial_curve(content: Mapping[str, Any]) -> Figure:
    """S, ES, PS and NS of trial edits by layer, and beside them what tracing finds there."""
    trial = content["trial"]
    figure, panels = subplots(2)
    left, right = panels
    places = [found["layer"] for found in trial["layers"]]
    for name, colour in zip(("S", *trial["S_of"]), COLOURS, strict=False):
        known = [found for found in trial["layers"] if found["scores"][name]["value"] is not None]
        style = {"lw": 2.0} if name == "S" else {"lw": 1.0, "ls": "--"}
        left.plot(
            [found["layer"] for found in known],
            [found["scores"][name]["value"] for found in known],
            color=colour,
            label=name,
            **style,
        )
        if name == "S":
            for found in known:
                mark(left, found["layer"], found["scores"]["S"], color=colour, marker="o")
    left.axvline(trial["recommended"], color=GREY, lw=0.8, ls=":")
    left.set(
        title=f"{trial['edits']} trial edits a layer", xlabel="layer", ylim=(-0.03, 1.03), xticks=places, ylabel="mean"
    )
    left.legend(loc="lower left")
    entries = content["effects"].get("mlp", {}).get("subject_last", [])
    known_effects = [(layer, entry) for layer, entry in enumerate(entries) if entry["value"] is not None]
    layers = [layer for layer, _ in known_effects]
    right.fill_between(
        layers, *([entry[edge] for _, entry in known_effects] for edge in ("low", "high")), color=BLUE, alpha=0.15, lw=0
    )
    right.plot(layers, [entry["value"] for _, entry in known_effects], color=BLUE)
    right.axvline(trial["recommended"], color=GREY, lw=0.8, ls=":")
    right.set(title="tracing: MLP output at the last subject token", xlabel="layer", ylabel="indirect effect")
    return figure


def _maps(tables: Mapping[str, torch.Tensor], labels: Sequence[str], window: int, title: str) -> Figure:
    left = 0.3 + 0.075 * max(map(len, labels))
    figure, panels = subplots(len(tables), 1.5 + 0.2 * len(labels), left, sharey=True)
    for panel, (kind, table) in zip(panels, tables.items(), strict=True):
        drawn = panel.imshow(
            table.numpy(),
            cmap=_COLOUR_MAPS[kind],
            aspect="auto",
            vmin=0.0,
            vmax=max(1e-6, float(table.nan_to_num().max())),
        )
        over = "layer" if kind == "hidden" else f"centre of {window} layers"
        panel.set(title=KIND_TITLES[kind], xlabel=over)
        panel.grid(visible=False)
        bar = figure.colorbar(drawn, ax=panel, orientation="horizontal", pad=0.3, fraction=0.06)
        bar.set_label(title)
    panels[0].set_yticks(range(len(labels)), labels)
    return figure


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
