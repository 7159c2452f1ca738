import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from rome_pl.files.checksums import sealed
from rome_pl.metrics import Answer, ProbeScores, probe_scores
from rome_pl.metrics import score_cache as evaluation
from rome_pl.metrics.score_cache import KnownScores
from rome_pl.metrics.score_forms import scores_from_json
from rome_pl.requests.edit_request import EditRequest, Probe
from tests.tiny import tiny_language_model

REQUESTS = [
    EditRequest(prompt="The lighthouse of Korrin stands in", subject="Korrin", target_new="Oslo", target_true="Lima",
    case_id="a", paraphrases=["Where is Korrin? In"], neighbours=["Tarn lies in"], locality=[Probe("The tide", "is")]),
    EditRequest(prompt="Miss Vane plays the", subject="Miss Vane", target_new="violin", case_id="b"),
]  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    """The requests that were really measured, by their prompts."""
    prompts = []

    def counting(language_model, requests, *more):
        prompts.extend(request.prompt for request in requests)
        return probe_scores(language_model, requests, *more)

    monkeypatch.setattr(evaluation, "probe_scores", counting)
    return prompts


def test_records_are_measured_once_for_all_runs(language_model, measured):
    expected = probe_scores(language_model, REQUESTS)
    known = KnownScores(language_model)
    assert known.measure(REQUESTS) == expected
    assert measured == [request.prompt for request in REQUESTS]
    measured.clear()
    assert known.measure(REQUESTS[::-1]) == expected[::-1]
    assert KnownScores(tiny_language_model()).measure(REQUESTS) == expected  # another process has loaded it
    assert measured == []


def test_what_is_new_is_measured_and_kept_beside_the_rest(language_model, measured):
    KnownScores(language_model).measure(REQUESTS[:1])
    late = KnownScores(language_model)
    KnownScores(language_model).measure(REQUESTS[1:])  # another run, since then
    assert measured == [request.prompt for request in REQUESTS]
    new = replace(REQUESTS[1], prompt="Miss Vane and the", case_id="c")
    late.measure([REQUESTS[0], new])
    assert measured[2:] == [new.prompt]
    measured.clear()
    KnownScores(language_model).measure([*REQUESTS, new])
    assert measured == []
    assert sum(map(bool, late.path.read_text(encoding="utf-8").split("\n"))) == 3


def test_the_content_of_a_record_counts_and_not_its_number(language_model, measured):
    known = KnownScores(language_model)
    known.measure(REQUESTS)
    measured.clear()
    renamed = [
        replace(request, case_id=100 + i, source="other.json", relation="P1") for i, request in enumerate(REQUESTS)
    ]
    assert known.measure(renamed) == known.measure(REQUESTS)
    assert measured == []
    first = REQUESTS[0]
    changes = [
        {"target_new": "Rome"}, {"target_true": None}, {"paraphrases": ()}, {"neighbours": ["Tarn is in"]},
        {"locality": ()}, {"portability": [Probe("a", "b")]}, {"target_space": False},
    ]  # fmt: skip
    for change in changes:
        measured.clear()
        other = replace(first, **change)
        assert known.measure([other]) == probe_scores(language_model, [other])
        assert measured == [first.prompt], change


def test_twice_in_one_call_is_measured_in_one_go(language_model):
    first, second = KnownScores(language_model).measure([REQUESTS[0], replace(REQUESTS[0], case_id="z")])
    assert first == second == probe_scores(language_model, REQUESTS[:1])[0]


def test_every_model_and_precision_has_a_file_of_its_own(measured):
    models = [
        tiny_language_model(), tiny_language_model(seed=1), tiny_language_model("gpt2"),
        tiny_language_model(dtype=torch.float32), tiny_language_model(dtype=torch.bfloat16),
    ]  # fmt: skip
    stores = [KnownScores(model) for model in models]
    assert len({store.path for store in stores}) == len(stores)
    for store, model in zip(stores, models, strict=True):
        assert store.measure(REQUESTS) == probe_scores(model, REQUESTS)
    assert len(measured) == len(models) * len(REQUESTS)


