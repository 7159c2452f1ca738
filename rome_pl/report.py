"""What a run leaves behind: results.json, manifest.json, and the table on the console."""

import json
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.table import Table

from rome_pl.console import escape
from rome_pl.drawing import Figure, png
from rome_pl.edit import Edit, EditStatus
from rome_pl.figures import CAPTIONS
from rome_pl.files import whole_file
from rome_pl.ledger import plain
from rome_pl.metrics import ProbeScores, summarise
from rome_pl.model_places import noted_places
from rome_pl.outcome import says_target
from rome_pl.records import InvalidRecord
from rome_pl.score_tables import COUNTERFACT, MOMENTS, interval_text, measured_moments, measured_scores
from rome_pl.second_moment import library_versions
from rome_pl.session import EditSession, Retention

__all__ = [
    "edit_table",
    "invalid_record",
    "manifest",
    "note_change",
    "results",
    "score_table",
    "settings_of",
    "write_figures",
    "write_json",
    "write_text",
]


def results(session: EditSession, invalid: Sequence[InvalidRecord], interrupted: bool = False) -> dict[str, Any]:
    """The content of results.json.

    Args:
        session: The run.
        invalid: Records that never became requests.
        interrupted: Whether the stream ended early; ``immediate`` then covers what was reached, and n says how much.
    """
    counts = Counter(edit.status for edit in session.edits)
    edits = sorted(session.edits, key=lambda edit: edit.index)  # batches may come in another order
    immediate = {edit.name: edit.scores["immediate"] for edit in edits if "immediate" in edit.scores}
    seconds = [sum(edit.seconds.values()) for edit in edits if edit.steps and edit.recorded is None]
    records = [_edit_record(edit) for edit in edits]
    records += [invalid_record(record) for record in invalid]
    return {
        "mode": "sequential" if session.sequential else "single",
        "interrupted": interrupted,
        "finished": False,  # who writes the last product says otherwise
        "products": [],
        "base": summarise(session.base_scores, session.base_scores),
        "immediate": summarise(immediate, session.base_scores),
        "final": summarise(session.final_scores, session.base_scores) if session.final_scores else None,
        "perplexity": {moment: session.perplexity.get(moment) for moment in ("base", "final")},
        "divergence": session.divergence,
        "retention": [_retention(point, session) for point in session.retention],
        "n_requested": len(session.requests) + session.num_refused + len(invalid),
        "n_applied": counts[EditStatus.APPLIED],
        "n_held_already": sum(edit.held_already for edit in edits),
        "n_rejected": counts[EditStatus.REJECTED],
        "n_skipped": counts[EditStatus.SKIPPED] + len(invalid),
        "n_rolled_back": counts[EditStatus.ROLLED_BACK],
        "n_resumed": sum(edit.recorded is not None for edit in edits),
        "seconds_per_edit": sum(seconds) / len(seconds) if seconds else None,
        "flops_per_edit": session.flops_per_edit,
        "weight_change": session.layers.change,
        "state_checks": session.state_checks,
        "records": records,
    }


