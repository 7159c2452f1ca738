"""Ends edits: keeps or reverts them, and records them."""

from pathlib import Path
from typing import Any

from filelock import BaseFileLock
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.editing.edit import EditBatch, edits_of
from rome_pl.editing.resume import check_model, check_records
from rome_pl.editing.session import EditSession, session_of
from rome_pl.ledger.edit_log import Ledger, LedgerError
from rome_pl.ledger.status import EditStatus
from rome_pl.utils.distributed import gather

__all__ = ["EditCommit"]


class EditCommit(Callback):
    """Keeps the pending writes in sequential mode, and appends the edits to the ledger.

    On several devices it also brings the edits of all of them together: what comes after it sees them all.

    Args:
        ledger: Whether to keep a ledger, in ``ledger/`` under the Trainer's ``default_root_dir``.
        resume: Whether to resume from a ledger that is there already: the edits that it holds are taken over, not made
            again, and the weights become bit for bit what they were. The stream and the settings have to be the same.
    """

    def __init__(self, ledger: bool = False, resume: bool = False) -> None:
        self.ledger, self.resume = ledger, resume
        self.lock: BaseFileLock | None = None
        """The lock of the ledger's folder, where whoever runs this holds it already."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ledger and trainer.is_global_zero:
            session, run = session_of(pl_module), Path(trainer.default_root_dir)
            session.ledger = Ledger(run / "ledger", self.resume, lock=self.lock)
            if session.ledger.resuming:
                stream = getattr(trainer.train_dataloader, "dataset", ())
                try:
                    check_model(run, session.language_model)
                    check_records(run, session.ledger.all_ahead(), stream)
                except LedgerError:
                    _close(session)
                    raise

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        session = session_of(pl_module)
        if any(edit.status is EditStatus.PENDING and edit.written is None for edit in edits_of(outputs)):
            raise RuntimeError(
                "EditCommit found no write to keep: list RankOneWriter before it (see default_callbacks)"
            )
        if trainer.world_size > 1:
            own = {edit.name for edit in edits_of(outputs)}
            everyone = gather([edit.on_cpu() for edit in edits_of(outputs)])
            others = [edit for edit in everyone if edit.name not in own]
            session.edits += others
            outputs["edits"] = sorted(edits_of(outputs) + others, key=lambda edit: edit.index)
        edits = edits_of(outputs)
        verdicts = [EditStatus.APPLIED if edit.status is EditStatus.PENDING else edit.status for edit in edits]
        if session.ledger is not None:
            # The lines on disk are the commit: whatever stops the run before them reverts the writes.
            session.ledger.append_batch(
                [
                    (
                        edit.line() | {"status": str(verdict)},
                        edit.written if verdict is EditStatus.APPLIED else None,
                    )
                    for edit, verdict in zip(edits, verdicts, strict=True)
                ],
                joint=session.sequential,
            )
        session.layers.commit()
        for edit, verdict in zip(edits, verdicts, strict=True):
            edit.status = verdict

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = session_of(pl_module)
        _close(session)
        if session.ledger is not None and session.ledger.resuming:
            raise LedgerError(
                f"{session.ledger.folder}: the stream ended before the edits that are on record there "
                f"({', '.join(session.ledger.names_ahead()[:5])}, ...): the model lacks them. Resume it to its end"
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        session = getattr(pl_module, "session", None)
        if not isinstance(session, EditSession):
            return
        _close(session)
        for edit in session.edits:
            edit.free()
            if edit.status is EditStatus.PENDING:
                edit.decide(EditStatus.SKIPPED, f"the run ended during this edit ({type(exception).__name__})")
                edit.scores.clear()


def _close(session: EditSession) -> None:
    if session.ledger is not None:
        session.ledger.close()
