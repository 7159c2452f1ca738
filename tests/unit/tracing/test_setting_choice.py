import math

import pytest

from rome_pl.metrics.probes import ProbeScores
from rome_pl.tracing.setting_choice import SettingScores, choose, score_setting, setting_table, worth


def setting(name, worths, divergence=None):
    return SettingScores(
        "layer", name, worths={str(place): value for place, value in enumerate(worths)}, divergence=divergence
    )


def scores(rewrite, paraphrases=(), neighbours=()):
    return ProbeScores(rewrite=rewrite, paraphrases=tuple(paraphrases), neighbours=tuple(neighbours))


def test_the_worth_of_a_record_is_the_mean_of_the_scores_that_it_has_probes_for():
    new, true = (-1.0, -2.0), (-2.0, -1.0)
    assert worth(scores(new, [new, true], [true, true, true, new]), None) == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert worth(scores(new, [true]), None) == 0.5
    assert worth(scores((-1.0, None)), None) is None


def test_a_clear_winner_is_chosen_whatever_it_does_to_text():
    choice = choose([setting("3", [0.5] * 10, 0.001), setting("4", [0.9] * 10, 0.1)])
    assert (choice.chosen.name, choice.tied) == ("4", ("4",))
    assert choice.verdict == "layer: 4 is best"


def test_of_a_tie_the_setting_that_moves_text_least_is_chosen_and_the_tie_is_said():
    noisy = [0.0, 1.0] * 5
    choice = choose([setting("3", noisy, 0.01), setting("4", noisy[::-1], 0.002), setting("9", [0.1] * 10, 0.0)])
    assert (choice.chosen.name, choice.tied) == ("4", ("3", "4"))
    assert choice.verdict == "layer: 4; a tie with 3, of which it moves ordinary text least"


def test_records_are_compared_one_by_one():
    # Spread over records is large, but every one of them is a little worse: that is no tie.
    high = [0.1 * place for place in range(10)]
    choice = choose([setting("3", high, 0.5), setting("4", [value - 0.01 for value in high], 0.001)])
    assert choice.tied == ("3",)


def test_without_a_divergence_the_best_of_a_tie_is_chosen():
    choice = choose([setting("3", [0.0, 0.9] * 5), setting("4", [1.0, 0.0] * 5)])
    assert (choice.chosen.name, choice.tied) == ("4", ("3", "4"))


def test_a_setting_of_which_nothing_is_known_is_never_chosen():
    choice = choose([setting("3", []), setting("4", [0.2] * 9, 0.1)])
    assert (choice.chosen.name, choice.tied) == ("4", ("4",))
    assert math.isnan(setting("3", []).worth)


def test_what_was_compared_with_nothing_is_not_called_the_best():
    assert choose([setting("3", [0.5] * 10, 0.001)]).verdict == "layer: 3, the only one tried"


def test_the_table_shows_what_was_measured_and_marks_what_was_chosen():
    base = {"0": scores((-2.0, -1.0), [(-2.0, -1.0)], [(-2.0, -1.0)])}
    after = {"0": scores((-1.0, -2.0), [(-1.0, -2.0)], [(-2.0, -1.0)])}
    found = score_setting(SettingScores("layer", "3"), after, base, divergence=0.0123, evaluations=7.5, applied=1)
    before = score_setting(SettingScores("", ""), base, base)
    table = setting_table([vars(found)], {"layer": "3"}, before.scores)
    assert "| layer | **3** | 1.000 [" in table
    assert "| 0.0123 | 7.5 | 1 | 0 |" in table
    assert "|  | unedited | 0.000 [" in table
    assert "**" not in setting_table([vars(found)], {"layer": "4"}, before.scores)
