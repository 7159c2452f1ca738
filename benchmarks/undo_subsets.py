"""Takes random subsets of a run's edits out again, and looks at what is left.

    python benchmarks/long_stream.py --preset r_rome --batch-size 60 --limit 60 --records facts.json --json joint.json
    python benchmarks/undo_subsets.py --run joint.run --records facts.json --limit 60

For each subset: how far the edits that remain are from ``W k + b = v``, right after their own write and at the end;
whether they still prefer the new answer; and whether the facts that were taken out get the unedited model's answer.
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import load, median, parser, write

from rome_pl.ledger.replay import read_manifest
from rome_pl.ledger.undo import with_edits
from rome_pl.metrics import ProbeScores
from rome_pl.metrics.probes import measure_answers, probe_scores
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest
from rome_pl.write.edited_layers import EditedLayers


def main() -> None:
    """Undo, measure and print."""
    arguments = parser(__doc__ or "", 60)
    arguments.add_argument("--run", type=Path, required=True, help="folder of a sequential run")
    arguments.add_argument("--subsets", type=int, default=100)
    arguments.add_argument("--seed", type=int, default=0)
    options = _with_the_runs_model(arguments)
    language_model, requests = load(options)
    before = {name: tensor.clone() for name, tensor in language_model.model.state_dict().items()}
    answers = _answers(language_model, requests)
    layers = with_edits(language_model, options.run)
    inside = set(layers.names)
    requests = [
        replace(request, paraphrases=(), neighbours=()) for request in requests if str(request.case_id) in inside
    ]
    whole = dict(zip(inside_order(requests), probe_scores(language_model, requests), strict=True))
    chance = random.Random(options.seed)
    rows = []
    for _ in range(options.subsets):
        names = chance.sample(layers.names, chance.randint(1, len(inside) - 1))
        rows.append(_without(language_model, layers, names, requests, whole, answers))
        layers.remove(layers.names)
        layers = with_edits(language_model, options.run)
    layers.remove(layers.names)
    after = language_model.model.state_dict()
    write(
        options.json,
        {
            "edits": len(inside),
            "subsets": options.subsets,
            "largest_error_after_own_write": max(row["error_after_own_write"] for row in rows),
            "largest_error_at_the_end": max(row["error_at_the_end"] for row in rows),
            "largest_change_of_ES": max(abs(row["ES"] - row["ES_before"]) for row in rows),
            "mean_change_of_ES": sum(abs(row["ES"] - row["ES_before"]) for row in rows) / len(rows),
            "ES_within_0.02": sum(abs(row["ES"] - row["ES_before"]) <= 0.02 for row in rows),
            "least_share_of_answers_back": min(row["answers_back"] for row in rows),
            "median_share_of_answers_back": median([row["answers_back"] for row in rows]),
            "all_undone_is_bit_equal": all(torch.equal(after[name], tensor) for name, tensor in before.items()),
        },
    )


def inside_order(requests: list[EditRequest]) -> list[str]:
    """Names of requests."""
    return [str(request.case_id) for request in requests]


def _with_the_runs_model(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    options = arguments.parse_args()
    options.model = read_manifest(options.run)["model"]["source"]
    return options


def _answers(language_model: LanguageModel, requests: list[EditRequest]) -> dict[str, tuple[int, ...]]:
    """What greedy generation gives after each prompt, over as many tokens as the true answer has."""
    rows = [language_model.encoder.continuation(one.prompt, one.target_true or "", one) for one in requests]
    found = measure_answers(language_model, rows)
    return {str(one.case_id): answer.predicted for one, answer in zip(requests, found, strict=True)}


def _without(
    language_model: LanguageModel,
    layers: EditedLayers,
    names: list[str],
    requests: list[EditRequest],
    whole: dict[str, ProbeScores],
    answers: dict[str, tuple[int, ...]],
) -> dict[str, Any]:
    layers.remove(names)
    kept = [request for request in requests if str(request.case_id) not in names]
    gone = [request for request in requests if str(request.case_id) in names]
    scores = probe_scores(language_model, kept)
    now = _answers(language_model, gone)
    own, end = _errors(layers)
    return {
        "error_after_own_write": own,
        "error_at_the_end": end,
        "ES": _efficacy(scores),
        "ES_before": _efficacy([whole[str(request.case_id)] for request in kept]),
        "answers_back": sum(now[name] == answers[name] for name in now) / len(now),
    }


def _efficacy(scores: list[ProbeScores]) -> float:
    return sum(one.rewrite[0] > (one.rewrite[1] or 0) for one in scores) / len(scores)


def _errors(layers: EditedLayers) -> tuple[float, float]:
    """Largest ``‖W k + b - v‖ / ‖v‖`` over edits and layers, right after each write and at the end."""
    own = end = 0.0
    for weight in layers.weights:
        matrix = weight.site.matrix(weight.original).double()
        for written in weight.written:
            matrix = matrix + written.update.left.T @ written.update.right
            own = max(own, _error(matrix, weight.site.bias, written))
        for written in weight.written:
            end = max(end, _error(matrix, weight.site.bias, written))
    return own, end


def _error(matrix: torch.Tensor, bias: torch.Tensor | None, written: Any) -> float:
    at, value = written.assertion.at, written.assertion.value
    given = at @ matrix.T + (0 if bias is None else bias.detach().double())
    return float(((given - value).norm(dim=1) / value.norm(dim=1)).max())


if __name__ == "__main__":
    main()
