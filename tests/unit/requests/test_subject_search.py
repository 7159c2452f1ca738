"""The subject in its prompt: whole words, whole characters, and what looks alike."""

import pytest

from rome_pl.requests.conflicts import touched_neighbours
from rome_pl.requests.edit_request import EditRequest, RequestError, locate_subject
from rome_pl.requests.words import is_whole_word

NFC, NFD = "Caf\u00e9", "Cafe\u0301"


def found(prompt, subject):
    return EditRequest(prompt=prompt, subject=subject, target_new="x")


@pytest.mark.parametrize(
    ("text", "subject", "whole"),
    [
        ("Rome is", "Rome", True), ("Romea is", "Rome", False), ("aRome is", "Rome", False),
        ("Rome2 is", "Rome", False),
        ("Rome_ is", "Rome", False), ("Rome's", "Rome", True), ("(Rome)", "Rome", True), ("Rome-on", "Rome", True),
        ("C++a", "C++", True), ("aC++", "C++", False), ("\u0930\u094b\u092e\u093e is", "\u0930\u094b\u092e", False),
        ("在东京的", "东京", True), ("東京タワー", "東京", True), ("กรุงเทพฯ", "กรุงเทพ", True), ("ນະຄອນ", "ນະ", True),
        ("서울특별시", "서울", False), ("서울 시", "서울", True), ("Рима", "Рим", False), ("东京Tower", "Tower", True),
        ("X東京", "X", True),
    ],
)  # fmt: skip
def test_one_rule_says_what_a_whole_word_is(text, subject, whole):
    start = text.index(subject)
    assert is_whole_word(text, start, start + len(subject)) is whole
    # Of two occurrences the whole word counts, also where it comes first.
    if whole and len(subject) > 1 and subject.isalpha() and subject.isascii():
        assert locate_subject(f"{text} {subject}ab", subject) == (start, start + len(subject))


@pytest.mark.parametrize(
    ("prompt", "subject", "names"),
    [
        ("東京タワーは", "東京", True), ("在东京的", "东京", True), ("กรุงเทพมหานคร", "กรุงเทพ", True),
        ("The Romea is", "Rome", False), ("Rome and Romea", "Rome", True), ("Romea and Rome", "Rome", True),
        ("\"C++\" is", "C++", True), ("Rome", "Oslo", False),
    ],
)  # fmt: skip
def test_neighbours_that_name_an_edited_subject_are_found_by_the_same_rule(prompt, subject, names):
    request = EditRequest(
        prompt="Lima is in", subject="Lima", target_new="x", target_true="y", neighbours=[prompt], case_id="a"
    )
    assert touched_neighbours([request], {"Lima", subject}) == ({"a": (True,)} if names else {})


@pytest.mark.parametrize(
    ("prompt", "subject", "text"),
    [
        (f"The {NFC} is", NFD, NFC),
        (f"The {NFD} is", NFC, NFD),
        ("Ray\u00a0Charles, the", "Ray Charles", "Ray\u00a0Charles"),
        ("Ray Charles, the", "Ray\u00a0Charles", "Ray Charles"),
        ("Ray\u2009Charles, the", "Ray\u202fCharles", "Ray\u2009Charles"),
        ("Ray\nCharles, the", "Ray Charles", "Ray\nCharles"),
        ("Ray\u200bCharles, the", "RayCharles", "Ray\u200bCharles"),
        ("RayCharles, the", "Ray\u00adCh\u2060arles", "RayCharles"),
        ("The O\u2019Neil is", "O'Neil", "O\u2019Neil"),
        ("The O'Neil is", "O\u2019Neil", "O'Neil"),
        ("The \u201cHelp!\u201d is", '"Help!"', "\u201cHelp!\u201d"),
        ("Jean\u2011Paul is", "Jean-Paul", "Jean\u2011Paul"),
        ("A \u22125 is", "-5", "\u22125"),
        ("Jean-Paul is", "Jean\u2010Paul", "Jean-Paul"),
        ("ray charles, the", "Ray Charles", "ray charles"),
        ("RAY CHARLES, the", "Ray\u00a0Charles", "RAY CHARLES"),
        ("The Stra\u00dfe is", "STRASSE", "Stra\u00dfe"),
        ("The \ufb01g is", "Fig", "\ufb01g"),
        ("\u1112\u1161\u11ab is", "\ud55c", "\u1112\u1161\u11ab"),
        ("\u212bs is", "\u00c5s", "\u212bs"),
        ("rome, the romance of rome in romea", "Rome", "rome"),
    ],
)
def test_what_looks_alike_is_found_and_becomes_the_subject(prompt, subject, text):
    edit = found(prompt, subject)
    assert edit.subject == text == edit.prompt[slice(*edit.span)]
    (note,) = edit.notes
    assert note.startswith(f"subject: found by what looks alike: the prompt has {text!r} with ")
    assert "U+" in note
    again = EditRequest(prompt=edit.prompt, subject=edit.subject, target_new="x")
    assert (again, again.notes) == (edit, ())


