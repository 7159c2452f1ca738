"""The tables of a run on the console."""

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from rome_pl.editing.edit import Edit
from rome_pl.metrics import ProbeScores
from rome_pl.reports.score_tables import COUNTERFACT, STAGES, interval_text, measured_scores, measured_stages
from rome_pl.utils.console import escape

__all__ = ["edit_table", "score_table"]


def edit_table(edits: Sequence[Edit]) -> Table:
    """One line per edit: which answer the model prefers, before and after, as percentages."""
    stages = ["base", "immediate"] + ["final"] * any("final" in edit.scores for edit in edits)
    table = Table(title="Probability of the true → the new answer, in %", box=box.SIMPLE_HEAD)
    table.add_column("prompt", overflow="fold")
    table.add_column("true → new", overflow="fold")
    for stage in stages:
        table.add_column(STAGES[stage], justify="right", no_wrap=True)
    table.add_column("status", overflow="fold")
    for edit in edits:
        request = edit.request
        table.add_row(
            escape(request.prompt),
            escape(f"{request.target_true or '?'} → {request.target_new}"),
            *(_pair(edit.scores.get(stage)) for stage in stages),
            edit.status + " (held already)" * edit.held_already + (f": {escape(edit.reason)}" if edit.reason else ""),
        )
    return table


def score_table(content: dict[str, Any]) -> Table:
    """The scores of a run with their 95 % intervals, CounterFact's first; in per cent, which fits 80 columns."""
    stages = measured_stages(content)
    table = Table(
        title=f"Scores in % ({content['mode']} mode), with 95 % intervals",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ["score", *(STAGES[stage] for stage in stages), "n"]:
        table.add_column(name, justify="left" if name == "score" else "right", no_wrap=True, min_width=len(name))
    scores = measured_scores(content)
    for score, following in zip(scores, [*scores, None][1:], strict=True):
        entries = [content[stage][score] for stage in stages]
        ends = following is None or (score in COUNTERFACT) != (following in COUNTERFACT)
        cells = [interval_text(entry, 0) for entry in entries]
        table.add_row(score, *cells, str(entries[-1]["n"]), end_section=ends)
    if content["perplexity"]["base"] is not None:
        cells = [_number(content["perplexity"].get(stage)) for stage in stages]
        table.add_row("perplexity", *cells, "")
    if content.get("divergence") is not None:
        table.add_row("KL (nats)", *[""] * (len(stages) - 1), _number(content["divergence"]), "")
    return table


def _pair(scores: ProbeScores | None) -> str:
    if scores is None:
        return ""
    new, true = (None if value is None else math.exp(value) for value in scores.rewrite)
    assert new is not None  # every request has a new target
    if true is None:
        return f"{new:.1%}".rstrip("%")
    shown = [f"{100 * true:.1f}", f"{100 * new:.1f}"]
    shown[new > true] = f"[bold]{shown[new > true]}[/bold]"
    return " → ".join(shown)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
