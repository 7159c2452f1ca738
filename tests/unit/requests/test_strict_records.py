"""Values of another type in records: refused by name, never left out without a word; and messages that stay short."""

import json

import pytest

from rome_pl.errors import OptionError
from rome_pl.files.strict_json import Fault, read_value
from rome_pl.interop.easyedit_arguments import easyedit_requests
from rome_pl.requests.record_forms import DataError, parse_records, read_records
from tests.timing import least_seconds

KNOWEDIT = {
    "prompt": "Rome is in",
    "subject": "Rome",
    "target_new": "Spain",
    "ground_truth": "Italy",
    "portability": {},
}
ZSRE = {
    "src": "Rome is in",
    "subject": "Rome",
    "alt": "Spain",
    "answers": ["Italy"],
    "loc": "Oslo is",
    "loc_ans": "old",
}


def refusal(record):
    requests, (invalid,) = parse_records([record], "facts.json")
    assert not requests
    return invalid


def only(record):
    (request,), invalid = parse_records([record], "facts.json")
    assert not invalid
    return request


@pytest.mark.parametrize("value", [1990, True, False, 0, {"a": "b"}, {5}, 1.5, b"x"])
def test_a_probe_that_is_no_text_is_left_out_with_a_note(value):
    """Nothing was said: YAML makes numbers of years, and truth values of "no"."""
    (note,) = only(KNOWEDIT | {"locality": {"Other": [{"prompt": "Oslo is", "ground_truth": value}]}}).notes
    assert note.startswith("locality.Other.ground_truth: left out: expected text, got ")
    (note,) = only(KNOWEDIT | {"portability": {"Other": [{"prompt": value, "ground_truth": "x"}]}}).notes
    assert note.startswith("portability.Other.prompt: left out: expected text, got ")
    follow_up = {"New Question": "Oslo is", "New Answer": value}
    for name, changes in (
        ("loc_ans", {"loc_ans": value}),
        ("loc", {"loc": value}),
        ("portability.New Answer", {"portability": follow_up}),
    ):
        request = only(ZSRE | changes)
        assert len(request.locality) + len(request.portability) == ("loc" not in name)
        (note,) = request.notes
        assert note.startswith(f"{name}: left out: expected text, got ")
    plain, noted = (only(ZSRE | changes) for changes in ({"loc": None}, {"loc": value}))
    assert (plain, plain.notes) == (noted, ())


@pytest.mark.parametrize("value", [5, "text", ["Oslo is"], True])
def test_a_follow_up_question_that_is_none_is_left_out_with_a_note(value):
    (note,) = only(ZSRE | {"portability": value}).notes
    assert note.startswith("portability: left out: expected 'New Question' and 'New Answer', got ")


def test_a_note_of_what_was_left_out_stands_beside_the_others():
    request = only(KNOWEDIT | {"subject": "Rome ", "locality": {"Other": [{"prompt": "Oslo is", "ground_truth": 5}]}})
    assert [note.split(":")[0] for note in request.notes] == ["subject", "locality.Other.ground_truth"]


@pytest.mark.parametrize("nothing", [None, [], [[]], ""])
def test_a_probe_without_an_answer_is_none(nothing):
    assert only(KNOWEDIT | {"locality": {"Other": [{"prompt": "Oslo is", "ground_truth": nothing}]}}).locality == ()
    assert only(ZSRE | {"loc_ans": nothing}).locality == ()


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (KNOWEDIT | {"locality": 0}, "locality"),
        (KNOWEDIT | {"locality": False}, "locality"),
        (KNOWEDIT | {"locality": {"Other": 0}}, "locality.Other"),
        (KNOWEDIT | {"rephrase_prompt": False}, "rephrase_prompt"),
        (ZSRE | {"answers": 0}, "answers"),
        (ZSRE | {"answers": False}, "answers"),
    ],
)
def test_zero_and_false_are_not_nothing(record, field):
    assert refusal(record).field == field


def test_fields_that_hold_nothing_are_as_if_left_out():
    plain = only(KNOWEDIT)
    for name, nothing in (("locality", None), ("locality", []), ("rephrase_prompt", None), ("rephrase_prompt", "")):
        assert only(KNOWEDIT | {name: nothing}) == plain
    assert only(KNOWEDIT | {"rephrase_prompt": None, "rephrase": "In Rome one is in"}).paraphrases == (
        "In Rome one is in",
    )
    assert only(ZSRE | {"portability": None}) == only(ZSRE)


def test_a_character_that_is_escaped_in_halves_is_whole_in_yaml_as_in_json(tmp_path):
    text = json.dumps([{"prompt": "Rome \N{SLIGHTLY SMILING FACE} is in", "subject": "Rome", "target_new": "Spain"}])
    assert "\\ud83d" in text
    for name in ("facts.json", "facts.yaml"):
        (tmp_path / name).write_text(text)
        (request,), _ = parse_records(read_records(tmp_path / name), name)
        assert request.prompt == "Rome \N{SLIGHTLY SMILING FACE} is in"
    (tmp_path / "facts.yaml").write_text(text.replace("\\ude42", ""))
    _, (invalid,) = parse_records(read_records(tmp_path / "facts.yaml"), "facts.yaml")
    assert "half a character" in invalid.message


def test_a_key_twice_among_very_many_is_found_in_time_in_proportion_to_them():
    def reading(number):
        text = json.dumps({f"k{place}": 1 for place in range(number)})[:-1] + f', "k{number - 1}": 2}}'
        fault = read_value(text, "take one out")
        assert isinstance(fault, Fault)
        assert f"the key 'k{number - 1}' occurs twice" in fault.message
        return least_seconds(lambda: read_value(text, "take one out"))

    assert reading(40_000) < 20 * reading(5_000)


def test_a_form_that_is_not_known_is_told_by_its_first_fields():
    with pytest.raises(DataError, match=r"fields \['field0', .*\] and \d+ more\. Known forms") as raised:
        parse_records([{f"field{place}": 1 for place in range(5000)}], "facts.json")
    assert len(str(raised.value)) < 600
    with pytest.raises(DataError, match=r"fields \['a', 'b'\]\. Known forms"):
        parse_records([{"b": 1, "a": 2}], "facts.json")


@pytest.mark.parametrize("name", ["x" * 2000, "\x1b[31m", "a\u202eb"])
def test_an_argument_that_is_not_known_is_named_in_short(name):
    with pytest.raises(OptionError, match="no argument of edit") as raised:
        easyedit_requests(prompts="Rome is in", target_new="Spain", subject="Rome", **{name: 1})
    assert len(str(raised.value)) < 200
    assert str(raised.value).isprintable()
