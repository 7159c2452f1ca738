"""Writing a batch of edits: write, refuse what cannot stand, search it again, and write the batch anew."""

from collections.abc import Mapping, Sequence

from rome_pl.editing.assertions import PART, EditAssertions
from rome_pl.editing.edit import Edit
from rome_pl.editing.retries import Retries
from rome_pl.editing.run_setup import RunSetup
from rome_pl.ledger.status import EditStatus
from rome_pl.write.closed_form import DisablingEditError, NotFiniteError
from rome_pl.write.edited_layers import EditWrite

__all__ = ["BatchWriter"]


class BatchWriter:
    """Writes the pending edits of a batch. What cannot be written is searched again, or rejected.

    Args:
        setup: What the edits of the run share.
        retries: The searches that are left when one has failed. ``None`` (default): there are none.
        least_realised: Share of the wanted change at the key that has to survive the rounding to the model's dtype;
            :class:`rome_pl.callbacks.RankOneWriter` sets it.
    """

    def __init__(self, setup: RunSetup, retries: Retries | None = None, least_realised: float = 0.0) -> None:
        self._setup, self._layers, self._retries = setup, setup.layers, retries
        self.least_realised = least_realised

    def write(self, edits: Sequence[Edit]) -> None:
        """Write the pending edits of a batch; each is written, or rejected, in the end.

        In sequential mode they are solved jointly and stay in the weights, pending a verdict. In single mode each is
        only solved for, on the original weights, and nothing is written.
        """
        if not self._setup.sequential:
            for edit in edits:
                self._propose(edit)
            return
        for edit in _pending(edits):
            if edit.name in self._layers.names:
                edit.decide(EditStatus.REJECTED, f"edit {edit.name} is in the weight already; give it another case_id")
        while pending := _pending(edits):
            refused = self._write_jointly(pending)
            if not refused:
                return
            for edit, reason in refused:
                self._refuse(edit, reason)

    def withdraw(self, objections: Mapping[str, str], batch: Sequence[Edit]) -> None:
        """Revert a batch that was just written, and write it again without the edits that were objected to.

        Those are searched again and take part with another value, or are rejected if there is no retry left.

        Args:
            objections: Why, by name of the edit.
            batch: The batch.
        """
        if not objections:
            return
        if self._setup.sequential:
            self._layers.revert()
        for edit in batch:
            if edit.name in objections:
                self._refuse(edit, objections[edit.name], "; the weights are as before this edit")
        self.write(batch)

    def write_again(self, edit: Edit, strength: float = 1.0) -> EditWrite:
        """Write an edit that was undone, with the assertions that it was written with then. It stays pending.

        Args:
            edit: The edit.
            strength: Which part of the change is made.

        Raises:
            ValueError: If it cannot be written.
        """
        return self._layers.write([edit.name], EditAssertions(self._setup, [edit], strength))

    def _write_jointly(self, edits: Sequence[Edit]) -> list[tuple[Edit, str]]:
        """Solve edits jointly and write them; if that cannot stand nothing is written.

        Returns:
            The edits that are in the way, with the reason; none if all are written.
        """
        try:
            written = self._layers.write([edit.name for edit in edits], EditAssertions(self._setup, edits))
        except DisablingEditError as error:
            return [(_culprit(edits, error.row), str(error))]
        except NotFiniteError as error:  # it cannot tell which edit it was
            return [(edit, str(error)) for edit in edits if edit.written is None] or [
                (edit, str(error)) for edit in edits
            ]
        lost = [edit for edit, share in zip(edits, written.realised, strict=True) if share < self.least_realised]
        if not lost:
            for edit in edits:
                edit.take_write(written.part(edit.name))
                edit.free()
            return []
        self._layers.revert()
        for edit in lost:
            edit.take_write(written.part(edit.name))
        return [(edit, self._loss(edit)) for edit in lost]

    def _propose(self, edit: Edit) -> None:
        """Solve for one edit on the original weights."""
        while edit.status is EditStatus.PENDING and edit.written is None:
            try:
                edit.take_write(self._layers.propose(edit.name, EditAssertions(self._setup, [edit])))
            except (DisablingEditError, NotFiniteError) as error:
                self._refuse(edit, str(error))
                continue
            edit.free()
            if edit.realised is not None and edit.realised < self.least_realised:
                self._refuse(edit, self._loss(edit))

    def _refuse(self, edit: Edit, reason: str, addition: str = "") -> None:
        """Search for another value, or reject the edit."""
        edit.notes = [note for note in edit.notes if not note.startswith(PART)]
        if self._retries is None or not self._retries.again(edit, reason):
            edit.decide(EditStatus.REJECTED, reason + addition)

    def _loss(self, edit: Edit) -> str:
        dtype = self._layers.last.site.weight.dtype
        return f"only {edit.realised:.0%} of the change survives rounding to {dtype}; load the model in float32"


def _pending(edits: Sequence[Edit]) -> list[Edit]:
    return [edit for edit in edits if edit.status is EditStatus.PENDING]


def _culprit(edits: Sequence[Edit], row: int) -> Edit:
    """Which edit to refuse, where an edit's key depends on those before it in a joint solve.

    Edits that were written before stood together then: what does not stand now is one that was searched since.
    """
    blamed = edits[row]
    since = [edit for edit in edits[:row] if edit.written is None and set(edit.layers) & set(blamed.layers)]
    return since[-1] if since and blamed.written is not None else blamed
