"""Shows a computation of second moments where people look: scalars, pictures, results.json and a table."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich import box
from rich.table import Table
from typing_extensions import override

from rome_pl.console import console
from rome_pl.convergence import Check
from rome_pl.moment_pass import Finished
from rome_pl.report import write_json
from rome_pl.second_moment import SecondMoment, Spectrum, library_versions

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
        if not isinstance(outputs, Check):
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
        history: Sequence[Sequence[Check]] = module.history
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
        write_json(folder / "results.json", _results(finished, spectra, history, seconds))
        write_json(folder / "manifest.json", _manifest(module))
        console().print(_table(finished, spectra))
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
            if len(moment.matrix) <= self.largest_spectrum:
                spectra[done.layer] = moment.spectrum()
        return spectra


def spectrum_figure(spectra: Mapping[int, Spectrum]) -> Any:
    """Eigenvalues of the second moment of each layer, falling, with the ridge that solves add."""
    figure, axes = _figure()
    for (layer, spectrum), colour in zip(spectra.items(), _colours(len(spectra)), strict=True):
        values = spectrum.eigenvalues
        axes.plot(range(1, len(values) + 1), values.clamp(min=1e-12), color=colour, label=f"layer {layer}")
        axes.axhline(spectrum.ridge, color=colour, linestyle=":", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="eigenvalue of C (dotted: ridge)")
    return _with_legend(figure, len(spectra))


def agreement_figure(history: Sequence[Sequence[Check]]) -> Any:
    """How well two halves of the text agree on ``C⁻¹k``, against the number of keys."""
    figure, axes = _figure()
    layers = sorted({layer for checks in history for check in checks for layer in check.agreement})
    for layer, colour in zip(layers, _colours(len(layers)), strict=True):
        points = [
            (check.keys, check.agreement[layer]) for checks in history for check in checks if layer in check.agreement
        ]
        axes.plot(*zip(*points, strict=True), marker=".", color=colour, label=f"layer {layer}")
    axes.set(xscale="log", xlabel="keys", ylabel="mean cosine of C⁻¹k from two halves", ylim=(0, 1.01))
    return _with_legend(figure, len(layers))


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, whose global figures would have to be closed

    figure = Figure(figsize=(7, 4), layout="constrained")
    return figure, figure.subplots()


def _colours(number: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](index / max(1, number - 1)) for index in range(number)]


def _with_legend(figure: Any, number: int) -> Any:
    figure.legend(loc="outside right center", frameon=False, fontsize=7, ncols=1 + number // 24)
    return figure


def _results(
    finished: Sequence[Finished],
    spectra: Mapping[int, Spectrum],
    history: Sequence[Sequence[Check]],
    seconds: float,
) -> dict[str, Any]:
    layers = []
    for done in finished:
        entry: dict[str, Any] = {
            "layer": done.layer,
            "path": str(done.path),
            "cached": done.cached,
            "count": done.info.count,
            "agreement": done.info.agreement,
        }
        spectrum = spectra.get(done.layer)
        for name in ("ridge", "condition", "effective_rank", "null_dimensions"):
            entry[name] = getattr(spectrum, name) if spectrum is not None else None
        entry["eigenvalues"] = spectrum.eigenvalues.tolist() if spectrum is not None else None
        layers.append(entry)
    return {
        "seconds": seconds,
        "n_layers": len(finished),
        "n_cached": sum(done.cached for done in finished),
        "layers": layers,
        "meetings": [[asdict(check) for check in checks] for checks in history],
    }


def _manifest(module: Any) -> dict[str, Any]:
    language_model, moments = module.language_model, module.moments
    return {
        "versions": library_versions(),
        "model": {
            "source": language_model.source,
            "fingerprint": language_model.fingerprint,
            "tokenizer": language_model.tokenizer_fingerprint,
            "device": str(language_model.device),
        },
        "corpus": {"source": moments.corpus.source, "fingerprint": moments.corpus.fingerprint},
        "block": [moments.packer.rows, moments.packer.length],
        "documents_apart": moments.apart,
        "options": asdict(moments.options),
    }


def _table(finished: Sequence[Finished], spectra: Mapping[int, Spectrum]) -> Table:
    table = Table(title="Second moments of keys", box=box.SIMPLE_HEAD)
    for name in ("layer", "keys", "halves agree", "condition", "effective rank"):
        table.add_column(name, justify="right")
    table.add_column("file", overflow="fold")
    for done in finished:
        spectrum = spectra.get(done.layer)
        table.add_row(
            str(done.layer),
            str(done.info.count),
            f"{done.info.agreement:.4f}" if done.info.agreement is not None else "",
            f"{spectrum.condition:.1e}" if spectrum is not None else "",
            f"{spectrum.effective_rank:.0f}" if spectrum is not None else "",
            done.path.name + " (cached)" * done.cached,
        )
    return table
