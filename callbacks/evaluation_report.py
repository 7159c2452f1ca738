"""Writes what an evaluation has found, and prints it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.files.whole_files import write_json, write_lines, write_text
from rome_pl.reports.console_tables import score_table
from rome_pl.reports.evaluation_results import evaluation_manifest, evaluation_record, evaluation_results
from rome_pl.reports.html_report import html_report
from rome_pl.reports.run_figures import relation_bars, write_figures
from rome_pl.reports.run_results import invalid_record, settings_of
from rome_pl.reports.score_tables import csv_table, score_markdown
from rome_pl.requests.record_forms import InvalidRecord
from rome_pl.utils.console import console

__all__ = ["EvaluationReport"]

log = logging.getLogger(__name__)


class EvaluationReport(Callback):
    """Writes what a run of edits leaves too, below the Trainer's ``default_root_dir``; see :class:`RunReport`.

    ``manifest.json``, ``results.json``, ``records.jsonl``, ``table.md`` and ``table.csv``; then ``figures/`` and
    ``report.html``. Scalars ``evaluation/…`` go to every logger. Records that are no valid requests count as skipped.

    Args:
        figures: Whether figures and the page are made.
    """

    def __init__(self, figures: bool = True) -> None:
        self.figures = figures

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if not hasattr(pl_module, "base_scores"):
            raise TypeError(f"EvaluationReport works with EvaluationModule, not with {type(pl_module).__name__}")
        module: Any = pl_module
        folder = Path(trainer.default_root_dir)
        invalid = getattr(trainer.datamodule, "invalid", [])  # type: ignore[attr-defined]  # set by Trainer.predict
        content = self._write(folder, module, invalid)
        stage = "final" if module.edited else "base"
        scalars = {
            f"evaluation/{name}": entry["value"] for name, entry in content[stage].items() if entry["value"] is not None
        }
        if scalars:
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=0)
        out = console()
        out.print(score_table(content))
        for error in module.refused:
            out.print(f"skipped: {error}", style="red", markup=False)
        out.print(
            f"{content['n_requested']} requested, {content['n_skipped']} skipped, {module.seconds:.0f} s. "
            f"Results in {folder / 'results.json'}",
            soft_wrap=True,
            markup=False,
        )
        if (folder / "report.html").exists():
            out.print(f"To look at: {folder / 'report.html'}", soft_wrap=True, markup=False)

    def _write(self, folder: Path, module: Any, invalid: Sequence[InvalidRecord]) -> dict[str, Any]:
        """Write everything below a folder; the content of its results.json."""
        content = evaluation_results(module, len(invalid))
        refused = [InvalidRecord(-1, str(error.case_id), error.field, str(error)) for error in module.refused]
        content["records"] = [invalid_record(record) for record in (*invalid, *refused)]
        write_json(folder / "results.json", content)
        about = evaluation_manifest(module)
        write_json(folder / "manifest.json", about)
        records = [evaluation_record(module, index, request) for index, request in enumerate(module.requests)]
        write_lines(folder / "records.jsonl", records)
        write_text(folder / "table.md", score_markdown(content))
        write_text(folder / "table.csv", csv_table(content))
        if self.figures:
            try:
                bars = relation_bars(records, ("final", "base"))
                pictures = write_figures(folder, {} if bars is None else {"relations": bars})
                settings = settings_of(folder, module.hparams)
                write_text(folder / "report.html", html_report(content, records, about, settings, pictures))
            except Exception:  # the numbers are written
                log.warning("The figures or report.html could not be made", exc_info=True)
        return content
