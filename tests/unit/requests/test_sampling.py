from collections import Counter
from itertools import pairwise

import pytest

from rome_pl.requests.edit_request import EditRequest
from rome_pl.requests.sampling import lasting_sample, sample_requests


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


def test_a_lasting_sample_only_grows_or_gives_way_to_later_edits():
    names = [f"r{index}" for index in range(40)]
    samples = [lasting_sample(names[:count], 5) for count in range(41)]
    assert [len(sample) for sample in samples] == [min(count, 5) for count in range(41)]
    for count, (before, after) in enumerate(pairwise(samples)):
        assert set(after) - set(before) <= {names[count]}
    assert len({tuple(sorted(sample)) for sample in samples[5:]}) > 2  # later ones do get in
    assert lasting_sample(names[::-1], 5) == samples[-1]
