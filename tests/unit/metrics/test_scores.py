import math
from dataclasses import replace

import pytest
import torch

from rome_pl.encoding.encoded_rows import EncodedRow
from rome_pl.metrics import (
    SCORES,
    Answer,
    EditScores,
    ProbeScores,
    RunningScores,
    probe_scores,
    summarise,
)
from rome_pl.metrics.intervals import bootstrap_interval, entry, harmonic_mean
from rome_pl.metrics.probes import measure_answers
from rome_pl.metrics.scores import record_values
from rome_pl.requests.conflicts import touched_neighbours
from rome_pl.requests.edit_request import EditRequest
from tests.tiny import KeepFloat64, tiny_language_model

HALF, QUARTER, EIGHTH = math.log(0.5), math.log(0.25), math.log(0.125)
NAN = math.nan


def answer(accuracy, *predicted, log_prob=-1.0):
    return Answer(log_prob, accuracy, predicted or (1,))


RECORD = ProbeScores(
    rewrite=(HALF, QUARTER),
    paraphrases=((HALF, QUARTER), (EIGHTH, QUARTER)),
    neighbours=((QUARTER, HALF), (HALF, EIGHTH), (EIGHTH, QUARTER)),
    touched=(False, False, True),
    answers={
        "rewrite": (answer(1.0),),
        "paraphrase": (answer(0.5), answer(1.0)),
        "neighbour": (answer(1.0), answer(0.5), answer(0.0)),
        "locality": (answer(0.5, 7, 8), answer(0.0, 9)),
        "portability": (answer(0.25), answer(0.75)),
    },
)
BASE = replace(RECORD, answers={"locality": (answer(0.5, 7, 3), answer(1.0, 9))})
BY_HAND = {
    "ES": 1.0, "EM": 0.25,
    "PS": 0.5, "PM": (0.25 - 0.125) / 2,
    "NS": 0.5, "NM": (0.25 - 0.375) / 2, "NS_touched": 1.0,
    "rewrite_acc": 1.0, "rewrite_match": 1.0,
    "rephrase_acc": 0.75, "rephrase_match": 0.5,
    "neighbour_acc": 0.75, "neighbour_match": 0.5,
    "locality_acc": 0.25, "locality_match": 0.0, "locality": 0.75,
    "portability_acc": 0.5, "portability_match": 0.0,
}  # fmt: skip


def test_every_score_of_a_record_worked_out_by_hand():
    assert record_values(RECORD, BASE) == pytest.approx(BY_HAND)
    assert set(BY_HAND) == set(SCORES)


def test_what_only_one_kind_of_prompt_gives():
    kinds = {
        "rewrite": {"rewrite_acc", "rewrite_match"},
        "paraphrase": {"rephrase_acc", "rephrase_match"},
        "neighbour": {"neighbour_acc", "neighbour_match"},
        "locality": {"locality_acc", "locality_match", "locality"},
        "portability": {"portability_acc", "portability_match"},
    }
    nothing = ProbeScores((HALF, None))
    assert record_values(nothing, nothing) == {}
    for kind, names in kinds.items():
        only = replace(nothing, answers={kind: RECORD.answers[kind]})
        assert set(record_values(only, only)) == names
    assert set(record_values(replace(nothing, rewrite=(HALF, QUARTER)))) == {"ES", "EM"}
    assert set(record_values(replace(nothing, paraphrases=((HALF, HALF),)))) == {"PS", "PM"}
    assert set(record_values(replace(nothing, neighbours=((HALF, HALF),)))) == {"NS", "NM"}


def test_scores_without_probes_are_not_counted():
    bare = ProbeScores((HALF, None), answers={"rewrite": (answer(0.0),)})
    table = summarise({"a": RECORD, "b": bare}, {"a": BASE, "b": bare})
    assert (table["rewrite_acc"]["n"], table["rewrite_acc"]["value"]) == (2, 0.5)
    for name, value in BY_HAND.items():
        if not name.startswith("rewrite"):
            assert (table[name]["n"], table[name]["value"]) == (1, pytest.approx(value)), name
    assert table["S"] == pytest.approx({"value": 3 / (1 + 2 + 2), "low": 0.6, "high": 0.6, "n": 1})
    assert summarise({"b": bare})["PS"] == {"value": None, "low": None, "high": None, "n": 0}


def test_locality_needs_the_unedited_model():
    assert "locality" not in record_values(RECORD)
    assert record_values(RECORD, RECORD)["locality"] == 1.0
    assert "locality_acc" in record_values(RECORD)


