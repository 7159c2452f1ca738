"""The Trainer behind the command line: Lightning's, with a verb that edits."""

import logging
from pathlib import Path
from typing import TypeVar

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerStatus

from rome_pl.callbacks import EditCommit, RunReport, TraceReport
from rome_pl.cli.dry_run import print_dry_run
from rome_pl.cli.npz_transfer import export_moments, import_moment
from rome_pl.cli.tuning import TuningPlan, run_tuning
from rome_pl.data_modules import CorpusDataModule, RequestDataModule
from rome_pl.editing.edit import EditError
from rome_pl.editing.resume import check_model, check_records, check_settings
from rome_pl.errors import OptionError
from rome_pl.export.checkpoint import difference, model_bytes, save_model
from rome_pl.files.whole_files import check_room, local_path
from rome_pl.ledger.edit_log import read_lines
from rome_pl.ledger.replay import replay
from rome_pl.ledger.run import run_folder
from rome_pl.ledger.run_end import all_applied, is_finished, mark_finished
from rome_pl.ledger.run_folder import (
    RunFolderError,
    can_resume,
    check_links,
    check_save_folder,
    claim_run_folder,
    held_run_folder,
    read_config,
)
from rome_pl.ledger.status import EditStatus
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.loading import load_encoder
from rome_pl.model.supported import check_saves_whole
from rome_pl.modules.covariance_module import CovarianceModule
from rome_pl.modules.evaluation_module import EvaluationModule
from rome_pl.modules.layer_trial import trial_requests
from rome_pl.modules.rome_module import RomeModule
from rome_pl.modules.trace_module import TraceModule
from rome_pl.modules.trainer_checks import check_limits, check_pass_trainer
from rome_pl.reports.statistics_table import show_statistics
from rome_pl.requests.sampling import sample_requests
from rome_pl.second_moments.moment_store import statistics_folder

__all__ = ["APPLIED", "BAD_CONFIGURATION", "INTERRUPTED", "SOME_FAILED", "UNEXPECTED", "RomeTrainer", "RunFolderError"]

