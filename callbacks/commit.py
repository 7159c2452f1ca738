"""Ends an edit: keeps it or takes it back, and records it."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.edit import Edit, EditSession, EditStatus, session_of
from rome_pl.ledger import Ledger

__all__ = ["EditCommit"]


class EditCommit(Callback):
    """Keeps the pending write in sequential mode, takes it back in single mode, and appends the edit to the ledger.

    Args:
        ledger: Whether to keep a ledger, in ``ledger/`` under the Trainer's ``default_root_dir``.
    """

    def __init__(self, ledger: bool = False) -> None:
        self.ledger = ledger

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ledger:
            session_of(pl_module).ledger = Ledger(Path(trainer.default_root_dir) / "ledger")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Edit, batch_idx: int
    ) -> None:
        edit: Edit = outputs["edit"]
        session = session_of(pl_module)
        if edit.status is EditStatus.PENDING:
            if not session.weight.pending:
                raise RuntimeError(
                    "EditCommit found no write to keep: list RankOneWriter before it (see default_callbacks)"
                )
            verdict = EditStatus.APPLIED
        else:
            verdict = edit.status
        if session.ledger is not None:
            # The line on disk is the commit: whatever stops the run before it takes the write back.
            record = edit.record() | {"status": str(verdict), "layer": session.weight.site.layer}
            session.ledger.append(record, edit.written if verdict is EditStatus.APPLIED else None)
        if session.sequential:
            session.weight.commit()
        else:
            session.weight.revert()
        edit.status = verdict

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        session = getattr(pl_module, "session", None)
        if isinstance(session, EditSession) and session.edits and session.edits[-1].status is EditStatus.PENDING:
            edit = session.edits[-1]
            edit.decide(EditStatus.SKIPPED, f"the run ended during this edit ({type(exception).__name__})")
            edit.scores.clear()