def test_touched_neighbours_are_counted_apart():
    neighbours = ((QUARTER, HALF), (HALF, QUARTER))
    of = {touched: record_values(ProbeScores((HALF, None), neighbours=neighbours, touched=touched)) for touched in
          ((), (False, False), (True, False), (False, True), (True, True))}  # fmt: skip
    assert of[()] == of[False, False] == {"NS": 0.5, "NM": 0.0}
    assert of[True, False] == {"NS": 0.0, "NM": -0.25, "NS_touched": 1.0}
    assert of[False, True] == {"NS": 1.0, "NM": 0.25, "NS_touched": 0.0}
    assert of[True, True] == {"NS_touched": 0.5}


def test_a_request_without_a_true_target_has_no_touched_neighbours():
    def request(name, true):
        return EditRequest(
            prompt=f"{name} stands in", subject=name, target_new="Oslo", target_true=true, case_id=name,
            neighbours=["The mill of Dunholt stands in", "Ostrava lies in"],
        )  # fmt: skip

    requests = [request("Korrin", None), request("Dunholt", "Lima"), request("Tamsel", "Lima")]
    subjects = {one.subject for one in requests}
    assert touched_neighbours(requests, subjects) == {"Tamsel": (True, False)}
    for one, scores in zip(requests, probe_scores(tiny_language_model("llama"), requests), strict=True):
        marked = replace(scores, touched=touched_neighbours(requests, subjects).get(one.subject, ()))
        assert ("NS_touched" in record_values(marked)) == (one.subject == "Tamsel")


@pytest.mark.parametrize(
    ("broken", "names"),
    [
        ({"rewrite": (NAN, QUARTER)}, {"ES", "EM", "S"}),
        ({"rewrite": (HALF, NAN)}, {"ES", "EM", "S"}),
        ({"paraphrases": ((HALF, QUARTER), (HALF, NAN))}, {"PS", "PM", "S"}),
        ({"neighbours": ((NAN, HALF), *RECORD.neighbours[1:])}, {"NS", "NM", "S"}),
        ({"neighbours": (*RECORD.neighbours[:2], (HALF, NAN))}, {"NS_touched"}),
        ({"answers": RECORD.answers | {"rewrite": (answer(0.0, log_prob=NAN),)}}, {"rewrite_acc", "rewrite_match"}),
        (
            {"answers": RECORD.answers | {"locality": (answer(0.0, 7, 8, log_prob=NAN), answer(0.0, 9))}},
            {"locality", "locality_acc", "locality_match"},
        ),
    ],
)
def test_nan_is_counted_and_never_averaged_in(broken, names):
    records, base = {"good": RECORD, "bad": replace(RECORD, **broken)}, {"good": BASE, "bad": BASE}
    table = summarise(records, base)
    clean = summarise({"good": RECORD}, {"good": BASE})
    for name, found in table.items():
        if name in names:
            assert found == clean[name] | {"n_nan": 1}, name
        else:
            assert (found["value"], found["n"], "n_nan" in found) == (clean[name]["value"], 2, False), name
    running = RunningScores()
    for name in records:
        running.update(records[name], base[name])
    assert running.compute() == pytest.approx(BY_HAND)


def test_nan_of_the_unedited_model_breaks_locality_alone():
    unknown = replace(BASE, answers={"locality": (answer(0.0, 7, 3, log_prob=NAN), answer(1.0, 9))})
    values = record_values(RECORD, unknown)
    assert [name for name, value in values.items() if math.isnan(value)] == ["locality"]


def test_a_model_that_gives_only_nan_has_no_score():
    assert summarise({"a": ProbeScores((NAN, NAN))})["ES"] == {
        "value": None, "low": None, "high": None, "n": 0, "n_nan": 1,
    }  # fmt: skip


def test_impossible_answers_are_numbers_and_not_nan():
    values = record_values(ProbeScores((HALF, -math.inf), answers={"rewrite": (answer(0.0, log_prob=-math.inf),)}))
    assert values == {"ES": 1.0, "EM": 0.5, "rewrite_acc": 0.0, "rewrite_match": 0.0}


def records_of(count):
    return [
        replace(RECORD, rewrite=(-float(i % 5), -2.0), answers=RECORD.answers | {"rewrite": (answer(i % 3 / 2),)})
        for i in range(count)
    ]


def test_intervals_hold_their_means_and_are_the_same_every_time():
    records = {str(place): record for place, record in enumerate(records_of(40))}
    table, again = summarise(records), summarise(records)
    assert table == again
    for name in ("ES", "EM", "rewrite_acc", "rewrite_match"):
        found = table[name]
        assert found["low"] < found["value"] < found["high"], name
    quarter = summarise(dict(list(records.items())[:10]))
    assert quarter["EM"]["high"] - quarter["EM"]["low"] > table["EM"]["high"] - table["EM"]["low"]