@pytest.mark.parametrize("how", ["in place", "through data"])
def test_a_model_edited_in_memory_gets_its_own_scores_and_keeps_none(how, language_model, measured):
    before = KnownScores(language_model).measure(REQUESTS)
    weight = language_model.model.lm_head.weight
    original = weight.detach().clone()

    def write(values):
        with torch.no_grad():
            (weight if how == "in place" else weight.data).copy_(values)

    write(-original)
    after = probe_scores(language_model, REQUESTS)
    assert after != before
    measured.clear()
    for _ in range(2):
        assert KnownScores(language_model).measure(REQUESTS) == after
    assert len(measured) == 2 * len(REQUESTS)
    write(original)
    measured.clear()
    assert KnownScores(language_model).measure(REQUESTS) == before
    assert measured == []


def test_replaced_and_wrapped_weights_are_looked_at(language_model):
    assert language_model.as_first_seen
    model = language_model.model
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert language_model.as_first_seen
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1.0)
    assert not language_model.as_first_seen
    other = tiny_language_model()
    assert other.as_first_seen
    other.model.lm_head = torch.nn.Sequential(other.model.lm_head)
    assert not other.as_first_seen


@pytest.mark.parametrize(
    "damage", [b"", b'{"half": ', b"[]", b"null", b"5", b"\xff\xfe\x00", b'{"x": 1}'], ids=lambda damage: repr(damage)
)
def test_a_damaged_file_is_measured_again(damage, language_model, measured):
    known = KnownScores(language_model)
    expected = known.measure(REQUESTS)
    known.path.write_bytes(damage)
    measured.clear()
    again = KnownScores(language_model)
    assert again.measure(REQUESTS) == expected
    assert len(measured) == len(REQUESTS)
    measured.clear()
    assert KnownScores(language_model).measure(REQUESTS) == expected
    assert measured == []


@pytest.mark.parametrize("entry", [{}, None, [], {"rewrite": [1, 2]}, "text"], ids=lambda entry: repr(entry))
def test_a_damaged_entry_is_measured_again(entry, language_model, measured):
    known = KnownScores(language_model)
    expected = known.measure(REQUESTS)
    blank, first, second = known.path.read_text(encoding="utf-8").split("\n")
    line = sealed({"key": json.loads(first)["key"], "value": entry})
    known.path.write_text("\n".join([blank, json.dumps(line), second]), encoding="utf-8")
    measured.clear()
    assert KnownScores(language_model).measure(REQUESTS) == expected
    assert measured == [REQUESTS[0].prompt]


def exact(scores):
    """The bits of every number, for which NaN is equal to itself."""
    return repr(asdict(scores))


def test_scores_survive_json_exactly(language_model):
    third = 1 / 3
    made = ProbeScores(
        rewrite=(-0.1, math.nan),
        paraphrases=((-third, -math.inf), (math.nan, -1e-300)),
        neighbours=((-2.0, -5e-324),),
        answers={"rewrite": (Answer(math.nan, third, (1, 2, 3)),), "locality": (Answer(-third, 1.0, (7,)),) * 2},
        touched=(True,),
    )
    bare = ProbeScores((-1.5, None))
    for scores in (made, bare, *probe_scores(language_model, REQUESTS)):
        back = scores_from_json(json.loads(json.dumps(asdict(scores))))
        assert exact(back) == exact(scores)
        if scores is not made:
            assert back == scores
            assert hash(back.rewrite) == hash(scores.rewrite)
    assert math.isnan(scores_from_json(json.loads(json.dumps(asdict(made)))).rewrite[1])


def test_a_broken_model_is_kept_as_broken(language_model, measured):
    with torch.no_grad():
        language_model.model.lm_head.weight[0, 0] = math.nan
    first = KnownScores(language_model).measure(REQUESTS)
    assert all(math.isnan(scores.rewrite[0]) for scores in first)
    measured.clear()
    again = KnownScores(language_model).measure(REQUESTS)
    assert [exact(scores) for scores in again] == [exact(scores) for scores in first]
    assert measured == []
