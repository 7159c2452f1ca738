"""Shows a computation of second moments where people look: scalars, pictures, results.json and a table."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from rome_pl.files.whole_files import write_json
from rome_pl.reports.moment_results import (
    agreement_figure,
    moment_manifest,
    moment_results,
    moment_table,
    spectrum_figure,
)
from rome_pl.second_moments.moment_pass import Finished
from rome_pl.second_moments.second_moment import SecondMoment, Spectrum
from rome_pl.second_moments.split_half import HalfAgreement
from rome_pl.utils.console import console

__all__ = ["MomentReport"]


class MomentReport(Callback):
    """Reports second moments as they become known, with the number of keys as the x axis.

    Scalars to every logger: ``agreement/layer_…`` and ``keys_per_second`` where halves are compared; at the end
    ``condition/…``, ``ridge/…`` and ``effective_rank/…``. Pictures of the spectra and of the agreement go to
    TensorBoard and, beside ``manifest.json`` and ``results.json``, below the Trainer's ``default_root_dir``.

    Args:
        largest_spectrum: Longest key whose eigenvalues are computed: they take a second a layer at 1,536, but minutes
            beyond 8,192.
    """

    def __init__(self, largest_spectrum: int = 8192) -> None:
        self.largest_spectrum = largest_spectrum
        self._started = 0.0

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not all(hasattr(pl_module, name) for name in ("finished", "history")):
            raise TypeError(f"MomentReport works with CovarianceModule, not with {type(pl_module).__name__}")
        self._started = time.monotonic()

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(outputs, HalfAgreement):
            return
        scalars = {f"agreement/layer_{layer}": value for layer, value in outputs.agreement.items()}
        scalars["keys_per_second"] = outputs.keys / (time.monotonic() - self._started)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=outputs.keys)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        module: Any = pl_module
        finished: Sequence[Finished] = module.finished
        history: Sequence[Sequence[HalfAgreement]] = module.history
        seconds = time.monotonic() - self._started
        spectra = self._spectra(finished)
        for done in finished:
            if (spectrum := spectra.get(done.layer)) is not None:
                scalars = {
                    f"condition/layer_{done.layer}": spectrum.condition,
                    f"ridge/layer_{done.layer}": spectrum.ridge,
                    f"effective_rank/layer_{done.layer}": spectrum.effective_rank,
                }
                for logger in trainer.loggers:
                    logger.log_metrics(scalars, step=done.info.count)
        folder = Path(trainer.default_root_dir)
        figures = {}
        if spectra:
            figures["spectrum"] = spectrum_figure(spectra)
        if any(check.agreement for checks in history for check in checks):
            figures["agreement"] = agreement_figure(history)
        for name, figure in figures.items():
            (folder / "figures").mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / "figures" / f"{name}.png", dpi=120)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(name, figure, max(done.info.count for done in finished))
        write_json(folder / "results.json", moment_results(finished, spectra, history, seconds))
        write_json(folder / "manifest.json", moment_manifest(module))
        console().print(moment_table(finished, spectra))
        where = ", ".join(sorted({str(done.path.parent) for done in finished}))
        console().print(
            f"{len(finished)} second moments in {where}, {seconds:.0f} s. Report in {folder}",
            soft_wrap=True,
            markup=False,
        )

    def _spectra(self, finished: Sequence[Finished]) -> dict[int, Spectrum]:
        """Eigenvalues of what is stored, by layer: of what solves will use."""
        spectra = {}
        for done in finished:
            moment = SecondMoment.load(done.path)
            if moment.matrix.shape[-1] <= self.largest_spectrum:
                spectra[done.layer] = moment.spectrum()
        return spectra
