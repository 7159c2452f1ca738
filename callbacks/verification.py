"""Checks that a written edit does what it was asked for."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.edit import Edit, EditBatch, EditStatus, edits_of
from rome_pl.session import session_of

__all__ = ["Verification"]


class Verification(Callback):
    """Measures the target's probability under the written weights, and rejects the edit below a threshold.

    The probability is the geometric mean over the target's tokens after the bare prompt.

    Args:
        least_probability: Threshold. 0 accepts whatever was written.

    Raises:
        ValueError: If the threshold is out of range.
    """

    def __init__(self, least_probability: float = 0.05) -> None:
        if not 0 <= least_probability < 1:
            raise ValueError(f"least_probability: expected a number in [0, 1), got {least_probability}")
        self.least_probability = least_probability

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
            refused: list[Edit] = []
            for edit, measure in zip(waiting, session.measure_targets(waiting, written=True), strict=True):
                edit.after = measure.probability
                if edit.after < self.least_probability:
                    refused.append(edit)
                    edit.decide(
                        EditStatus.REJECTED,
                        f"after the write the target has probability {edit.after:.2g}, below "
                        f"{self.least_probability:g}; the weights are as before this edit",
                    )
            session.withdraw(refused, edits)
            waiting = [edit for edit in waiting if edit.status is EditStatus.PENDING]
            if not refused or not session.sequential:
                break  # taking one edit of a joint write back changes what the others say: look again
        for edit in edits:
            if "verify" in edit.seconds:
                edit.seconds["verify"] = (time.perf_counter() - started) / count
