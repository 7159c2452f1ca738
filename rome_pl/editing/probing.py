"""Measuring the edits of a run: under the weights as they are, or in single mode each with its own write."""

from collections.abc import Sequence
from dataclasses import replace

from rome_pl.editing.edit import Edit
from rome_pl.editing.session import EditSession
from rome_pl.encoding.encoded_rows import EncodedRow
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics import probes
from rome_pl.metrics.probes import Changes, ProbeScores, TargetMeasure
from rome_pl.requests.edit_request import EditRequest
from rome_pl.write.closed_form import Update

__all__ = ["in_force", "measure_probes", "measure_targets", "objection", "probe", "with_touched"]


def measure_targets(session: EditSession, edits: Sequence[Edit], *, written: bool) -> list[TargetMeasure]:
    """The targets' probabilities after the bare prompts.

    Args:
        session: The run.
        edits: Which; all can be encoded.
        written: Whether each is measured with its own write, or with the weights as they are.
    """
    rows = [_bare_row(session, edit) for edit in edits]
    return probes.measure_targets(session.language_model, rows, _changes(session, edits) if written else None)


def objection(session: EditSession, edit: Edit, after: TargetMeasure) -> str | None:
    """Why an edit that was just written has not taken, if so.

    Args:
        session: The run.
        edit: The edit.
        after: Its target with the write.
    """
    decode = session.language_model.tokenizer.decode
    return session.requirement.objection(edit.before, after, (edit.value_norm or 0.0) > 0, decode)


def measure_probes(session: EditSession, edits: Sequence[Edit]) -> list[ProbeScores]:
    """The probe scores of edits, each with its own write."""
    return probe(session, [edit.request for edit in edits], _changes(session, edits))


def probe(session: EditSession, requests: Sequence[EditRequest], changes: Changes | None = None) -> list[ProbeScores]:
    """The probe scores of requests.

    Args:
        session: The run.
        requests: The requests.
        changes: A change of the weights for each. ``None`` (default): the weights as they are.
    """
    return with_touched(session, requests, probes.probe_scores(session.language_model, requests, changes))


def with_touched(
    session: EditSession, requests: Sequence[EditRequest], measured: Sequence[ProbeScores]
) -> list[ProbeScores]:
    """Scores that know which of their prompts are about subjects that other requests edit."""
    return [
        replace(scores, touched=session.touched.get(str(request.case_id), ()))
        for request, scores in zip(requests, measured, strict=True)
    ]


def in_force(edit: Edit) -> bool:
    """Whether the edit's own write is in what is measured now."""
    return edit.status is EditStatus.PENDING and edit.written is not None


def _bare_row(session: EditSession, edit: Edit) -> EncodedRow:
    if edit.prepared:
        return edit.search.encoded.rows[0]
    # It was resumed, and not encoded for that.
    return session.language_model.encoder.edit(edit.request, fact_token=session.fact_token).rows[0]


def _changes(session: EditSession, edits: Sequence[Edit]) -> Changes | None:
    if session.sequential:  # they are in the weights
        return None
    numbers, updates = session.layers.numbers, list[Sequence[Update | None] | None]()
    for edit in edits:
        layers = edit.written.layers if in_force(edit) and edit.written else {}
        changed = [layers[number].update if number in layers else None for number in numbers]
        updates.append(changed if layers else None)
    return Changes([weight.site for weight in session.layers.weights], updates)
