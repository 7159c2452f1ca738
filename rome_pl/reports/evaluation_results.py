"""What an evaluation has found, for files: results, one record a request, manifest."""

import math
from dataclasses import asdict
from typing import Any

from rome_pl.metrics.scores import record_values, summarise
from rome_pl.requests.edit_request import EditRequest
from rome_pl.utils.environment import library_versions

__all__ = ["evaluation_manifest", "evaluation_record", "evaluation_results"]


def evaluation_results(module: Any, n_invalid: int) -> dict[str, Any]:
    """The content of ``results.json``.

    Args:
        module: An :class:`rome_pl.EvaluationModule` after its run.
        n_invalid: How many records were no valid requests.
    """
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


def evaluation_record(module: Any, index: int, request: EditRequest) -> dict[str, Any]:
    """A line of ``records.jsonl``: everything measured for one request."""
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


def evaluation_manifest(module: Any) -> dict[str, Any]:
    """The content of ``manifest.json``: library versions, the seed, and which models were measured."""
    models = {"model": module.language_model, "base": module.unedited_model}
    return {
        "versions": library_versions(),
        "seed": module.hparams["seed"],
        "ledger": module.hparams["ledger"],
        **{role: model.identity() for role, model in models.items() if model is not None},
    }
