"""Writes what causal tracing and trial edits have found, shows it in TensorBoard, and prints it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from rome_pl.files.whole_files import whole_file, write_json, write_lines, write_text
from rome_pl.reports.drawing import Figure, pixels, png
from rome_pl.reports.trace_figures import effect_maps, fact_maps, trial_curve
from rome_pl.reports.trace_results import (
    edit_options,
    effect_table,
    trace_manifest,
    trace_record,
    trace_results,
    trial_score_table,
    verdict,
)
from rome_pl.tracing.indirect_effects import trace_table
from rome_pl.tracing.layer_choice import edit_config, trial_table
from rome_pl.utils.console import console

__all__ = ["TraceReport"]


class TraceReport(Callback):
    """Writes ``results.json``, ``manifest.json``, ``records.jsonl``, ``table.md`` and ``figures/`` of tracing.

    All go below the Trainer's ``default_root_dir``. Scalars ``effect/KIND/ROLE`` and, after trial edits, ``trial/…`` go
    to every logger with the layer as the x axis; a TensorBoard logger gets the pictures too. After trial edits there is
    an ``edit.yaml``, with which ``rome-pl edit`` edits at the layer that did best.

    Args:
        pictures: Facts that get a picture of their own, the first ones.
    """

    def __init__(self, pictures: int = 3) -> None:
        self.pictures = pictures

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not hasattr(pl_module, "traced"):
            raise TypeError(f"TraceReport works with TraceModule, not with {type(pl_module).__name__}")
        content = self._write(trainer, pl_module)
        for kind, roles in content["effects"].items():
            for role, entries in roles.items():
                for layer, found in enumerate(entries):
                    if found["value"] is not None:
                        _log(trainer, {f"effect/{kind}/{role}": found["value"]}, layer)
        module: Any = pl_module
        pictures = {"effects": effect_maps(content)}
        pictures |= {
            f"fact_{place}": fact_maps(fact, module.window)
            for place, fact in enumerate(module.traced[: self.pictures], start=1)
        }
        _show(trainer, pictures)
        out = console()
        out.print(effect_table(content))
        for note in content["notes"]:
            out.print(note, markup=False, soft_wrap=True)
        out.print(
            f"{content['n_requested']} facts: {content['n_known']} known, {content['n_traced']} of them traced in "
            f"{content['seconds']:.0f} s; {content['n_unknown']} not known, {content['n_skipped']} skipped. Results in "
            f"{Path(trainer.default_root_dir) / 'results.json'}",
            soft_wrap=True,
            markup=False,
        )

    def report_trial(self, trainer: Trainer, module: LightningModule) -> None:
        """Add what trial edits have shown (``module.trial``) to what is written, and print it."""
        content = self._write(trainer, module)
        for found in content["trial"]["layers"]:
            scores = {f"trial/{name}": entry["value"] for name, entry in found["scores"].items()}
            _log(trainer, {name: value for name, value in scores.items() if value is not None}, found["layer"])
        _show(trainer, {"trial": trial_curve(content)})
        folder = Path(trainer.default_root_dir)
        path = folder / "edit.yaml"
        command = f"rome-pl edit --config {shlex.quote(str(path))} --data.path FILE"
        write_text(path, edit_config(content, edit_options(module), command))
        out = console()
        out.print(trial_score_table(content))
        out.print(verdict(content), markup=False, soft_wrap=True)
        out.print(f"To edit there: {command}", markup=False, soft_wrap=True)

    @staticmethod
    def _write(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        module: Any = pl_module
        folder = Path(trainer.default_root_dir)
        invalid = getattr(trainer.datamodule, "invalid", [])  # type: ignore[attr-defined]  # set by Trainer.predict
        content = trace_results(module, invalid)
        write_json(folder / "results.json", content)
        write_json(folder / "manifest.json", trace_manifest(module, content))
        write_lines(folder / "records.jsonl", [trace_record(fact) for fact in module.traced])
        table = trace_table(content)
        if content["trial"] is not None:
            table += f"\n{trial_table(content)}\n{verdict(content)}\n"
        write_text(folder / "table.md", table)
        return content


def _log(trainer: Trainer, scalars: Mapping[str, float], layer: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=layer)


def _show(trainer: Trainer, figures: Mapping[str, Figure]) -> None:
    for name, figure in figures.items():
        with whole_file(Path(trainer.default_root_dir) / "figures" / f"{name}.png") as work:
            work.write_bytes(png(figure))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(f"figures/{name}", pixels(figure), 0, dataformats="HWC")
