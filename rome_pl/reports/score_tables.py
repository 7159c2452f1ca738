"""A run's scores as text: for papers (Markdown), for spreadsheets (CSV), and what each score is."""

import csv
import io
from collections.abc import Mapping
from typing import Any

from rome_pl.editing.outcome import held_already
from rome_pl.utils.markdown import markdown_table

__all__ = [
    "COUNTERFACT",
    "MEANINGS",
    "STAGES",
    "csv_table",
    "interval_text",
    "measured_scores",
    "measured_stages",
    "outcome_counts",
    "score_markdown",
]

STAGES = {"base": "unedited", "immediate": "just edited", "final": "final model"}
"""When scores are measured, and what to call it."""

OUTCOMES = ("applied", "rejected", "skipped", "rolled_back")
"""What can become of a record."""

MEANINGS = {
    "ES": "the new answer is likelier than the true one after the rewrite prompt",
    "EM": "mean difference of the two answers' probabilities there",
    "PS": "the new answer is likelier than the true one after paraphrases of the prompt",
    "PM": "mean difference of the two answers' probabilities there",
    "NS": "the true answer is likelier than the new one after prompts about other subjects",
    "NM": "mean difference of the two answers' probabilities there",
    "S": "harmonic mean of ES, PS and NS",
    "NS_touched": "NS of the neighbourhood prompts whose own subject was edited in the same stream",
    "rewrite_acc": "share of the new answer's tokens that are the likeliest after the rewrite prompt (teacher-forced)",
    "rephrase_acc": "the same after paraphrases",
    "neighbour_acc": "share of the true answer's tokens that are the likeliest after neighbourhood prompts",
    "locality_acc": "share of the answer's tokens that are the likeliest after unrelated prompts",
    "portability_acc": "share of the answer's tokens that are the likeliest after questions that follow from the fact",
    "locality": "share of positions of unrelated answers whose likeliest token is the unedited model's",
    "rewrite_match": "greedy generation gives the whole new answer after the rewrite prompt",
    "rephrase_match": "the same after paraphrases",
    "neighbour_match": "greedy generation gives the whole true answer after neighbourhood prompts",
    "locality_match": "greedy generation gives the whole answer after unrelated prompts",
    "portability_match": "greedy generation gives the whole answer after prompts that follow from the new fact",
}
"""What each score says, in a line."""

COUNTERFACT = ("ES", "EM", "PS", "PM", "NS", "NM", "S", "NS_touched")
"""Scores that compare the new answer with the true one; shown before the others."""


def measured_stages(content: Mapping[str, Any]) -> list[str]:
    """The stages at which a run's scores were measured."""
    return [stage for stage in STAGES if content[stage] is not None]


def measured_scores(content: Mapping[str, Any]) -> list[str]:
    """Scores that some record has, CounterFact's first."""
    stages = measured_stages(content)
    found = [s for s in content["base"] if any(content[m][s]["n"] or content[m][s].get("n_nan") for m in stages)]
    return sorted(found, key=lambda score: score not in COUNTERFACT)


def outcome_counts(content: Mapping[str, Any], zeros: bool = True) -> str:
    """What became of a run's records: "9 applied (1 of them held already), 1 rejected, …".

    Args:
        content: What results.json holds.
        zeros: Whether outcomes that no record has are named too.
    """
    counts = []
    for name in OUTCOMES:
        if zeros or content.get(f"n_{name}"):
            held = held_already(content) if name == "applied" else ""
            counts.append(f"{content[f'n_{name}']} {name.replace('_', ' ')}" + (f" ({held})" if held else ""))
    return ", ".join(counts)


def interval_text(entry: Mapping[str, Any], digits: int) -> str:
    """A mean with its interval, whose ends have so many digits, in per cent; empty where no record had a value."""
    if entry["value"] is None:
        return ""
    value, low, high = (
        f"{round(100 * entry[name], places) + 0.0:.{places}f}"  # the sum turns -0.0 into 0.0
        for name, places in (("value", 1), ("low", digits), ("high", digits))
    )
    return f"{value} [{low},{' ' * bool(digits)}{high}]"


def score_markdown(content: Mapping[str, Any]) -> str:
    """The scores of results.json as a table for papers, in per cent; scores without records are left out.

    Args:
        content: What results.json holds.
    """
    stages = measured_stages(content)
    rows = []
    for score in measured_scores(content):
        entries = [content[stage][score] for stage in stages]
        rows.append([score, *(interval_text(entry, 1) for entry in entries), _numbers(entries)])
    for name, values in _text_measures(content).items():
        rows.append([name, *("" if values.get(stage) is None else f"{values[stage]:.4g}" for stage in stages)])
    names = ["score", *(STAGES[stage] for stage in stages), "n"]
    return (
        markdown_table(names, rows, numbers=len(names) - 1, escape=str)
        + f"\n\nMean over records in % [95 % interval]; {content['mode']} mode; {_counts(content)}. "
        + "Every valid record counts, whatever became of its edit. Perplexity and divergence (nats) are no shares.\n"
    )


def csv_table(content: Mapping[str, Any]) -> str:
    """The scores of results.json as CSV, a line per score and stage, as they are measured (shares, not per cent).

    Args:
        content: What results.json holds.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["score", "stage", "value", "low", "high", "n", "n_nan"])
    for score in measured_scores(content):
        for stage in measured_stages(content):
            entry = content[stage][score]
            edges = [entry[name] for name in ("value", "low", "high", "n")]
            writer.writerow([score, stage, *edges, entry.get("n_nan", 0)])
    for name, values in _text_measures(content).items():
        for stage, value in values.items():
            if value is not None:
                writer.writerow([name, stage, value, "", "", "", ""])
    return text.getvalue()


def _text_measures(content: Mapping[str, Any]) -> dict[str, Mapping[str, float | None]]:
    measures = {"perplexity": content["perplexity"], "divergence": {"final": content.get("divergence")}}
    return {name: values for name, values in measures.items() if any(value is not None for value in values.values())}


def _numbers(entries: list[Mapping[str, Any]]) -> str:
    """The number of records, at each stage where they differ."""
    numbers = [str(entry["n"]) + (f" (+ {entry['n_nan']} NaN)" if "n_nan" in entry else "") for entry in entries]
    return numbers[0] if len(set(numbers)) == 1 else " / ".join(numbers)


def _counts(content: Mapping[str, Any]) -> str:
    counts = outcome_counts(content, zeros=False)
    return f"{content['n_requested']} requested" + (f", {counts}" if counts else "")
