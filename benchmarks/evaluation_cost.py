"""What measuring a record costs: batched with shared prefixes, against one prompt and target at a time.

    python benchmarks/evaluation_cost.py --records counterfact.json --limit 16 --json evaluation_cost.json

The plain side is what public evaluations do at a batch size of one: for each of 13 prompts and each of two targets the
whole text, logits at every position. Both run in this process; operations are counted besides.
"""

import time
from typing import Any

import torch
from common import load, parser, write

from rome_pl.metrics import ProbeScores, probe_scores
from rome_pl.metrics.probes import wanted_answers
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest
from rome_pl.utils.flops import count_flops


def main() -> None:
    """Measure, print and write."""
    options = parser(__doc__ or "", limit=16).parse_args()
    language_model, requests = load(options)
    probe_scores(language_model, requests[:1])
    plain(language_model, requests[0])

    started = time.perf_counter()
    slow = [plain(language_model, request) for request in requests]
    seconds_plain = time.perf_counter() - started
    started = time.perf_counter()
    fast = probe_scores(language_model, requests)
    seconds = time.perf_counter() - started
    with count_flops() as counted_plain:
        for request in requests:
            plain(language_model, request)
    with count_flops() as counted:
        probe_scores(language_model, requests)
    write(
        options.json,
        {
            "records": len(requests),
            "prompts": sum(len(list(wanted_answers(request))) for request in requests),
            "seconds_per_record_plain": seconds_plain / len(requests),
            "seconds_per_record": seconds / len(requests),
            "wall_ratio": seconds_plain / seconds,
            "flops_ratio": counted_plain.total / counted.total,
            "largest_difference": max(
                abs(a - b)
                for one, other in zip(slow, fast, strict=True)
                for a, b in zip(one, _numbers(other), strict=True)
            ),
        },
    )


@torch.no_grad()
def plain(language_model: LanguageModel, request: EditRequest) -> list[float]:
    """Mean log-probability of every target after its prompt, one forward each."""
    model: Any = language_model.model
    found = []
    for field, prompt, answer, _ in wanted_answers(request):
        row = language_model.encoder.continuation(prompt, answer, request, field)
        log_probs = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].float().log_softmax(-1)
        labels = torch.tensor(row.target)
        places = torch.arange(row.first, row.first + len(labels))
        found.append(float(log_probs[places, labels].double().mean()))
    return sorted(found)


def _numbers(scores: ProbeScores) -> list[float]:
    pairs = [scores.rewrite, *scores.paraphrases, *scores.neighbours]
    own = [answer.log_prob for kind in ("locality", "portability") for answer in scores.answers.get(kind, ())]
    return sorted([value for pair in pairs for value in pair if value is not None] + own)


if __name__ == "__main__":
    main()
