"""Whether a space stands between prompt and target, by their texts alone."""

import pytest

from rome_pl.encoding.target_space import joined_by_space

SIGNS = ".,;:!?%/-\u2013\u2014\u2026'\u2019"


@pytest.mark.parametrize("sign", SIGNS)
def test_a_sign_before_a_word_or_number_gets_a_space(sign):
    assert joined_by_space("The platform is", f"{sign}NET") is True
    assert joined_by_space("It was in Oslo", f"{sign}27 degrees") is True
    assert joined_by_space("Рим — это", f"{sign}Италия") is True


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("rest", ["", "!", ". ", " and", '"', "(a"])
def test_a_sign_alone_or_before_another_joins_left(sign, rest):
    assert joined_by_space("Rome is big", sign + rest) is False


@pytest.mark.parametrize("sign", SIGNS)
def test_a_sign_between_digits_joins_both(sign):
    assert joined_by_space("It was 3", f"{sign}14") is False
    assert joined_by_space("It was 3", f"{sign}a") is True or sign in "'\u2019"
    assert joined_by_space("It was x", f"{sign}14") is True


@pytest.mark.parametrize("quote", "'\u2019")
@pytest.mark.parametrize("word", ["s", "t", "re", "ve", "ll", "d", "m"])
def test_english_clitics_join_left(quote, word):
    for rest in ("", " mayor", ".", "-in"):
        assert joined_by_space("the parents", quote + word + rest) is False
    assert joined_by_space("the band is", f"{quote}{word}abc") is True


@pytest.mark.parametrize("target", ["'N Sync", "'90s", "\u2019round the bend", "'Twas"])
def test_other_words_with_an_apostrophe_do_not(target):
    assert joined_by_space("the drummer of", target) is True


@pytest.mark.parametrize("dash", "-\u2013\u2014/")
def test_a_dash_after_white_space_is_no_hyphen(dash):
    for space in " \u00a0\n":
        assert joined_by_space(f"Oslo{space}{dash}", "Norway") is None  # as between any two words
        assert joined_by_space(f"Oslo{space}{dash}", ".NET") is True
        assert joined_by_space(f"Oslo{space}{dash}", ", so") is False
    assert joined_by_space(f"Jean{dash}", "Paul") is False
    assert joined_by_space(f"3{dash}", "5") is False
    assert joined_by_space(dash, "5") is False


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("罗马位于", "意大利"), ("罗马位于", ".NET"), ("It is", "\u2013東京"), ("ローマは", "-27"),
        ("Rome is in", "意大利"),
        ("It costs $", "5"), ("Rome (", "Italy"), ("Rome (", "-5"), ("They call it “", ".NET"), ("Rome (big", ") is"),
    ],
)  # fmt: skip
def test_scripts_without_spaces_and_opening_signs_stay_as_they_were(prompt, target):
    assert joined_by_space(prompt, target) is False


@pytest.mark.parametrize("target", ["\u20ac5", "#1", "@home", "+47", "\u221227", "\u00bfQu\u00e9", "_x", "~5"])
def test_other_signs_before_a_word_or_number_get_a_space(target):
    assert joined_by_space("He wrote", target) is True
    assert joined_by_space("He wrote (", target) is False


@pytest.mark.parametrize(
    "target",
    [
        "Rome",
        '"Hamlet"',
        "\u201cHamlet\u201d",
        "(unknown)",
        "\u0301a",
        "\N{SLIGHTLY SMILING FACE}",
        "+ 47",
        '"',
        "\u20ac",
    ],
)
def test_other_targets_are_for_the_tokenizer_to_decide(target):
    assert joined_by_space("He wrote", target) is None
