"""The Trainer behind the command line: Lightning's, with a verb that edits."""

import logging
import shutil
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from rich.console import Console
from rich.table import Table

from rome_pl.data_modules import RequestDataModule
from rome_pl.edit import EditError, EditStatus, session_of
from rome_pl.edit_module import RomeModule
from rome_pl.encoding import TextEncoder
from rome_pl.language_model import load_tokenizer
from rome_pl.requests import RequestError

__all__ = ["APPLIED", "BAD_CONFIGURATION", "INTERRUPTED", "SOME_FAILED", "RomeTrainer", "RunFolderError"]

APPLIED, BAD_CONFIGURATION, SOME_FAILED, INTERRUPTED = 0, 2, 3, 130
"""Exit codes: all edits applied; bad configuration; some skipped, rejected or rolled back; interrupted."""

_RUN_FILES = ("config.yaml", "manifest.json", "results.json", "ledger", "tensorboard")

log = logging.getLogger(__name__)


class RunFolderError(ValueError):
    """A run folder that holds an earlier run."""


class RomeTrainer(Trainer):
    """Lightning's Trainer with the verbs of the command line. ``exit_code`` tells how the last one ended."""

    exit_code: int = APPLIED

    def edit(
        self,
        model: LightningModule,
        datamodule: RequestDataModule,
        save_model: str | None = None,
        overwrite: bool = False,
        dry_run: bool = False,
    ) -> None:
        """Apply a stream of edits, verify each, and report.

        Args:
            model: The module.
            datamodule: The requests.
            save_model: Folder for a Hugging Face checkpoint of the final model.
            overwrite: Whether a run folder that holds an earlier run may be replaced.
            dry_run: Validate all requests, print each lookup token and target span, and edit nothing.

        Raises:
            RunFolderError: If the run folder holds an earlier run.
        """
        if not isinstance(model, RomeModule):
            raise TypeError(f"expected a RomeModule, got {type(model).__name__}")
        if dry_run:
            self._dry_run(model, datamodule)
            return
        self._claim_run_folder(overwrite)
        if save_model is not None:
            if not model.hparams["sequential_edit"]:
                raise ValueError(
                    "save_model: in single-edit mode every edit is taken back; set model.sequential_edit: true"
                )
            if Path(save_model).exists() and any(Path(save_model).iterdir()) and not overwrite:
                raise RunFolderError(
                    f"save_model: {save_model} is not empty; choose another folder, or add --overwrite"
                )
        interrupted = False
        try:
            self.fit(model, datamodule=datamodule)
        except SystemExit:  # how Lightning leaves after Ctrl-C
            if self.state.status is not TrainerStatus.INTERRUPTED:
                raise
            interrupted = True
        except EditError as error:
            log.error("%s", error)
        if model.session is None:
            self.exit_code = INTERRUPTED
            return
        session = session_of(model)
        if save_model is not None:
            session.language_model.model.save_pretrained(save_model)
            session.language_model.tokenizer.save_pretrained(save_model)
            log.info("Saved the edited model to %s", save_model)
        applied = sum(edit.status is EditStatus.APPLIED for edit in session.edits)
        complete = applied == len(datamodule.requests) + len(datamodule.invalid)
        self.exit_code = INTERRUPTED if interrupted else APPLIED if complete else SOME_FAILED

    def _claim_run_folder(self, overwrite: bool) -> None:
        folder = Path(self.default_root_dir)
        earlier = [folder / name for name in _RUN_FILES if (folder / name).exists()]
        if earlier and not overwrite:
            raise RunFolderError(
                f"{folder} holds an earlier run ({', '.join(path.name for path in earlier)}); "
                "choose another --trainer.default_root_dir, or add --overwrite"
            )
        for path in earlier:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _dry_run(self, model: RomeModule, datamodule: RequestDataModule) -> None:
        datamodule.setup()
        encoder = TextEncoder(load_tokenizer(model.hparams["pretrained"]), max_length=2**20)
        console = Console()
        table = Table(title="Dry run: lookup token and target span of each request")
        for name in ("record", "prompt", "lookup token", "target tokens"):
            table.add_column(name, overflow="fold")
        refused = [record.message for record in datamodule.invalid]
        for request in datamodule.requests:
            try:
                lookup, target = encoder.describe(request, model.hparams["fact_token"])
                encoder.check_probes(request)
            except RequestError as error:
                refused.append(str(error))
                continue
            table.add_row(
                *(
                    str(cell).replace("[", r"\[")
                    for cell in (request.case_id, request.prompt, repr(lookup), repr(target))
                )
            )
        console.print(table)
        for message in refused:
            console.print(message, style="red", markup=False)
        console.print(f"{table.row_count} requests are valid, {len(refused)} are not; nothing was edited")
        self.exit_code = SOME_FAILED if refused else APPLIED
