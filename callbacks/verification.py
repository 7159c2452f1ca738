"""Checks that a written edit does what it was asked for, and little else."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.edit import Edit, EditBatch, EditStatus, edits_of
from rome_pl.errors import OptionError
from rome_pl.session import EditSession, session_of

__all__ = ["Verification"]


class Verification(Callback):
    """Measures the target's probability under the written weights, and takes the edit back below a threshold.

    It is searched again then, and rejected if none of :class:`rome_pl.RomeModule`'s ``retries`` is left.

    The probability is the geometric mean over the target's tokens after the bare prompt.

    Args:
        least_probability: Threshold. 0 accepts whatever was written.
        largest_disturbance: Largest share by which an edit may change what a rewrite layer gives on ordinary text, see
            :meth:`rome_pl.edited_layers.EditedLayers.disturbance`; nothing accepts any. Edits over five layers of
            SmolLM2 have 0.015 in the median. Needs the second moment of keys.

    Raises:
        ValueError: If a threshold is out of range.
    """

    def __init__(self, least_probability: float = 0.05, largest_disturbance: float | None = None) -> None:
        if not 0 <= least_probability < 1:
            raise ValueError(f"least_probability: expected a number in [0, 1), got {least_probability}")
        if largest_disturbance is not None and not largest_disturbance > 0:
            raise ValueError(f"largest_disturbance: expected a positive number, got {largest_disturbance}")
        self.least_probability, self.largest_disturbance = least_probability, largest_disturbance

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = session_of(pl_module)
        if self.largest_disturbance is not None and not session.layers.moments:
            raise OptionError(
                "largest_disturbance: without the second moment of keys (this preset, or mom2_adjustment: false) "
                "nothing is known of ordinary text; leave it out"
            )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: EditBatch, batch_idx: int
    ) -> None:
        unknown = [edit for edit in batch.edits if edit.before is None and edit.encoded is not None]
        if unknown:
            measures = session_of(pl_module).measure_targets(unknown, written=False)
            for edit, measure in zip(unknown, measures, strict=True):
                edit.before = measure.probability

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
            for edit, measure in zip(waiting, session.measure_targets(waiting, written=True), strict=True):
                edit.after = measure.probability
                if (objection := self._objection(edit, session)) is not None:
                    objections[edit.name] = objection
            session.withdraw(objections, edits)
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

    def _objection(self, edit: Edit, session: EditSession) -> str | None:
        """Why an edit cannot stay, if so."""
        assert edit.after is not None
        assert edit.written is not None
        if not edit.after >= self.least_probability:  # nor if it is no number
            return f"after the write the target has probability {edit.after:.2g}, below {self.least_probability:g}"
        disturbance = session.layers.disturbance(edit.written)
        if self.largest_disturbance is None or disturbance is None or disturbance <= self.largest_disturbance:
            return None
        return (
            f"it would change what a layer gives on ordinary text by {disturbance:.2g} of its size, more than "
            f"{self.largest_disturbance:g}: its key stands for much else"
        )
