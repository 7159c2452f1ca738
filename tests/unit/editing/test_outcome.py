"""When an edit has taken, and what is said of one that has not."""

import math

import pytest

from rome_pl.editing.outcome import Requirement, held_already, instead, says_target
from rome_pl.metrics import Answer, ProbeScores
from rome_pl.metrics.probes import TargetMeasure
from rome_pl.reports.score_tables import outcome_counts

WORDS = [" the", " violin", ".", " He", " took", " it", " gave", "\x1b[2J\n"]
SHIPPED = Requirement(0.05, greedy=True)
LOOSE = Requirement(0.05, greedy=False)


def decode(ids):
    return "".join(WORDS[index] for index in ids)


def measured(probability, target=(1,), predicted=(0,)):
    return TargetMeasure(probability, target == predicted, target, predicted)


@pytest.mark.parametrize("requirement", [Requirement(), SHIPPED, LOOSE])
@pytest.mark.parametrize("probability", [math.nan, math.inf])
def test_a_probability_that_is_no_number_is_never_enough(requirement, probability):
    after = measured(probability, (1,), (1,))
    assert "no number" in requirement.objection(0.5, after, changed=True, decode=decode)


def test_without_bounds_whatever_was_written_is_enough():
    for changed in (True, False):
        assert Requirement().objection(0.5, measured(0.0), changed, decode) is None


def test_a_target_that_is_not_said_has_not_taken_however_probable_it_is():
    rise = measured(0.45, (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 6, 5))
    assert SHIPPED.objection(0.04, rise, True, decode) == (
        'after the write the model says " the violin. He gave" (token 5 of 6 should be " took"), not the target '
        "(probability 0.45, before 0.04)"
    )
    assert SHIPPED.objection(0.04, measured(0.45, (0, 1), (0, 1)), True, decode) is None


def test_a_target_below_the_threshold_has_not_taken_even_if_it_is_said():
    below = "after the write the target has probability 0.049"
    assert SHIPPED.objection(0.01, measured(0.049, (1,), (1,)), True, decode) == f"{below}, below 0.05"
    assert SHIPPED.objection(0.01, measured(0.049), True, decode) == f'{below} (the model says " the"), below 0.05'
    assert SHIPPED.objection(0.01, measured(0.05, (1,), (1,)), True, decode) is None


def test_what_need_not_be_said_is_compared_with_before():
    assert LOOSE.objection(0.2, measured(0.3), True, decode) is None
    assert "less than before (0.2)" in LOOSE.objection(0.2, measured(0.19), True, decode)
    assert "found no change" in LOOSE.objection(0.2, measured(0.2), False, decode)
    said = measured(0.8, (1,), (1,))
    assert LOOSE.objection(0.9, said, True, decode) is None  # it held, and holds
    assert LOOSE.objection(0.8, said, False, decode) is None


@pytest.mark.parametrize(
    ("target", "predicted", "expected"),
    [
        ((1,), (0,), '" the"'),
        ((0, 1), (3, 1), '" He" (token 1 of 2 should be " the")'),
        ((0, 1, 2), (0, 1, 3), '" the violin He" (token 3 of 3 should be ".")'),
        ((1,), (7,), '"\\u001b[2J\\n"'),
        ((4,) * 20 + (5,), (4,) * 20 + (6,), '"…' + " took" * 11 + ' gave" (token 21 of 21 should be " it")'),
        ((), (), "something else"),
    ],
)
def test_what_the_model_says_instead_ends_where_it_departs(target, predicted, expected):
    assert instead(measured(0.5, target, predicted), decode) == expected


def test_scores_say_the_target_if_generation_gives_all_of_it():
    def scores(*accuracies, log_prob=-0.1):
        answers = {"rewrite": tuple(Answer(log_prob, accuracy, ()) for accuracy in accuracies)}
        return ProbeScores((-0.1, -3.0), answers=answers)

    assert says_target(scores(1.0))
    assert not says_target(scores(0.9))  # though the new answer is the likelier one
    assert not says_target(scores(1.0, log_prob=math.nan))
    assert not says_target(scores())
    assert not says_target(None)


def test_counts_name_those_that_held_already():
    content = {"n_applied": 9, "n_held_already": 1, "n_rejected": 1, "n_skipped": 0, "n_rolled_back": 0}
    expected = "9 applied (1 of them held already), 1 rejected"
    assert outcome_counts(content) == f"{expected}, 0 skipped, 0 rolled back"
    assert outcome_counts(content, zeros=False) == expected
    assert outcome_counts({**content, "n_held_already": 0}, zeros=False) == "9 applied, 1 rejected"
    assert held_already({"n_applied": 3}) == ""  # results of an earlier version
