"""Writes the optimised values into the weight."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.editing.edit import EditBatch, edits_of
from rome_pl.editing.session import session_of
from rome_pl.ledger.status import EditStatus

__all__ = ["RankOneWriter"]


class RankOneWriter(Callback):
    """Turns keys and values into rank-one updates and writes them, pending a verdict.

    In sequential mode the edits of a batch are solved for jointly and written; :class:`EditCommit` keeps them, and
    whatever ends the run in between reverts them. In single mode nothing is written: each edit's update is what the
    callbacks after this one measure with.

    Args:
        least_realised: Share of the wanted change at the key that has to survive the rounding to the model's dtype;
            below it the edit is searched again, or rejected if no retry is left.

    Raises:
        ValueError: If the share is out of range.
    """

    def __init__(self, least_realised: float = 0.5) -> None:
        if not 0 <= least_realised <= 1:
            raise ValueError(f"least_realised: expected a share in [0, 1], got {least_realised}")
        self.least_realised = least_realised

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session_of(pl_module).writer.least_realised = self.least_realised

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        wanted = [edit for edit in edits_of(outputs) if edit.status is EditStatus.PENDING]
        started = time.perf_counter()
        session_of(pl_module).writer.write(wanted)
        for edit in wanted:
            edit.seconds["write"] = (time.perf_counter() - started) / len(wanted)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        session = getattr(pl_module, "session", None)
        if session is not None:
            session.layers.revert()
