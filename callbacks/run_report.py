"""Writes a run's manifest and results, and prints them."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from typing_extensions import override

from rome_pl.edit import EditSession, session_of
from rome_pl.report import edit_table, manifest, results, score_table, write_json

__all__ = ["RunReport"]


class RunReport(Callback):
    """Writes ``manifest.json`` and ``results.json`` under the Trainer's ``default_root_dir`` and prints the tables.

    After an exception or Ctrl-C, results.json holds what was done.

    Args:
        largest_table: Most edits that are printed one by one; the files hold all.
    """

    def __init__(self, largest_table: int = 20) -> None:
        self.largest_table = largest_table
        self._written = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._written = False
        if not trainer.is_global_zero:
            return
        write_json(
            Path(trainer.default_root_dir) / "manifest.json",
            manifest(session_of(pl_module), int(pl_module.hparams["seed"])),
        )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = session_of(pl_module)
        reached = len(session.edits) == len(session.requests) + session.num_refused
        self._write(trainer, session, interrupted=not reached)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        session = getattr(pl_module, "session", None)
        if isinstance(session, EditSession) and session.requests and not self._written:
            self._write(trainer, session, interrupted=True)

    def _write(self, trainer: Trainer, session: EditSession, interrupted: bool) -> None:
        if not trainer.is_global_zero:
            return
        invalid = getattr(trainer.datamodule, "invalid", [])  # type: ignore[attr-defined]  # set by Trainer.fit
        content = results(session, invalid, interrupted)
        path = Path(trainer.default_root_dir) / "results.json"
        write_json(path, content)
        self._written = True
        console = Console()
        shown = sorted(session.edits, key=lambda edit: edit.index)[: self.largest_table]
        console.print(edit_table(shown))
        if len(shown) < len(session.edits):
            console.print(f"({len(session.edits) - len(shown)} more edits in {path})")
        console.print(score_table(content))
        counts = ", ".join(
            f"{content['n_' + name]} {name.replace('_', ' ')}"
            for name in ("applied", "rejected", "skipped", "rolled_back")
        )
        console.print(f"{content['n_requested']} requested: {counts}. Results in {path}")
