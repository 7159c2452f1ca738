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
        "perplexity": {stage: text[stage].perplexity if stage in text else None for stage in ("base", "final")},
        "divergence": text["final"].divergence if "final" in text else None,
        "fluency": {stage: found.fluency for stage, found in fluency.items()},
        "consistency": {stage: found.consistency for stage, found in fluency.items()},
        "n_requested": len(module.requests) + len(module.refused) + n_invalid,
        "n_skipped": len(module.refused) + n_invalid,
        "n_edits": len(module.layers.names) if module.layers is not None else None,
        "seconds": module.seconds,
    }


def evaluation_record(module: Any, index: int, request: EditRequest) -> dict[str, Any]:
    """A line of ``records.jsonl``: everything measured for one request."""
    name = str(request.case_id)
    base, now = module.base_scores[name], module.scores[name]
    stages = {"base": base} | ({"final": now} if module.edited else {})
    return {
        "index": index,
        "case_id": name,
        "status": "measured",
        "reason": None,
        "request": request.content(),
        "probability": {"before": math.exp(base.rewrite[0])},
        "scores": {stage: asdict(scores) for stage, scores in stages.items()},
        "values": {stage: record_values(scores, base) for stage, scores in stages.items()},
        "texts": {stage: found.texts[name] for stage, found in module.fluency.items() if name in found.texts},
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