def manifest(session: EditSession, seed: int, run: Path | None = None) -> dict[str, Any]:
    """The content of manifest.json: what has to be the same for the run to be the same.

    Args:
        session: The run.
        seed: Its seed.
        run: Its folder, from which the model's place is noted too; ``None`` (default): it is left out.
    """
    language_model, layers = session.language_model, session.layers
    return {
        "versions": library_versions() | {"python": platform.python_version()},
        "seed": seed,
        "mode": "sequential" if session.sequential else "single",
        "model": language_model.identity()
        | {"dtype": str(layers.last.site.weight.dtype)}
        | (noted_places(language_model.source, run) if run is not None else {}),
        "rewrite": {
            "layers": layers.numbers,
            "weights": [weight.site.name for weight in layers.weights],
            "main": list(layers.main),
        },
        "metric": layers.last.metric.settings,
        "second_moments": [asdict(moment.info) for moment in layers.moments],
        "contexts": list(session.contexts),
    }


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    with whole_file(path) as work, work.open("w", encoding="utf-8") as file:
        json.dump(plain(content), file, indent=2, ensure_ascii=False, allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; characters that UTF-8 cannot hold (lone surrogates) become ``?``."""
    with whole_file(path) as work:
        work.write_text(text, encoding="utf-8", errors="replace", newline="")


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


def settings_of(folder: Path, hparams: Mapping[str, Any]) -> str:
    """The options of a run: as the command line resolved them, else the module's own."""
    try:
        return (folder / "config.yaml").read_text(encoding="utf-8")
    except OSError:  # no run of the command line
        own = {name: value for name, value in hparams.items() if not name.startswith("_")}
        return yaml.safe_dump(json.loads(json.dumps(own, default=str)), sort_keys=False, allow_unicode=True)


def note_change(session: EditSession) -> float:
    """The norm of the weight's change now, kept in the session; known for so many edits already, it is no work."""
    if len(session.edits) not in session.changes:
        session.changes[len(session.edits)] = session.layers.change
    return session.changes[len(session.edits)]


def edit_table(edits: Sequence[Edit]) -> Table:
    """One line per edit: which answer the model prefers, before and after, as percentages."""
    moments = ["base", "immediate"] + ["final"] * any("final" in edit.scores for edit in edits)
    table = Table(title="Probability of the true → the new answer, in %", box=box.SIMPLE_HEAD)
    table.add_column("prompt", overflow="fold")
    table.add_column("true → new", overflow="fold")
    for moment in moments:
        table.add_column(MOMENTS[moment], justify="right", no_wrap=True)
    table.add_column("status", overflow="fold")
    for edit in edits:
        request = edit.request
        table.add_row(
            escape(request.prompt),
            escape(f"{request.target_true or '?'} → {request.target_new}"),
            *(_pair(edit.scores.get(moment)) for moment in moments),
            edit.status + " (held already)" * edit.held_already + (f": {escape(edit.reason)}" if edit.reason else ""),
        )
    return table


def score_table(content: dict[str, Any]) -> Table:
    """The scores of a run with their 95 % intervals, CounterFact's first; in per cent, which fits 80 columns."""
    moments = measured_moments(content)
    table = Table(
        title=f"Scores in % ({content['mode']} mode), with 95 % intervals",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ["score", *(MOMENTS[moment] for moment in moments), "n"]:
        table.add_column(name, justify="left" if name == "score" else "right", no_wrap=True, min_width=len(name))
    scores = measured_scores(content)
    for score, following in zip(scores, [*scores, None][1:], strict=True):
        entries = [content[moment][score] for moment in moments]
        ends = following is None or (score in COUNTERFACT) != (following in COUNTERFACT)
        cells = [interval_text(entry, 0) for entry in entries]
        table.add_row(score, *cells, str(entries[-1]["n"]), end_section=ends)
    if content["perplexity"]["base"] is not None:
        cells = [_number(content["perplexity"].get(moment)) for moment in moments]
        table.add_row("perplexity", *cells, "")
    if content.get("divergence") is not None:
        table.add_row("KL (nats)", *[""] * (len(moments) - 1), _number(content["divergence"]), "")
    return table


def _edit_record(edit: Edit) -> dict[str, Any]:
    scores = {moment: asdict(value) for moment, value in edit.scores.items()}
    return edit.record() | {"scores": scores, "seconds": edit.seconds}


def _retention(point: Retention, session: EditSession) -> dict[str, Any]:
    """Scores of the edits so far, and which of those that had taken are lost by now."""
    taken = {edit.name for edit in session.edits if says_target(edit.scores.get("immediate"))}
    ages = {edit.name: point.edits - edit.index for edit in session.edits}
    return {
        "edits": point.edits,
        "perplexity": point.perplexity,
        "weight_change": point.weight_change,
        "scores": summarise(point.scores, session.base_scores),
        "held": [
            {"case_id": name, "age": ages[name], "held": says_target(scores)} for name, scores in point.scores.items()
        ],
        "lost": [name for name, scores in point.scores.items() if name in taken and not says_target(scores)],
    }


def invalid_record(record: InvalidRecord) -> dict[str, Any]:
    """What results.json says of a record that never became a request."""
    return {
        "index": None,
        "case_id": record.case_id,
        "status": "skipped",
        "reason": record.message,
        "field": record.field,
    }


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
