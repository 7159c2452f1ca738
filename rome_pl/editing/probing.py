"""Measuring the edits of a run: under the weights as they are, or in single mode each with its own write."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from rome_pl.editing.edit import Edit
from rome_pl.editing.session import EditSession
from rome_pl.encoding.encoded_rows import EncodedRow
from rome_pl.forward.hooks import add_rank_one
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics import measure_text, probes
from rome_pl.metrics.damage import Damage
from rome_pl.metrics.probes import Changes, ProbeScores, TargetMeasure
from rome_pl.metrics.scores import SCORES
from rome_pl.requests.edit_request import EditRequest
from rome_pl.write.closed_form import Update

__all__ = [
    "divergence_alone",
    "divergence_together",
    "in_force",
    "measure_probes",
    "measure_targets",
    "neighbour_damage",
    "objection",
    "probe",
    "with_touched",
    "written_alone",
]


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


@contextmanager
def written_alone(session: EditSession, edit: Edit) -> Iterator[None]:
    """The model with the write of one edit of single mode inside, for every token that it reads."""
    changes = _changes(session, [edit])
    assert changes is not None  # single mode
    assert changes.updates[0] is not None  # the edit is in force
    with ExitStack() as stack:
        for site, update in zip(changes.sites, changes.updates[0], strict=True):
            if update is not None:
                stack.enter_context(add_rank_one(site, update.left, update.right))
        yield


def neighbour_damage(session: EditSession, final: bool = False) -> Damage:
    """What the edits in force cost their neighbours.

    Args:
        session: The run.
        final: Whether it is measured on the final model, instead of right after each edit.
    """
    edits = [edit for edit in session.edits if edit.status is EditStatus.APPLIED or in_force(edit)]
    stage: Mapping[str, ProbeScores] = session.measured.final_scores if final else {}
    pairs = []
    for edit in edits:
        now, base = stage.get(edit.name, edit.scores.get("immediate")), session.measured.base_scores.get(edit.name)
        if now is None or base is None:
            continue
        before, after = (SCORES["NS"].of(scores, base) for scores in (base, now))
        if before is not None and after is not None:
            pairs.append((before, after))
    if not pairs:
        return Damage(len(edits))
    count = len(pairs)
    losses = [before - after for before, after in pairs]
    mean = sum(losses) / count
    spread = sum((loss - mean) ** 2 for loss in losses) / max(1, count - 1)
    before, after = (sum(values) / count for values in zip(*pairs, strict=True))
    return Damage(len(edits), count, before, after, math.sqrt(spread / count))


def divergence_alone(session: EditSession, edit: Edit, text: str, windows: int) -> float:
    """The divergence on ordinary text that an edit of single mode causes, in nats, before it is taken back.

    Args:
        session: The run.
        edit: An edit that is written.
        text: Ordinary text.
        windows: How many windows of it are read.
    """

    @contextmanager
    def edited() -> Iterator[Any]:
        with written_alone(session, edit):
            yield session.language_model

    found = measure_text(session.language_model, text, edited=edited, windows=windows).divergence
    assert found is not None
    return found


def divergence_together(session: EditSession, text: str, windows: int) -> float:
    """The divergence on ordinary text that the edits in the weights cause together, in nats."""
    found = measure_text(session.language_model, text, session.unedited, windows=windows).divergence
    assert found is not None
    return found


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