def test_the_last_whole_word_counts_among_look_alikes_too():
    assert found("rome, the romance of rome in romea", "Rome").span == (21, 25)
    assert found("romea and romeo", "Rome").span == (10, 14)


def test_what_stands_there_to_the_letter_wins():
    edit = found("ROME and Rome and rome", "Rome")
    assert (edit.span, edit.notes) == ((9, 13), ())


@pytest.mark.parametrize(
    ("prompt", "subject", "parts"),
    [
        (
            "Ray\u00a0Charles and Ray\u2009Charles", "Ray Charles",
            ["several texts there look like it", "U+00A0 NO-BREAK SPACE", "U+2009 THIN SPACE", "U+0020 SPACE"],
        ),
        ("rome and ROME", "Rome", ["several texts", "'rome'", "'ROME'", "U+0052 LATIN CAPITAL LETTER R"]),
        ("Ray Charl\u0435s, the", "Ray Charles", ["U+0435 CYRILLIC SMALL LETTER IE where the subject has U+0065"]),
        (f"The {NFD} is", "Cafe", ["U+0301 COMBINING ACUTE ACCENT where the subject has nothing"]),
        (f"The {NFC} is", "Cafe", ["U+00E9 LATIN SMALL LETTER E WITH ACUTE where the subject has U+0065"]),
        ("Ray Charls, the", "Ray Charles", ["the prompt has"]),
    ],
)  # fmt: skip
def test_what_is_ambiguous_or_only_nearly_alike_is_refused_by_code_points(prompt, subject, parts):
    with pytest.raises(RequestError) as raised:
        found(prompt, subject)
    assert raised.value.field == "subject"
    for part in (repr(subject), *parts, "write it exactly as in the prompt, or give subject_span"):
        assert part in str(raised.value)


def test_a_subject_that_resembles_nothing_gets_no_code_points():
    with pytest.raises(RequestError) as raised:
        found("The Eiffel Tower is in", "Louvre")
    assert "U+" not in str(raised.value)


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        (f"The {NFD} is", "Cafe"), ("\U0001f469\u200d\U0001f680 is", "\U0001f469"),
        ("\U0001f44d\U0001f3fd is", "\U0001f44d"),
        ("\U0001f1eb\U0001f1f7\U0001f1e9\U0001f1ea", "\U0001f1f7\U0001f1e9"), ("\u1112\u1161\u11ab", "\u1112\u1161"),
    ],
)  # fmt: skip
def test_no_span_cuts_a_character_in_half(prompt, subject):
    assert locate_subject(prompt, subject) is None
    with pytest.raises(RequestError, match="field 'subject'"):
        found(prompt, subject)
    start = prompt.index(subject)
    with pytest.raises(RequestError, match="field 'subject_span': cuts a character in half"):
        EditRequest(prompt=prompt, subject=subject, target_new="x", subject_span=[start, start + len(subject)])


def test_a_whole_character_counts_where_a_cut_one_comes_later():
    assert locate_subject(f"Cafe and {NFD}", "Cafe") == (0, 4)


def test_long_texts_are_searched_in_little_time():
    with pytest.raises(RequestError):
        found("word " * 20_000, "Danielle Darrieux, " * 50)


def test_differences_of_long_texts_are_found_in_little_time_and_few_words():
    """Comparing all of both took seconds, and the refusal quoted all of them."""
    prompt = "aA" * 1500 + " and " + "Aa" * 1500
    with pytest.raises(RequestError) as raised:
        found(prompt, "a" * 3000)
    message = str(raised.value)
    assert len(message) < 1200
    assert "U+0041 LATIN CAPITAL LETTER A where the subject has nothing" in message


@pytest.mark.parametrize("prompt", ["MISS VANE and Miss Vane are", "MISS VANE and Miss Vane and miss VANE are"])
def test_several_look_alikes_are_told_apart_in_few_words(prompt):
    with pytest.raises(RequestError) as raised:
        found(prompt, "miss vane")
    message = str(raised.value)
    assert len(message) < 600
    for part in ("'MISS VANE'", "'Miss Vane'", "U+004D LATIN CAPITAL LETTER M"):
        assert part in message
    assert ("; and 1 more)" in message) is ("VANE are" in prompt)


@pytest.mark.parametrize(
    ("prompt", "subject", "part"),
    [
        ("The a\u2013b is", "a-b", "U+2013 EN DASH where the subject has U+002D HYPHEN-MINUS"),
        ("The Ray  Charles is", "Ray Charles", "U+0020 SPACE where the subject has nothing"),
        ("NewYork is", "New York", "nothing where the subject has U+0020 SPACE"),
        ("Ray Charles is", "Charles  Ray", None),
    ],
)
def test_other_dashes_and_more_or_fewer_spaces_are_shown(prompt, subject, part):
    with pytest.raises(RequestError) as raised:
        found(prompt, subject)
    assert (part in str(raised.value)) if part else ("U+" not in str(raised.value))