APPLIED, UNEXPECTED, BAD_CONFIGURATION, SOME_FAILED, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes: all applied; unforeseen error; bad configuration; some skipped, rejected or rolled back; interrupted."""

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Callback)


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
        resume: str | None = None,
        force: bool = False,
    ) -> None:
        """Apply a stream of edits, verify each, and report.

        Args:
            model: The module.
            datamodule: The requests.
            save_model: Folder for a Hugging Face checkpoint of the final model.
            overwrite: Whether a run folder that holds an earlier run may be replaced.
            dry_run: Validate all requests, print each lookup token and target span, and edit nothing.
            resume: ``auto`` resumes the run in the run folder, or begins one if there is none; a path resumes the
                run in that folder.
            force: Whether to resume under other settings than those of the run.

        Raises:
            RunFolderError: If the run folder holds an earlier run, or none that could be resumed.
            LedgerError: If the settings have changed since the run to be resumed began.
        """
        if not isinstance(model, RomeModule):
            raise TypeError(f"expected a RomeModule, got {type(model).__name__}")
        if dry_run:
            self._print_dry_run(model, datamodule)
            return
        check_limits(self)
        folder = Path(self.default_root_dir)
        check_links(folder)
        resuming = can_resume(folder, resume, overwrite)
        target = None if save_model is None else local_path(save_model)
        if target is not None:
            sequential, source = model.hparams["sequential_edit"], model.hparams["pretrained"]
            check_save_folder(target, sequential, overwrite or resuming, folder, source)
        # Whatever may be wrong with data and model comes to light before an earlier run is replaced.
        datamodule.setup()
        language_model = model.load()
        if target is not None:
            check_saves_whole(language_model.model)
            check_room(target, model_bytes(language_model), "save_model")
        all_known = self._check_resumed(folder, language_model, datamodule, force) if resuming else True
        if self.world_size > 1:  # its processes may be others than this one, which could not pass on a lock
            if self.is_global_zero:
                claim_run_folder(folder, overwrite)
            self._edit(model, datamodule, folder, target)
            return
        with held_run_folder(folder, overwrite, resuming) as lock:
            report, commit = self._callback(RunReport), self._callback(EditCommit)
            missing = report.missing(folder) if report is not None else ()
            if resuming and all_known and is_finished(folder, missing):
                self._save_finished(language_model, folder, target)
                self.exit_code = APPLIED if all_applied(folder) and not datamodule.invalid else SOME_FAILED
                return
            if commit is not None:
                commit.resume, commit.lock = resuming, lock
            elif resuming:
                raise OptionError("resume: the Trainer has no EditCommit, which keeps the ledger")
            self._edit(model, datamodule, folder, target)

    def _print_dry_run(self, model: RomeModule, datamodule: RequestDataModule) -> None:
        """Print what would be edited; the model's weights are not loaded for that."""
        datamodule.setup()
        encoder = load_encoder(model.hparams["pretrained"], model.hparams["chat"])
        refused = print_dry_run(encoder, datamodule.requests, datamodule.invalid, model.hparams["fact_token"])
        self.exit_code = SOME_FAILED if refused else APPLIED

    def _check_resumed(
        self, folder: Path, language_model: LanguageModel, datamodule: RequestDataModule, force: bool
    ) -> bool:
        """Check that a run is resumed with its own model, settings and records.

        Returns:
            Whether the stream has no record that the run has not edited.
        """
        if self.world_size > 1:
            raise OptionError("resume: a run can be resumed on one device only; set trainer.devices: 1")
        check_model(folder, language_model)
        if not force:
            self._check_settings(folder)
        recorded = [line.record for line in read_lines(folder / "ledger" / "edits.jsonl")]
        return check_records(folder, recorded, datamodule.requests)

    def _edit(self, model: RomeModule, datamodule: RequestDataModule, folder: Path, target: Path | None) -> None:
        """Make the edits, save the model, and print what came of it last."""
        report, interrupted = self._callback(RunReport), False
        if report is not None:
            report.followed = True
        try:
            try:
                self.fit(model, datamodule=datamodule)
            except SystemExit:  # how Lightning leaves after Ctrl-C
                if self.state.status is not TrainerStatus.INTERRUPTED:
                    raise
                interrupted = True
            except EditError as error:
                log.error("%s", error)
            if not interrupted and not (model.session and model.session.edits):
                log.error("The stream ended before its first edit (trainer.max_time): nothing was edited")
            applied = sum(edit.status is EditStatus.APPLIED for edit in model.session.edits) if model.session else 0
            if target is not None and (applied or not interrupted):
                save_model(model.load(), target, replace=True)
                log.info("Saved the model with %d edits to %s", applied, target)
            if self.is_global_zero and report is not None and report.whole:
                mark_finished(folder)
        finally:
            if report is not None:
                report.tell()
        complete = applied == len(datamodule.requests) + len(datamodule.invalid)
        self.exit_code = INTERRUPTED if interrupted else APPLIED if complete else SOME_FAILED

    def _save_finished(self, language_model: LanguageModel, folder: Path, target: Path | None) -> None:
        """Save the model of a run that is finished, from its ledger, unless it is saved."""
        if target is None:
            log.warning("The run in %s is finished: there is nothing to resume", folder)
            return
        language_model.model.to(self.strategy.root_device)  # where the run made its edits: devices round differently
        layers = replay(language_model, folder)
        if difference(language_model, target) is None:
            log.warning("The run in %s is finished and saved to %s: there is nothing to resume", folder, target)
            return
        save_model(language_model, target, replace=True)
        log.info("The run in %s is finished. Saved its model with %d edits to %s", folder, len(layers.names), target)

    def covariance(
        self,
        model: LightningModule,
        datamodule: CorpusDataModule,
        overwrite: bool = False,
        list: bool = False,
        import_npz: str | None = None,
        export_npz: str | None = None,
    ) -> None:
        """Compute the second moments of keys that edits need, for any layers, in one pass over text.

        Args:
            model: The module.
            datamodule: The text.
            overwrite: Whether a run folder that holds an earlier run's report may be replaced.
            list: Show the second moments in the cache, and compute nothing.
            import_npz: File that kmeng01/rome published, to be kept as the second moment of the one layer asked for.
            export_npz: Folder in which the second moments are also written in that form.

        Raises:
            RunFolderError: If the run folder holds an earlier run.
        """
        if not isinstance(model, CovarianceModule):
            raise TypeError(f"expected a CovarianceModule, got {type(model).__name__}")
        folder = local_path(model.hparams["folder"]) if model.hparams["folder"] else statistics_folder()
        if list:
            show_statistics(folder)
            return
        if import_npz is not None:
            import_moment(model, local_path(import_npz), folder)
            return
        if self.is_global_zero:
            # Whatever may be wrong comes to light before an earlier report is replaced.
            check_pass_trainer(self)
            if datamodule.corpus is not None:
                next(datamodule.corpus.texts())
            model.load()
            model.sites()
            claim_run_folder(Path(self.default_root_dir), overwrite)
        if not self._ran_to_its_end(model, datamodule):
            return
        if export_npz is not None and self.is_global_zero:
            export_moments(model, local_path(export_npz))

    def evaluate(self, model: LightningModule, datamodule: RequestDataModule, overwrite: bool = False) -> None:
        """Measure requests on a model: an unedited one, one with a ledger's edits, or a saved one.

        Args:
            model: The module.
            datamodule: The requests.
            overwrite: Whether a run folder that holds an earlier run may be replaced.

        Raises:
            RunFolderError: If the run folder holds an earlier run.
        """
        if not isinstance(model, EvaluationModule):
            raise TypeError(f"expected an EvaluationModule, got {type(model).__name__}")
        folder, ledger = Path(self.default_root_dir), model.hparams["ledger"]
        if ledger is not None and run_folder(ledger).resolve() == folder.resolve():
            raise RunFolderError(f"{folder} holds the ledger itself; choose another --trainer.default_root_dir")
        # Whatever may be wrong with data and model comes to light before an earlier run is replaced.
        datamodule.setup()
        model.trainer = self
        model.check()
        if self.is_global_zero:
            claim_run_folder(folder, overwrite)
        if not self._ran_to_its_end(model, datamodule):
            return
        self.exit_code = SOME_FAILED if model.refused or datamodule.invalid else APPLIED

    def locate(self, model: LightningModule, datamodule: RequestDataModule, overwrite: bool = False) -> None:
        """Find where a model keeps facts by causal tracing, and by trial edits which layer to edit.

        Args:
            model: The module.
            datamodule: The facts.
            overwrite: Whether a run folder that holds an earlier run may be replaced.

        Raises:
            RunFolderError: If the run folder holds an earlier run.
        """
        if not isinstance(model, TraceModule):
            raise TypeError(f"expected a TraceModule, got {type(model).__name__}")
        # Whatever may be wrong with data and model comes to light before an earlier run is replaced.
        datamodule.setup()
        others = trial_requests(model.hparams)
        model.trainer = self
        model.check()
        claim_run_folder(Path(self.default_root_dir), overwrite)
        if not self._ran_to_its_end(model, datamodule):
            return
        requests = others or sample_requests(model.known, model.hparams["trial_edits"], model.hparams["seed"])
        trial = model.layer_trial()
        if trial is not None:
            try:
                model.trial = trial.run(requests, self.strategy.root_device)
            except KeyboardInterrupt:
                self.exit_code = INTERRUPTED
                return
            report = self._callback(TraceReport)
            if report is not None:
                report.report_trial(self, model)
        self.exit_code = SOME_FAILED if model.refused or datamodule.invalid else APPLIED

    def tune(
        self,
        model: LightningModule,
        datamodule: RequestDataModule,
        minutes: float = 30.0,
        edits: int = 20,
        layers: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Find layers and search settings for a model by trial edits, and write a configuration.

        Args:
            model: The module.
            datamodule: Facts with a true and a new target, paraphrases and neighbourhood prompts.
            minutes: How long it may take. What does not fit is left out, and said.
            edits: Facts that are edited with each setting.
            layers: Layers to try: ``all``, a range such as ``4-8``, or a list ``0,3,6``. ``None`` (default): six from
                the lowest one to the middle of the model.
            overwrite: Whether a run folder that holds an earlier run may be replaced.

        Raises:
            OptionError: If there are too few facts, or a layer does not exist.
            RunFolderError: If the run folder holds an earlier run.
        """
        if not isinstance(model, RomeModule):
            raise TypeError(f"expected a RomeModule, got {type(model).__name__}")
        datamodule.setup()
        folder, plan = Path(self.default_root_dir), TuningPlan(minutes, edits, layers, overwrite)
        if not run_tuning(model, datamodule.requests, folder, self.strategy.root_device, plan):
            self.exit_code = INTERRUPTED

    def _ran_to_its_end(self, model: LightningModule, datamodule: LightningDataModule) -> bool:
        """Run ``predict``; whether it was not interrupted."""
        try:
            self.predict(model, datamodule=datamodule, return_predictions=False)
        except SystemExit:  # how Lightning leaves after Ctrl-C
            if self.state.status is not TrainerStatus.INTERRUPTED:
                raise
            self.exit_code = INTERRUPTED
            return False
        return True

    def _callback(self, kind: type[T]) -> T | None:
        """The Trainer's callback of a kind, if it has one."""
        callbacks: list[Callback] = vars(self)["callbacks"]  # set in Lightning's connector, where types do not see it
        return next((callback for callback in callbacks if isinstance(callback, kind)), None)

    def _check_settings(self, folder: Path) -> None:
        """Refuse to resume a run under other settings, as far as the command line knows those of both."""
        now, then = self._callback(SaveConfigCallback), read_config(folder)
        if now is not None and then is not None:
            check_settings(folder, then, yaml.safe_load(now.parser.dump(now.config, skip_none=False)))