def test_a_bootstrap_interval_is_that_of_a_known_distribution():
    values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    low, high = bootstrap_interval(values)
    half = 1.96 * float(values.std(correction=0)) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.15 * half)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.15 * half)
    state = torch.get_rng_state()
    bootstrap_interval(values)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_harmonic_mean_is_zero_where_a_rate_is():
    rates = torch.tensor([[0.5, 0.25, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    assert harmonic_mean(rates).tolist() == pytest.approx([3 / 7, 0.0])
    with_nan = torch.tensor([[1.0, 1.0], [NAN, 1.0]], dtype=torch.float64)
    found = entry(with_nan, lambda kept: (0.0, 1.0), lambda kept: kept.mean())
    assert found == {"value": 1.0, "low": 0.0, "high": 1.0, "n": 1, "n_nan": 1}


class _TwoRanks(EditScores):
    """Metric states as two processes would bring them together."""

    def __init__(self, other):
        gathered = torch.cat(other.records) if other.records else torch.empty(0, len(SCORES), dtype=torch.float64)
        super().__init__(
            dist_sync_fn=lambda tensor, group=None: [tensor, gathered], distributed_available_fn=lambda: True
        )


@pytest.mark.parametrize("split", [1, 3, 7])
def test_records_of_two_devices_count_as_one_stream(split):
    records = records_of(7)
    other = EditScores()
    for record in records[split:]:
        other.update(record, BASE)
    metric = _TwoRanks(other)
    for record in records[:split]:
        metric.update(record, BASE)
    whole = summarise({str(i): record for i, record in enumerate(records)}, {str(i): BASE for i in range(7)})
    assert metric.compute() == whole
    # Its own records are as they were: a later update goes on from them.
    assert len(metric.records) == split


@pytest.fixture(params=["llama", "gpt2"])
def model_in_float64(request):
    with KeepFloat64():
        yield tiny_language_model(request.param)


def greedy(language_model, ids, count):
    out = language_model.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=count,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return tuple(out[0, len(ids) :].tolist())


def test_generated_is_exactly_what_greedy_generation_gives(model_in_float64):
    language_model = model_in_float64
    rows, expected = [], []
    for prompt in ("The lighthouse of Korrin stands in", "Miss Vane plays the", "It", "Once upon a time there was"):
        ids = tuple(language_model.tokenizer(prompt)["input_ids"])
        tokens = greedy(language_model, ids, 4)
        assert len(tokens) == 4
        for length in (1, 2, 4):
            for wrong in (None, *range(length)):
                # All but one token are what generation gives in its turn, whether before or after the wrong one.
                target = list(tokens[:length])
                if wrong is not None:
                    target[wrong] = (target[wrong] + 1) % 400
                rows.append(EncodedRow(ids + tuple(target[:-1]), len(ids) - 1, tuple(target), len(ids) - 1))
                expected.append(greedy(language_model, ids, length) == tuple(target))
    found = measure_answers(language_model, rows)
    assert [one.generated for one in found] == expected
    assert {True, False} == set(expected)
    for row, one in zip(rows, found, strict=True):
        assert one.predicted[0] == greedy(language_model, row.ids[: row.first + 1], 1)[0]


def test_generated_of_a_request_is_exactly_what_greedy_generation_gives(model_in_float64):
    language_model = model_in_float64
    prompts = [f"The {noun} of Korrin" for noun in ("mill", "tide", "lamp", "harbour", "house", "door", "sea", "boat")]
    prompts += [f"Korrin {word}" for word in ("stands", "and the", "is", "was", "had a", "went to", "in", "of")]
    requests = []
    for prompt in prompts:
        text = language_model.tokenizer.decode(greedy(language_model, language_model.tokenizer(prompt).input_ids, 2))
        targets = [text.strip()] if text.strip() else []
        requests += [
            EditRequest(prompt=prompt, subject="Korrin", target_new=target) for target in (*targets, "Oslo", "rye")
        ]
    seen = set()
    for request, scores in zip(requests, probe_scores(language_model, requests), strict=True):
        row = language_model.encoder.continuation(request.prompt, request.target_new, request)
        expected = greedy(language_model, row.ids[: row.first + 1], len(row.target)) == row.target
        (found,) = scores.answers["rewrite"]
        assert found.generated == expected
        seen.add(expected)
    assert seen == {True, False}
