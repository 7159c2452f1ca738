"""Checks that a written edit does what it was asked for."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.edit import Edit, EditSession, EditStatus, session_of

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
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Edit, batch_idx: int) -> None:
        if batch.before is None and batch.encoded is not None:
            batch.before = session_of(pl_module).measure_target(batch.encoded.rows[0]).probability

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Edit, batch_idx: int
    ) -> None:
        edit: Edit = outputs["edit"]
        session = session_of(pl_module)
        if edit.status is not EditStatus.PENDING:
            return
        if edit.written is None or not session.weight.pending:
            raise RuntimeError(
                "Verification found no write to verify: list RankOneWriter before it (see default_callbacks)"
            )
        reason = self._judge(session, edit)
        if reason is not None:
            session.weight.revert()
            edit.decide(EditStatus.REJECTED, reason + "; the weights are as before this edit")

    def _judge(self, session: EditSession, edit: Edit) -> str | None:
        """Measure the target; the reason for a rejection, if there is one."""
        assert edit.encoded is not None
        edit.after = session.measure_target(edit.encoded.rows[0]).probability
        if edit.after >= self.least_probability:
            return None
        return f"after the write the target has probability {edit.after:.2g}, below {self.least_probability:g}"
