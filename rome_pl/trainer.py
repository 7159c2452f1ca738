"""The Trainer behind the command line: Lightning's, with a verb that edits."""

import logging
from pathlib import Path
from typing import TypeVar

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerStatus
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rome_pl.architecture import RewriteSite
from rome_pl.callbacks import EditCommit, TraceReport
from rome_pl.covariance_module import CovarianceModule, check_trainer
from rome_pl.data_modules import CorpusDataModule, RequestDataModule
from rome_pl.edit import EditError, EditStatus
from rome_pl.edit_module import RomeModule
from rome_pl.errors import OptionError
from rome_pl.evaluation_module import EvaluationModule
from rome_pl.language_model import load_encoder
from rome_pl.layer_trial import trial_requests
from rome_pl.published_statistics import export_npz, import_npz
from rome_pl.requests import RequestError
from rome_pl.resume import check_model, check_settings, is_finished
from rome_pl.run_folder import RunFolderError, can_resume, check_save_folder, claim_run_folder
from rome_pl.sampling import sample_requests
from rome_pl.second_moment import SecondMoment
from rome_pl.statistics import kept_statistics, statistics_folder, unfinished_folder
from rome_pl.trace_module import TraceModule

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
            resume: ``auto`` goes on with the run in the run folder, and begins one if there is none; a path goes on
                with the run in that folder.
            force: Whether to resume under other settings than those of the run.

        Raises:
            RunFolderError: If the run folder holds an earlier run, or none that could be resumed.
            LedgerError: If the settings have changed since the run to be resumed began.
        """
        if not isinstance(model, RomeModule):
            raise TypeError(f"expected a RomeModule, got {type(model).__name__}")
        if dry_run:
            self._dry_run(model, datamodule)
            return
        folder = Path(self.default_root_dir)
        resuming = can_resume(folder, resume, overwrite)
        if save_model is not None:
            check_save_folder(Path(save_model), model.hparams["sequential_edit"], overwrite or resuming)
        # Whatever may be wrong with data and model comes to light before an earlier run is replaced.
        datamodule.setup()
        model.configure_model()
        if resuming:
            if self.world_size > 1:
                raise OptionError("resume: a run is gone on with on one device only; set trainer.devices: 1")
            assert model.language_model is not None
            check_model(folder, model.language_model)
            if not force:
                self._check_settings(folder)
            if is_finished(folder):
                log.warning("The run in %s is finished: there is nothing to resume", folder)
                return
            commit = self._callback(EditCommit)
            if commit is None:
                raise OptionError("resume: the Trainer has no EditCommit, which keeps the ledger")
            commit.resume = True
        elif self.is_global_zero:
            claim_run_folder(folder, overwrite)
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
        folder = Path(model.hparams["folder"]).expanduser() if model.hparams["folder"] else statistics_folder()
        if list:
            _show_statistics(folder)
            return
        if import_npz is not None:
            _import(model, Path(import_npz), folder)
            return
        if self.is_global_zero:
            # Whatever may be wrong comes to light before an earlier report is replaced.
            check_trainer(self)
            if datamodule.corpus is not None:
                next(datamodule.corpus.texts())
            model.load()
            model.sites()
            claim_run_folder(Path(self.default_root_dir), overwrite)
        if not self._ran_to_its_end(model, datamodule):
            return
        if export_npz is not None and self.is_global_zero:
            _export(model, Path(export_npz))

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
        if ledger is not None and Path(ledger).expanduser().resolve() == folder.resolve():
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
        path = folder / "config.yaml"
        now = self._callback(SaveConfigCallback)
        if now is not None and path.is_file():
            settings = now.parser.dump(now.config, skip_none=False)
            check_settings(folder, yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(settings))

    def _dry_run(self, model: RomeModule, datamodule: RequestDataModule) -> None:
        datamodule.setup()
        encoder = load_encoder(model.hparams["pretrained"], model.hparams["chat"])
        console = Console()
        table = Table(title="Dry run: lookup token and target span of each request")
        noted = any(request.notes for request in datamodule.requests)
        for name in ("record", "prompt", "lookup token", "target tokens", *(["notes"] if noted else [])):
            table.add_column(name, overflow="fold")
        refused = [record.message for record in datamodule.invalid]
        for request in datamodule.requests:
            try:
                lookup, target = encoder.describe(request, model.hparams["fact_token"])
                encoder.check_probes(request)
            except RequestError as error:
                refused.append(str(error))
                continue
            cells = (request.case_id, request.prompt, repr(lookup), repr(target), "; ".join(request.notes))
            table.add_row(*(escape(str(cell)) for cell in cells[: len(table.columns)]))
        console.print(table)
        for message in refused:
            console.print(message, style="red", markup=False)
        console.print(f"{table.row_count} requests are valid, {len(refused)} are not; nothing was edited")
        self.exit_code = SOME_FAILED if refused else APPLIED


def _show_statistics(folder: Path) -> None:
    table = Table(title=f"Second moments in {folder}")
    for name in ("model", "layer", "keys", "halves agree", "corpus", "date", "file"):
        table.add_column(name, overflow="fold")
    for path, info in kept_statistics(folder):
        if info is None:
            table.add_row(*("?",) * 6, f"{path.name} (damaged: delete it)")
            continue
        agreement = f"{info.agreement:.3f}" if info.agreement is not None else ""
        cells = (info.model, str(info.layer), str(info.count), agreement, info.source or info.corpus, info.date)
        table.add_row(*(escape(cell) for cell in (*cells, path.name)))
    console = Console()
    console.print(table)
    unfinished = sorted(unfinished_folder(folder).glob("*/process-*.safetensors"))
    if unfinished:
        console.print(f"{len({path.parent for path in unfinished})} unfinished; the same command goes on with them")


def _loaded_sites(model: CovarianceModule) -> list[RewriteSite]:
    model.load()
    return model.sites()


def _import(model: CovarianceModule, path: Path, folder: Path) -> None:
    sites = _loaded_sites(model)
    if len(sites) != 1:
        raise OptionError(f"import_npz: one file is of one layer; give model.layers one layer, not {len(sites)}")
    assert model.language_model is not None
    moment = import_npz(path, model.language_model, sites[0])
    target = folder / f"{path.stem}.layer{sites[0].layer}.{moment.info.weights[:12]}.safetensors"
    moment.save(target)
    log.warning(
        "%s: taken for layer %d of %s, which the file itself does not say. Kept as %s; edits of this model find it",
        path,
        sites[0].layer,
        model.language_model.source,
        target,
    )


def _export(model: CovarianceModule, folder: Path) -> None:
    sites = {site.layer: site for site in model.sites()}
    for done in model.finished:
        path = export_npz(SecondMoment.load(done.path), folder, sites[done.layer])
        log.info("Layer %d: %s", done.layer, path)
