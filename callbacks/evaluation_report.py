"""Writes what an evaluation has found, and prints it."""

import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.console import console
from rome_pl.exports import write_lines
from rome_pl.figures import relation_bars
from rome_pl.html_report import html_report
from rome_pl.metrics import summarise
from rome_pl.metrics.scores import record_values
from rome_pl.records import InvalidRecord
from rome_pl.report import invalid_record, score_table, settings_of, write_figures, write_json, write_text
from rome_pl.requests import EditRequest
from rome_pl.score_tables import csv_table, markdown_table
from rome_pl.second_moment import library_versions

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
        content = _results(module, len(invalid))
        refused = [InvalidRecord(-1, str(error.case_id), error.field, str(error)) for error in module.refused]
        content["records"] = [invalid_record(record) for record in (*invalid, *refused)]
        write_json(folder / "results.json", content)
        about = _manifest(module)
        write_json(folder / "manifest.json", about)
        records = [_record(module, index, request) for index, request in enumerate(module.requests)]
        write_lines(folder / "records.jsonl", records)
        write_text(folder / "table.md", markdown_table(content))
        write_text(folder / "table.csv", csv_table(content))
        if self.figures:
            try:
                bars = relation_bars(records, ("final", "base"))
                pictures = write_figures(folder, {} if bars is None else {"relations": bars})
                settings = settings_of(folder, module.hparams)
                write_text(folder / "report.html", html_report(content, records, about, settings, pictures))
            except Exception:  # the numbers are written
                log.warning("The figures or report.html could not be made", exc_info=True)
        moment = "final" if module.edited else "base"
        scalars = {
            f"evaluation/{name}": entry["value"]
            for name, entry in content[moment].items()
            if entry["value"] is not None
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


def _results(module: Any, n_invalid: int) -> dict[str, Any]:
    base, now = module.base_scores, module.scores
    text, fluency = module.text, module.fluency
    return {
        "mode": "evaluation",
        "base": summarise(base, base),
        "immediate": None,
        "final": summarise(now, base) if module.edited else None,
        "perplexity": {moment: text[moment].perplexity if moment in text else None for moment in ("base", "final")},
        "divergence": text["final"].divergence if "final" in text else None,
        "fluency": {moment: found.fluency for moment, found in fluency.items()},
        "consistency": {moment: found.consistency for moment, found in fluency.items()},
        "n_requested": len(module.requests) + len(module.refused) + n_invalid,
        "n_skipped": len(module.refused) + n_invalid,
        "n_edits": len(module.layers.names) if module.layers is not None else None,
        "seconds": module.seconds,
    }


def _record(module: Any, index: int, request: EditRequest) -> dict[str, Any]:
    name = str(request.case_id)
    base, now = module.base_scores[name], module.scores[name]
    moments = {"base": base} | ({"final": now} if module.edited else {})
    return {
        "index": index,
        "case_id": name,
        "status": "measured",
        "reason": None,
        "request": request.content(),
        "probability": {"before": math.exp(base.rewrite[0])},
        "scores": {moment: asdict(scores) for moment, scores in moments.items()},
        "values": {moment: record_values(scores, base) for moment, scores in moments.items()},
        "texts": {moment: found.texts[name] for moment, found in module.fluency.items() if name in found.texts},
    }


def _manifest(module: Any) -> dict[str, Any]:
    models = {"model": module.language_model, "base": module.unedited_model}
    return {
        "versions": library_versions(),
        "seed": module.hparams["seed"],
        "ledger": module.hparams["ledger"],
        **{role: model.identity() for role, model in models.items() if model is not None},
    }
