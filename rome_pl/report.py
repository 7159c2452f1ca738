"""What a run leaves behind: results.json, manifest.json, and the table on the console."""

import json
import math
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from rome_pl.edit import Edit, EditSession, EditStatus
from rome_pl.ledger import plain
from rome_pl.metrics import ProbeScores, summarise
from rome_pl.records import InvalidRecord
from rome_pl.second_moment import library_versions

__all__ = ["edit_table", "manifest", "results", "score_table", "write_json"]


def results(session: EditSession, invalid: Sequence[InvalidRecord], interrupted: bool = False) -> dict[str, Any]:
    """The content of results.json.

    Args:
        session: The run.
        invalid: Records that never became requests.
        interrupted: Whether the stream ended early; ``immediate`` then covers what was reached, and n says how much.
    """
    counts = Counter(edit.status for edit in session.edits)
    immediate = [edit.scores["immediate"] for edit in session.edits if "immediate" in edit.scores]
    seconds = [sum(edit.seconds.values()) for edit in session.edits if edit.steps]
    records = [_edit_record(edit) for edit in session.edits]
    records += [_invalid_record(record) for record in invalid]
    return {
        "mode": "sequential" if session.sequential else "single",
        "interrupted": interrupted,
        "base": summarise(list(session.base_scores.values())),
        "immediate": summarise(immediate),
        "final": summarise(list(session.final_scores.values())) if session.final_scores else None,
        "perplexity": {moment: session.perplexity.get(moment) for moment in ("base", "final")},
        "n_requested": len(session.requests) + session.num_refused + len(invalid),
        "n_applied": counts[EditStatus.APPLIED],
        "n_rejected": counts[EditStatus.REJECTED],
        "n_skipped": counts[EditStatus.SKIPPED] + len(invalid),
        "n_rolled_back": counts[EditStatus.ROLLED_BACK],
        "n_resumed": 0,
        "seconds_per_edit": sum(seconds) / len(seconds) if seconds else None,
        "flops_per_edit": None,
        "weight_change": session.weight.change,
        "state_checks": session.state_checks,
        "records": records,
    }


def manifest(session: EditSession, seed: int) -> dict[str, Any]:
    """The content of manifest.json: what has to be the same for the run to be the same."""
    language_model, moment = session.language_model, session.moment
    return {
        "versions": library_versions() | {"python": platform.python_version()},
        "seed": seed,
        "model": {
            "source": language_model.source,
            "fingerprint": language_model.fingerprint,
            "tokenizer": language_model.tokenizer_fingerprint,
            "dtype": str(session.weight.site.weight.dtype),
            "device": str(language_model.device),
        },
        "rewrite": {"layer": session.weight.site.layer, "weight": session.weight.site.name},
        "second_moment": asdict(moment.info) if moment is not None else None,
        "contexts": list(session.contexts),
    }


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_suffix(".tmp")
    with work.open("w", encoding="utf-8") as file:
        json.dump(plain(content), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    work.replace(path)


def edit_table(edits: Sequence[Edit]) -> Table:
    """One line per edit: which answer the model prefers, before and after."""
    final = any("final" in edit.scores for edit in edits)
    table = Table(title="Edits: probability of the old and the new answer on the rewrite prompt")
    columns = ["prompt", "true", "new", "base: true → new", "after its write"] + ["final model"] * final + ["status"]
    for name in columns:
        table.add_column(
            name, overflow="fold", justify="right" if "→" in name or "write" in name or "final" in name else "left"
        )
    for edit in edits:
        request = edit.request
        moments = [edit.scores.get(moment) for moment in ("base", "immediate", *(("final",) if final else ()))]
        table.add_row(
            escape(request.prompt),
            escape(request.target_true or ""),
            escape(request.target_new),
            *(_pair(scores) for scores in moments),
            edit.status + (f": {escape(edit.reason)}" if edit.reason else ""),
        )
    return table


def score_table(content: dict[str, Any]) -> Table:
    """The scores of a run with their 95 % intervals."""
    moments = [moment for moment in ("base", "immediate", "final") if content[moment] is not None]
    table = Table(title=f"Scores ({content['mode']} mode), 95 % intervals")
    for name in ["score", *moments, "n"]:
        table.add_column(name, justify="left" if name == "score" else "right")
    for score in content["base"]:
        entries = [content[moment][score] for moment in moments]
        table.add_row(score, *(_interval(entry) for entry in entries), str(entries[-1]["n"]))
    if content["perplexity"]["base"] is not None:
        values = {"base": content["perplexity"]["base"], "final": content["perplexity"]["final"]}
        cells = [f"{values[m]:.2f}" if values.get(m) is not None else "" for m in moments]
        table.add_row("perplexity", *cells, "")
    return table


def _edit_record(edit: Edit) -> dict[str, Any]:
    scores = {moment: asdict(value) for moment, value in edit.scores.items()}
    return edit.record() | {"scores": scores, "seconds": edit.seconds}


def _invalid_record(record: InvalidRecord) -> dict[str, Any]:
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
    if true is None or new is None:
        return "" if new is None else f"{new:.3f}"
    return f"{true:.3f} → [bold]{new:.3f}[/bold]" if new > true else f"[bold]{true:.3f}[/bold] → {new:.3f}"


def _interval(entry: dict[str, Any]) -> str:
    return "" if entry["value"] is None else f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"
