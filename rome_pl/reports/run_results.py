"""What a run leaves behind, for results.json, manifest.json and records.jsonl."""

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rome_pl.editing.edit import Edit
from rome_pl.editing.outcome import says_target
from rome_pl.editing.session import EditSession, Retention
from rome_pl.ledger.model_places import noted_places
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics import ProbeScores, summarise
from rome_pl.metrics.scores import record_values
from rome_pl.requests.edit_request import EditRequest
from rome_pl.requests.record_forms import InvalidRecord
from rome_pl.utils.environment import library_versions

__all__ = ["detailed_records", "invalid_record", "note_change", "run_manifest", "run_results", "settings_of"]


def run_results(session: EditSession, invalid: Sequence[InvalidRecord], interrupted: bool = False) -> dict[str, Any]:
    """The content of results.json.

    Args:
        session: The run.
        invalid: Records that never became requests.
        interrupted: Whether the stream ended early; ``immediate`` then covers what was reached, and n says how much.
    """
    counts = Counter(edit.status for edit in session.edits)
    edits = sorted(session.edits, key=lambda edit: edit.index)  # batches may come in another order
    immediate = {edit.name: edit.scores["immediate"] for edit in edits if "immediate" in edit.scores}
    seconds = [sum(edit.seconds.values()) for edit in edits if edit.steps and not edit.resumed]
    records = [_edit_record(edit) for edit in edits]
    records += [invalid_record(record) for record in invalid]
    return {
        "mode": "sequential" if session.sequential else "single",
        "interrupted": interrupted,
        "finished": False,  # who writes the last product says otherwise
        "products": [],
        "base": summarise(session.measured.base_scores, session.measured.base_scores),
        "immediate": summarise(immediate, session.measured.base_scores),
        "final": summarise(session.measured.final_scores, session.measured.base_scores)
        if session.measured.final_scores
        else None,
        "perplexity": {stage: session.measured.perplexity.get(stage) for stage in ("base", "final")},
        "divergence": session.measured.divergence,
        "retention": [_retention(point, session) for point in session.measured.retention],
        "n_requested": len(session.requests) + session.num_refused + len(invalid),
        "n_applied": counts[EditStatus.APPLIED],
        "n_held_already": sum(edit.held_already for edit in edits),
        "n_rejected": counts[EditStatus.REJECTED],
        "n_skipped": counts[EditStatus.SKIPPED] + len(invalid),
        "n_rolled_back": counts[EditStatus.ROLLED_BACK],
        "n_resumed": sum(edit.resumed for edit in edits),
        "seconds_per_edit": sum(seconds) / len(seconds) if seconds else None,
        "flops_per_edit": session.flops.per_edit,
        "weight_change": session.layers.change,
        "state_checks": session.measured.state_checks,
        "damage": session.measured.damage,
        "records": records,
    }


def run_manifest(session: EditSession, seed: int, run: Path | None = None) -> dict[str, Any]:
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
        "preset": session.preset.name,
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


def settings_of(folder: Path, hparams: Mapping[str, Any]) -> str:
    """The options of a run: as the command line resolved them, else the module's own."""
    try:
        return (folder / "config.yaml").read_text(encoding="utf-8")
    except OSError:  # no run of the command line
        own = {name: value for name, value in hparams.items() if not name.startswith("_")}
        return yaml.safe_dump(json.loads(json.dumps(own, default=str)), sort_keys=False, allow_unicode=True)


def note_change(session: EditSession) -> float:
    """The norm of the weight's change now, kept in the session; known for so many edits already, it is no work."""
    if len(session.edits) not in session.measured.weight_changes:
        session.measured.weight_changes[len(session.edits)] = session.layers.change
    return session.measured.weight_changes[len(session.edits)]


def _edit_record(edit: Edit) -> dict[str, Any]:
    scores = {stage: asdict(value) for stage, value in edit.scores.items()}
    return edit.record() | {"scores": scores, "seconds": edit.seconds}


def _retention(point: Retention, session: EditSession) -> dict[str, Any]:
    """Scores of the edits so far, and which of those that had taken are lost by now."""
    taken = {edit.name for edit in session.edits if says_target(edit.scores.get("immediate"))}
    ages = {edit.name: point.edits - edit.index for edit in session.edits}
    return {
        "edits": point.edits,
        "perplexity": point.perplexity,
        "weight_change": point.weight_change,
        "scores": summarise(point.scores, session.measured.base_scores),
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


def detailed_records(session: EditSession, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per requested record, in order: what results.json says of it, and its own value of every score.

    Under ``values`` stand the scores by stage; ``lost`` is whether the edit had taken and is gone from the final
    model, ``None`` where there is no such model. Requests that an interrupted run did not reach follow as ``pending``.

    Args:
        session: The run.
        records: The entries of results.json.
    """
    edits = {edit.index: edit for edit in session.edits}
    detailed = []
    for record in records:
        edit = edits.get(record["index"])
        detailed.append({**record, **_own(session, edit.request, edit.scores)} if edit is not None else dict(record))
    reached = {edit.name for edit in session.edits}
    for request in session.requests:
        if (name := str(request.case_id)) not in reached:
            known = {"base": session.measured.base_scores, "final": session.measured.final_scores}
            scores = {stage: found[name] for stage, found in known.items() if name in found}
            shown = {stage: asdict(found) for stage, found in scores.items()}
            made = Edit(index=-1, request=request, notes=list(request.notes))
            record = made.record() | {"index": None, "scores": shown, "seconds": {}}
            detailed.append(record | _own(session, request, scores))
    return detailed


def _own(session: EditSession, request: EditRequest, scores: Mapping[str, ProbeScores]) -> dict[str, Any]:
    base = session.measured.base_scores.get(str(request.case_id))
    lost = says_target(scores.get("immediate")) and not says_target(scores["final"]) if "final" in scores else None
    return {"values": {stage: record_values(found, base) for stage, found in scores.items()}, "lost": lost}
