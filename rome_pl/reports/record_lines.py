"""The lines of records.jsonl: one record each, with everything measured."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rome_pl.editing.edit import Edit
from rome_pl.editing.outcome import says_target
from rome_pl.editing.session import EditSession
from rome_pl.metrics import ProbeScores
from rome_pl.metrics.scores import record_values
from rome_pl.requests.edit_request import EditRequest

__all__ = ["detailed_records"]


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
