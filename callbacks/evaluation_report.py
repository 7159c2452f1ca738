"""Writes what an evaluation has found, and prints it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from typing_extensions import override

from rome_pl.files import whole_file
from rome_pl.ledger import plain
from rome_pl.metrics import summarise
from rome_pl.metrics.scores import record_values
from rome_pl.records import InvalidRecord
from rome_pl.report import invalid_record, score_table, write_json
from rome_pl.second_moment import library_versions

__all__ = ["EvaluationReport"]


class EvaluationReport(Callback):
    """Writes ``manifest.json``, ``results.json`` and ``records.jsonl`` below the Trainer's ``default_root_dir``.

    Scalars ``evaluation/…`` go to every logger. Records that are no valid requests count as skipped.
    """

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
        write_json(folder / "manifest.json", _manifest(module))
        with whole_file(folder / "records.jsonl") as work, work.open("w", encoding="utf-8") as file:
            for request in module.requests:
                file.write(json.dumps(plain(_record(module, str(request.case_id))), ensure_ascii=False) + "\n")
        moment = "final" if module.edited else "base"
        scalars = {
            f"evaluation/{name}": entry["value"]
            for name, entry in content[moment].items()
            if entry["value"] is not None
        }
        if scalars:
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=0)
        console = Console()
        console.print(score_table(content))
        for error in module.refused:
            console.print(f"skipped: {error}", style="red", markup=False)
        console.print(
            f"{content['n_requested']} requested, {content['n_skipped']} skipped, {module.seconds:.0f} s. "
            f"Results in {folder / 'results.json'}",
            soft_wrap=True,
        )


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
        "n_edits": len(module.weight.names) if module.weight is not None else None,
        "seconds": module.seconds,
    }


def _record(module: Any, name: str) -> dict[str, Any]:
    base, now = module.base_scores[name], module.scores[name]
    moments = {"base": base} | ({"final": now} if module.edited else {})
    return {
        "case_id": name,
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
        **{
            role: {
                "source": model.source,
                "fingerprint": model.fingerprint,
                "tokenizer": model.tokenizer_fingerprint,
                "device": str(model.device),
            }
            for role, model in models.items()
            if model is not None
        },
    }
