from collections import Counter

import pytest

from rome_pl.requests import EditRequest
from rome_pl.sampling import sample_requests


def requests(numbers):
    return [
        EditRequest(prompt="Rome is", subject="Rome", target_new="old", case_id=f"{relation}{index}", relation=relation)
        for relation, number in numbers.items()
        for index in range(number)
    ]


def test_a_sample_is_seeded_in_order_and_independent_of_places():
    stream = requests({"a": 30, "b": 10})
    sample = sample_requests(stream, 12, seed=1)
    assert len(sample) == 12
    assert [stream.index(request) for request in sample] == sorted(stream.index(request) for request in sample)
    assert sample == sample_requests(stream, 12, seed=1) != sample_requests(stream, 12, seed=2)
    assert set(sample_requests(stream[::-1], 12, seed=1)) == set(sample)


@pytest.mark.parametrize(("number", "shares"), [(8, {"a": 6, "b": 2}), (5, {"a": 4, "b": 1}), (3, {"a": 2, "b": 1})])
def test_relations_keep_their_share(number, shares):
    sample = sample_requests(requests({"a": 30, "b": 10}), number, by_relation=True)
    assert Counter(request.relation for request in sample) == shares


def test_a_sample_larger_than_the_data_is_all_of_it():
    stream = requests({"a": 3, "b": 2})
    assert sample_requests(stream, 50) == sample_requests(stream, 50, by_relation=True) == stream
