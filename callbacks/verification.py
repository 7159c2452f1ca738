"""Checks that a written edit does what it was asked for, and little else."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.editing.edit import Edit, EditBatch, edits_of
from rome_pl.editing.outcome import Requirement
from rome_pl.editing.probing import measure_targets, objection
from rome_pl.editing.session import EditSession, session_of
from rome_pl.errors import OptionError
from rome_pl.ledger.status import EditStatus

__all__ = ["Verification"]


class Verification(Callback):
    """Measures the target under the written weights, and undoes an edit that has not taken.

    It is searched again then, and rejected if none of :class:`rome_pl.RomeModule`'s ``retries`` is left. An edit has
    taken if greedy decoding after the bare prompt gives the target, and the target's probability, the geometric mean
    over its tokens, is not below a threshold.

    Args:
        least_probability: Threshold. 0 accepts whatever was written, unless ``greedy`` is true.
        largest_disturbance: Largest share by which an edit may change what a rewrite layer gives on ordinary text, see
            :meth:`rome_pl.write.edited_layers.EditedLayers.disturbance`. Edits over five layers of SmolLM2 have 0.015
            in the median. Needs the second moment of keys. ``None`` (default): any change is accepted.
        greedy: Whether greedy decoding has to give the target. Where it need not, the target has to be likelier than
            before, unless the threshold is 0. ``None`` (default): unless the threshold is 0.

    Raises:
        ValueError: If a threshold is out of range.
    """

    def __init__(
        self,
        least_probability: float = 0.05,
        largest_disturbance: float | None = None,
        greedy: bool | None = None,
    ) -> None:
        if not 0 <= least_probability < 1:
            raise ValueError(f"least_probability: expected a number in [0, 1), got {least_probability}")
        if largest_disturbance is not None and not largest_disturbance > 0:
            raise ValueError(f"largest_disturbance: expected a positive number, got {largest_disturbance}")
        self.least_probability, self.largest_disturbance, self.greedy = least_probability, largest_disturbance, greedy

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = session_of(pl_module)
        greedy = self.least_probability > 0 if self.greedy is None else self.greedy
        session.requirement = Requirement(self.least_probability, greedy)
        if self.largest_disturbance is not None and not session.layers.moments:
            raise OptionError(
                "largest_disturbance: without the second moment of keys (this preset, or mom2_adjustment: false) "
                "nothing is known of ordinary text; leave it out"
            )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: EditBatch, batch_idx: int
    ) -> None:
        unknown = [edit for edit in batch.edits if edit.before is None and edit.prepared]
        if unknown:
            measures = measure_targets(session_of(pl_module), unknown, written=False)
            for edit, measure in zip(unknown, measures, strict=True):
                edit.note_before(measure.greedy, measure.probability)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        edits, session = edits_of(outputs), session_of(pl_module)
        waiting = [edit for edit in edits if edit.status is EditStatus.PENDING]
        if any(edit.written is None for edit in waiting):
            raise RuntimeError(
                "Verification found no write to verify: list RankOneWriter before it (see default_callbacks)"
            )
        started, count = time.perf_counter(), len(waiting)
        for edit in list(waiting):
            edit.seconds["verify"] = 0.0
        while waiting:
            objections: dict[str, str] = {}
            for edit, measure in zip(waiting, measure_targets(session, waiting, written=True), strict=True):
                edit.note_after(measure)
                found = objection(session, edit, measure) or self._disturbs(edit, session)
                if found is not None:
                    objections[edit.name] = found
            session.writer.withdraw(objections, edits)
            if not objections:
                break
            # Taking one edit of a joint write back changes what the others say: all of it is looked at again.
            waiting = [
                edit
                for edit in waiting
                if edit.status is EditStatus.PENDING and (session.sequential or edit.name in objections)
            ]
        for edit in edits:
            if "verify" in edit.seconds:
                edit.seconds["verify"] = (time.perf_counter() - started) / count

    def _disturbs(self, edit: Edit, session: EditSession) -> str | None:
        """Why an edit that has taken cannot stay all the same, if so."""
        if self.largest_disturbance is None or edit.written is None:
            return None
        disturbance = session.layers.disturbance(edit.written)
        if disturbance is None or disturbance <= self.largest_disturbance:
            return None
        return (
            f"it would change what a layer gives on ordinary text by {disturbance:.2g} of its size, more than "
            f"{self.largest_disturbance:g}: its key stands for much else"
        )
