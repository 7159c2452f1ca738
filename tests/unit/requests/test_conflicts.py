"""Requests about one subject: which of them are not to be lost, and how a stream of them is cut."""

import pytest

from rome_pl.data_modules.edit_batches import EditBatchSampler
from rome_pl.requests import conflicts as related_requests
from rome_pl.requests.conflicts import earlier_facts, subjects_apart
from rome_pl.requests.edit_request import EditRequest


def about(subject, prompt="{} is", target="x", relation=None, case_id=0):
    return EditRequest(
        prompt=prompt.format(subject), subject=subject, target_new=target, relation=relation, case_id=case_id
    )


def test_what_the_stream_said_of_the_subject_before_is_kept_in_order():
    others = [about("Korrin", "{} lies in"), about("Tarn"), about("Korrin", "{} was built by")]
    assert earlier_facts(about("Korrin"), others) == [others[0], others[2]]
    assert earlier_facts(about("Dunholt"), others) == []
    assert earlier_facts(about("korrin"), others) == []


@pytest.mark.parametrize(
    "anew",
    [
        {"prompt": "{} lies in"},
        {"prompt": "{} lies in "},
        {"prompt": "Where is {}? In", "relation": "place"},
    ],
)
def test_a_fact_that_is_stated_anew_is_not_kept(anew):
    old = about("Korrin", "{} lies in", "Oslo", relation="place")
    other = about("Korrin", "{} was built by", relation="builder")
    new = about("Korrin", **anew)
    assert earlier_facts(new, [old, other]) == [other]
    # Nor is it when a third one comes: what holds is the latest statement.
    assert earlier_facts(about("Korrin", "{} is painted"), [old, other, new]) == [other, new]


def test_without_relations_only_the_same_prompt_states_a_fact_anew():
    old = about("Korrin", "{} lies in")
    assert earlier_facts(about("Korrin", "{} is in"), [old]) == [old]


def test_the_latest_are_kept_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr(related_requests, "MOST_KEPT", 3)
    others = [about("Korrin", f"{{}} has {number}") for number in range(5)]
    assert earlier_facts(about("Korrin"), others) == others[2:]


@pytest.mark.parametrize(
    ("subjects", "size", "runs"),
    [
        ("", 3, []),
        ("abc", 1, [[0], [1], [2]]),
        ("abcd", 3, [[0, 1, 2], [3]]),
        ("aab", 3, [[0], [1, 2]]),
        ("abab", 3, [[0, 1], [2, 3]]),
        ("abca", 3, [[0, 1, 2], [3]]),
        ("aaa", 3, [[0], [1], [2]]),
        ("abacbd", 4, [[0, 1], [2, 3, 4, 5]]),
    ],
)
def test_no_run_has_a_subject_twice(subjects, size, runs):
    requests = [about(subject, case_id=place) for place, subject in enumerate(subjects)]
    assert subjects_apart(requests, size) == runs
    assert list(EditBatchSampler(requests, size, apart=True)) == runs
    assert len(EditBatchSampler(requests, size, apart=True)) == len(runs)
