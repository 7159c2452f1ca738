"""What edits of a sequential stream are still worth while others follow: a sample of them, on their bare prompts."""

from collections.abc import Sequence

from rome_pl.editing.edit import Edit
from rome_pl.editing.probing import measure_targets
from rome_pl.editing.session import EditSession
from rome_pl.ledger.status import EditStatus
from rome_pl.requests.conflicts import standing
from rome_pl.requests.sampling import lasting_sample

__all__ = ["RETAINED", "note_after", "retained_share"]

RETAINED = 0.5
"""Share of the probability right after its own write that the target of a retained edit still has. A bound nearer to 1
would find noise: after 100 edits in SmolLM2-135M the share is 1.00 in the median and 0.52 at worst, while the target of
an edit that another took the place of has next to nothing."""


def note_after(session: EditSession, edits: Sequence[Edit]) -> None:
    """Measure the targets of edits that nothing has verified; to be called before anything else is written.

    A resumed run measures them anew: its weights are then the same, bit for bit.

    Args:
        session: The run.
        edits: Edits that were just written.
    """
    unknown = [edit for edit in edits if edit.after is None]
    for edit, measure in zip(unknown, measure_targets(session, unknown, written=False), strict=True):
        edit.note_after(measure)


def retained_share(session: EditSession, most: int) -> float | None:
    """The share of edits in the weights whose target has at least half the probability it was first written with.

    An edit whose fact a later one states anew is meant to be lost, and does not count.

    Args:
        session: A sequential run.
        most: Edits to measure; of more a seeded sample is, see :func:`rome_pl.requests.sampling.lasting_sample`.

    Returns:
        The share; ``None`` if no edit is in the weights.
    """
    edits = {edit.name: edit for edit in session.edits if edit.status is EditStatus.APPLIED}
    counted = {str(request.case_id) for request in standing(session.in_the_weights())} & edits.keys()
    chosen = [edits[name] for name in lasting_sample(counted, most)]
    if not chosen:
        return None
    measures = measure_targets(session, chosen, written=False)
    kept = [
        edit.after is not None and measure.probability >= RETAINED * edit.after
        for edit, measure in zip(chosen, measures, strict=True)
    ]
    return sum(kept) / len(kept)
