"""Writes the optimised value into the weight."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.edit import Edit, EditStatus, session_of

__all__ = ["RankOneWriter"]


class RankOneWriter(Callback):
    """Turns an edit's key and value into a rank-one update and writes it, pending a verdict.

    :class:`EditCommit` keeps it or takes it back; whatever ends the run in between takes it back.

    Args:
        least_realised: Share of the wanted change at the key that has to survive the rounding to the model's dtype;
            below it the edit is rejected.

    Raises:
        ValueError: If the share is out of range.
    """

    def __init__(self, least_realised: float = 0.5) -> None:
        if not 0 <= least_realised <= 1:
            raise ValueError(f"least_realised: expected a share in [0, 1], got {least_realised}")
        self.least_realised = least_realised

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Edit, batch_idx: int
    ) -> None:
        edit: Edit = outputs["edit"]
        if edit.status is not EditStatus.PENDING:
            return
        session = session_of(pl_module)
        started = time.perf_counter()
        try:
            edit.written = session.weight.write(edit.name, edit.assertion(session.preset))
        except ValueError as error:  # exploding or not finite: nothing was written
            edit.decide(EditStatus.REJECTED, str(error))
            return
        finally:
            edit.seconds["write"] = time.perf_counter() - started
        if edit.written.realised < self.least_realised:
            session.weight.revert()
            edit.decide(
                EditStatus.REJECTED,
                f"only {edit.written.realised:.0%} of the change survives rounding to "
                f"{session.weight.site.weight.dtype}; load the model in float32",
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        session = getattr(pl_module, "session", None)
        if session is not None:
            session.weight.revert()
