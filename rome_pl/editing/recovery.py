"""Bringing a model back to health: undo the edits since the last good check, and write again those that it bears."""

from collections.abc import Callable, Sequence

from rome_pl.editing.edit import Edit
from rome_pl.editing.probing import measure_targets, objection
from rome_pl.editing.session import EditSession
from rome_pl.ledger.status import EditStatus
from rome_pl.write.closed_form import DisablingEditError, NotFiniteError
from rome_pl.write.edited_layers import EditWrite

__all__ = ["recover", "roll_back"]

WEAKER = 0.5
"""How strongly an edit is written that is too much for the model as it is, where it may be weakened."""


def roll_back(session: EditSession, edits: Sequence[Edit], finding: str) -> None:
    """Undo edits of a sequential stream, and have the ledger say why.

    Args:
        session: The run.
        edits: The edits; they are in the weights.
        finding: Why.
    """
    session.layers.remove([edit.name for edit in edits])
    _drop(session, {edit.name: finding for edit in edits}, edits, [])


def recover(
    session: EditSession, edits: Sequence[Edit], finding: str, healthy: Callable[[], bool], weaken: bool
) -> int:
    """Undo edits, and write them again one by one, without those after which the model is not healthy.

    If anything stops it, the edits are in the weights again, as the ledger says.

    Args:
        session: The run.
        edits: The edits since the last good check; they are in the weights.
        finding: What that check found.
        healthy: Checks the model.
        weaken: Whether an edit that is too much is tried with less strength first.

    Returns:
        How many edits were dropped.
    """
    layers = session.layers
    before = {name: written for written in layers.written for name in written.names}
    layers.remove([edit.name for edit in edits])
    dropped, anew = dict[str, str](), list[Edit]()
    try:
        for edit in edits:
            written = _write_again(session, edit, finding, healthy, (1.0, WEAKER) if weaken else (1.0,))
            if isinstance(written, str):
                dropped[edit.name] = written
                continue
            layers.commit()
            if not written.same_as(before[edit.name]):
                edit.take_write(written)
                anew.append(edit)
    except BaseException:
        layers.revert()
        layers.remove([edit.name for edit in edits if edit.name in layers.names])
        for edit in edits:
            session.writer.write_again(edit)
            layers.commit()
        raise
    _drop(session, dropped, edits, anew)
    return len(dropped)


def _write_again(
    session: EditSession, edit: Edit, finding: str, healthy: Callable[[], bool], strengths: Sequence[float]
) -> EditWrite | str:
    """Write an edit as strongly as the model bears it; it stays pending. The reason if it cannot stay."""
    for strength in strengths:
        try:
            written = session.writer.write_again(edit, strength)
        except (DisablingEditError, NotFiniteError):
            return finding
        if healthy():
            (after,) = measure_targets(session, [edit], written=True)
            if (found := objection(session, edit, after)) is not None:
                session.layers.revert()
                return f"{finding}; written again, it does not take: {found}"
            if strength < 1:
                edit.notes.append(f"written at {strength:.0%} of its strength, to keep the model healthy")
            return written
        session.layers.revert()
    return finding


def _drop(session: EditSession, dropped: dict[str, str], edits: Sequence[Edit], anew: Sequence[Edit]) -> None:
    """Record which edits were dropped, by name with the reason, and which have another write than before."""
    gone = [edit for edit in edits if edit.name in dropped]
    for edit in gone:
        edit.decide(EditStatus.ROLLED_BACK, dropped[edit.name])
    if session.ledger is not None:
        session.ledger.amend(
            [(edit.record(), {"status": str(edit.status), "reason": edit.reason}) for edit in gone],
            [(edit.written, [edit.record()]) for edit in anew if edit.written is not None],
        )
