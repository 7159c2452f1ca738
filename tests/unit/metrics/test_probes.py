import math

import pytest
import torch

from rome_pl.metrics import EditScores, ProbeScores, RunningScores, perplexity, probe_scores, summarise
from rome_pl.metrics.intervals import wilson_interval
from rome_pl.metrics.probes import Changes, measure_target, measure_targets, next_tokens
from rome_pl.model.architecture import find_site
from rome_pl.requests.edit_request import EditRequest
from rome_pl.write.closed_form import Update
from tests.tiny import FAMILIES, KeepFloat64, tiny_language_model

REQUEST = EditRequest(
    prompt="The lighthouse of Korrin stands in", subject="Korrin", target_new="New Oslo", target_true="Lima",
    paraphrases=["Where is Korrin? In", "Korrin lies in"], neighbours=["The mill of Dunholt stands in",
    "Tarn is in", "It is in"],
)  # fmt: skip


# One token each: both answers are read off one row. The third's first target begins as its second does.
OTHERS = [
    EditRequest(prompt="The tide comes", subject="tide", target_new="the", target_true="a", paraphrases=["It is"],
    neighbours=["The moon is"]),
    EditRequest(prompt="Miss Vane plays", subject="Miss Vane", target_new="the lamp", target_true="the"),
    EditRequest(prompt="Tarn lies", subject="Tarn", target_new="in"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def float64_everywhere():
    with KeepFloat64():
        yield


def plain_log_prob(language_model, prompt, target):
    """Mean log-probability, one prompt, plain forward."""
    prompt_ids = language_model.tokenizer(prompt)["input_ids"]
    ids = language_model.tokenizer(f"{prompt} {target}")["input_ids"]
    with torch.no_grad():
        log_probs = language_model.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    picked = [float(log_probs[i - 1, ids[i]]) for i in range(len(prompt_ids), len(ids))]
    return sum(picked) / len(picked)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt"])
def test_probes_equal_plain_forwards_one_by_one(family):
    language_model = tiny_language_model(family)
    requests = [REQUEST, *OTHERS]
    for request, scores in zip(requests, probe_scores(language_model, requests), strict=True):
        targets = [request.target_new, request.target_true]
        for prompts, pairs in (
            ([request.prompt], [scores.rewrite]),
            (request.paraphrases, scores.paraphrases),
            (request.neighbours, scores.neighbours),
        ):
            for prompt, pair in zip(prompts, pairs, strict=True):
                expected = [plain_log_prob(language_model, prompt, target) for target in targets if target]
                assert [value for value in pair if value is not None] == pytest.approx(expected, rel=1e-9)


def numbers(scores):
    pairs = (scores.rewrite, *scores.paraphrases, *scores.neighbours)
    return [value for pair in pairs for value in pair if value is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_that_nobody_writes_is_measured_as_if_it_were_written(family):
    """Each request sees its own change of the weight, or none, and no other's."""
    language_model = tiny_language_model(family)
    sites, requests = [find_site(language_model.model, layer) for layer in (0, 1)], [REQUEST, *OTHERS]
    generator = torch.Generator().manual_seed(3)
    updates = [
        [
            Update(*(torch.randn(1, d, dtype=torch.float64, generator=generator) for d in (site.d_value, site.d_key)))
            for site in sites
        ]
        for _ in requests
    ]
    updates[2] = None
    unwritten = probe_scores(language_model, requests, Changes(sites, updates))
    rows = [language_model.encoder.edit(request).rows[0] for request in requests]
    targets = measure_targets(language_model, rows, Changes(sites, updates))
    originals = [site.weight.detach().clone() for site in sites]
    for request, row, update, scores, target in zip(requests, rows, updates, unwritten, targets, strict=True):
        with torch.no_grad():
            for site, one in zip(sites, update or (), strict=False):
                site.matrix(site.weight).add_(one.left.T @ one.right)
            (written,) = probe_scores(language_model, [request])
            measure = measure_target(language_model, row)
            for site, original in zip(sites, originals, strict=True):
                site.weight.copy_(original)
        (base,) = probe_scores(language_model, [request])
        assert (abs(base.rewrite[0] - scores.rewrite[0]) > 1e-5) == (update is not None)
        assert numbers(scores) == pytest.approx(numbers(written), rel=1e-9)
        assert target.probability == pytest.approx(measure.probability, rel=1e-9)
        assert target.greedy == measure.greedy


def named(records):
    return {str(place): record for place, record in enumerate(records)}


def counterfact(records):
    """CounterFact's part of all scores."""
    table = summarise(named(records))
    return {name: table[name] for name in ("ES", "EM", "PS", "PM", "NS", "NM", "S")}


def test_scores_of_records_worked_out_by_hand():
    half, quarter = math.log(0.5), math.log(0.25)
    first = ProbeScores((half, quarter), ((half, quarter), (quarter, half)), ((quarter, half),))
    second = ProbeScores((quarter, half), ((half, quarter), (half, quarter)), ((half, quarter),))
    table = counterfact([first, second])
    values = {name: entry["value"] for name, entry in table.items()}
    assert values == pytest.approx(
        {"ES": 0.5, "EM": 0.0, "PS": 0.75, "PM": 0.125, "NS": 0.5, "NM": 0.0, "S": 3 / (1 / 0.5 + 1 / 0.75 + 1 / 0.5)}
    )
    assert all(entry["n"] == 2 for entry in table.values())
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in table.values())


def test_a_tie_counts_for_neither_answer():
    tie = ProbeScores((-1.0, -1.0), ((-1.0, -1.0),), ((-1.0, -1.0),))
    table = counterfact([tie])
    assert [table[name]["value"] for name in ("ES", "PS", "NS", "S")] == [0.0, 0.0, 0.0, 0.0]


def test_records_without_probes_are_scored_on_what_they_have():
    table = counterfact(
        [ProbeScores((-1.0, -2.0)), ProbeScores((-1.0, None)), ProbeScores((-1.0, -2.0), ((-1.0, -2.0),))]
    )
    assert {name: entry["n"] for name, entry in table.items()} == {
        "ES": 2, "EM": 2, "PS": 1, "PM": 1, "NS": 0, "NM": 0, "S": 0,
    }  # fmt: skip
    assert table["NS"]["value"] is None
    assert summarise({})["ES"] == {"value": None, "low": None, "high": None, "n": 0}


def test_metric_objects_merge_like_one_stream():
    records = [ProbeScores((-float(i), -2.0), ((-1.0, -float(i)),), ((-1.0, -2.0),)) for i in range(1, 5)]
    whole, part = EditScores(), EditScores()
    for record in records:
        whole.update(record)
        part.update(record)
    assert part.compute() == whole.compute() == summarise(named(records))
    running = RunningScores()
    for record in [*records, ProbeScores((-1.0, None))]:
        running.update(record)
    expected = {name: entry["value"] for name, entry in counterfact(records).items() if name != "S"}
    assert running.compute() == pytest.approx(expected)
    part.reset()
    assert part.compute()["ES"]["n"] == 0


def test_wilson_interval_of_a_known_case():
    # Wilson 1927 for 9 of 10: (0.596, 0.982)
    low, high = wilson_interval(torch.tensor([1.0] * 9 + [0.0]))
    assert (round(low, 3), round(high, 3)) == (0.596, 0.982)


def test_perplexity_equals_a_plain_computation(language_model):
    text = "The tide comes in twice a day, and twice a day it goes out again, whoever is watching."
    ids = language_model.tokenizer(text)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(ids), 16):
        piece = ids[start : start + 16]
        with torch.no_grad():
            log_probs = language_model.model(torch.tensor([piece])).logits[0].log_softmax(-1)
        total -= sum(float(log_probs[i - 1, piece[i]]) for i in range(1, len(piece)))
        count += len(piece) - 1
    assert perplexity(language_model, text, window=16) == pytest.approx(math.exp(total / count), rel=1e-9)
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(language_model, "")


def test_next_tokens_equal_plain_forwards(language_model):
    prompts = ["One, two, three,", "The", "Once upon a time there was a"]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([language_model.tokenizer(prompt)["input_ids"]])
        expected.append(int(language_model.model(ids).logits[0, -1].argmax()))
    assert next_tokens(language_model, prompts) == expected


def test_a_greedy_target_is_recognised(language_model):
    prompt = "The lighthouse stands in"
    token = next_tokens(language_model, [prompt])[0]
    row = language_model.encoder.continuation(prompt, "the", REQUEST)
    greedy = type(row)(row.ids, row.lookup, (token,), row.first)
    other = type(row)(row.ids, row.lookup, ((token + 1) % 400,), row.first)
    assert measure_target(language_model, greedy).greedy
    assert not measure_target(language_model, other).greedy
