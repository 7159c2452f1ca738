"""The Trainer behind the command line: Lightning's, with a verb that edits."""

import logging
import shutil
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rome_pl.data_modules import RequestDataModule
from rome_pl.edit import EditError, EditStatus
from rome_pl.edit_module import RomeModule
from rome_pl.errors import OptionError, RomeError
from rome_pl.language_model import load_encoder
from rome_pl.requests import RequestError

__all__ = ["APPLIED", "BAD_CONFIGURATION", "INTERRUPTED", "SOME_FAILED", "RomeTrainer", "RunFolderError"]

APPLIED, BAD_CONFIGURATION, SOME_FAILED, INTERRUPTED = 0, 2, 3, 130
"""Exit codes: all edits applied; bad configuration; some skipped, rejected or rolled back; interrupted."""

_RUN_FILES = ("config.yaml", "manifest.json", "results.json", "ledger", "tensorboard")

log = logging.getLogger(__name__)


class RunFolderError(RomeError):
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
        if save_model is not None:
            _check_save_folder(Path(save_model), model, overwrite)
        # Whatever may be wrong with data and model comes to light before an earlier run is replaced.
        datamodule.setup()
        model.configure_model()
        if self.is_global_zero:
            _claim_run_folder(Path(self.default_root_dir), overwrite)
        interrupted = False
        try:
            self.fit(model, datamodule=datamodule)
        except SystemExit:  # how Lightning leaves after Ctrl-C
            if self.state.status is not TrainerStatus.INTERRUPTED:
                raise
            interrupted = True
        except EditError as error:
            log.error("%s", error)
        applied = sum(edit.status is EditStatus.APPLIED for edit in model.session.edits) if model.session else 0
        if save_model is not None and (applied or not interrupted):
            assert model.language_model is not None
            model.language_model.model.save_pretrained(save_model)
            model.language_model.tokenizer.save_pretrained(save_model)
            log.info("Saved the model with %d edits to %s", applied, save_model)
        complete = applied == len(datamodule.requests) + len(datamodule.invalid)
        self.exit_code = INTERRUPTED if interrupted else APPLIED if complete else SOME_FAILED

    def _dry_run(self, model: RomeModule, datamodule: RequestDataModule) -> None:
        datamodule.setup()
        encoder = load_encoder(model.hparams["pretrained"])
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
                *(escape(str(cell)) for cell in (request.case_id, request.prompt, repr(lookup), repr(target)))
            )
        console.print(table)
        for message in refused:
            console.print(message, style="red", markup=False)
        console.print(f"{table.row_count} requests are valid, {len(refused)} are not; nothing was edited")
        self.exit_code = SOME_FAILED if refused else APPLIED


def _check_save_folder(folder: Path, model: RomeModule, overwrite: bool) -> None:
    if not model.hparams["sequential_edit"]:
        raise OptionError("save_model: in single-edit mode every edit is taken back; set model.sequential_edit: true")
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"save_model: {folder} is a file; give a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise RunFolderError(f"save_model: {folder} is not empty; choose another folder, or add --overwrite")


def _claim_run_folder(folder: Path, overwrite: bool) -> None:
    """Make sure that the folder holds nothing but what a run may write.

    Files that a run leaves when it fails before its first edit are no earlier run.
    """
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()}
    kept = {"results.json"} & names
    if (folder / "ledger" / "edits.jsonl").exists():
        kept.add("ledger")
    if foreign := names - set(_RUN_FILES):
        kept |= foreign
    if kept and not overwrite:
        raise RunFolderError(
            f"{folder} is not empty ({', '.join(sorted(kept)[:5])}); choose another --trainer.default_root_dir, "
            "or add --overwrite, which replaces an earlier run there and nothing else"
        )
    for path in (folder / name for name in _RUN_FILES):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
