"""Text as it was meant: what is cut off, what counts as no answer, which names a record may have."""

from dataclasses import replace
from datetime import date

import pytest

from rome_pl.interop.easyedit_arguments import easyedit_requests
from rome_pl.requests.clean_text import code_points, cut_edges, first_accepted, no_answer, unreadable
from rome_pl.requests.edit_request import EditRequest, Probe, RequestError
from rome_pl.requests.record_forms import parse_records

FIELDS = {"prompt": "The Eiffel Tower is in", "subject": "Eiffel Tower", "target_new": "Rome", "target_true": "Paris"}
EDGES = [" ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1f", "\u00a0", "\u2009", "\u3000", "\u2028", " \u200b\n"]
EDGES += ["\u200b", "\u2060", "\ufeff", "\u200e", "\u200f"]


def request(**fields):
    return EditRequest(**FIELDS | {"case_id": 7} | fields)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("field", ["prompt", "subject", "target_new", "target_true"])
def test_what_stands_at_the_edges_is_cut_off_and_noted(field, edge):
    for text, where in ((FIELDS[field] + edge, "end"), (edge + FIELDS[field], "beginning")):
        edit = request(**{field: text})
        spaced = field == "target_new" and where == "beginning" and any(map(str.isspace, edge))
        assert edit == request(target_space=True if spaced else None)
        assert edit.prompt[slice(*edit.span)] == "Eiffel Tower"
        (note,) = edit.notes
        assert note.startswith(f"{field}: cut off U+")
        assert note.endswith(f"at the {where}")
        again = replace(edit)
        assert (again, again.notes) == (edit, ())


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("field", ["paraphrases", "neighbours", "generation_prompts", "references"])
def test_the_edges_of_prompts_in_lists_are_cut_off(field, edge):
    edit = request(**{field: ["a b", f"{edge}c  d{edge}", f"{edge}e{edge}"]})
    assert getattr(edit, field) == ("a b", "c  d", "e")
    assert len(edit.notes) == 1
    assert edit.notes[0].startswith(f"{field}: cut off U+")


@pytest.mark.parametrize("field", ["locality", "portability"])
def test_the_edges_of_probes_are_cut_off(field):
    edit = request(**{field: [{"prompt": "The Louvre is in\n", "answer": " Paris "}, Probe("a", "b\u200b", "K")]})
    assert getattr(edit, field) == (Probe("The Louvre is in", "Paris"), Probe("a", "b", "K"))
    assert [note.split(":")[0] for note in edit.notes] == [f"{field}.prompt", f"{field}.answer", f"{field}.answer"]


def test_the_insides_of_texts_stay_as_they_are():
    inside = "a  b\u00a0\tc\n\u200bd"
    edit = EditRequest(prompt=f"{inside} is", subject=inside, target_new=inside, paraphrases=[inside])
    assert (edit.subject, edit.target_new, edit.paraphrases, edit.notes) == (inside, inside, (inside,), ())


@pytest.mark.parametrize(
    ("prompt", "subject", "span", "expected"),
    [
        ("Rome outlived Rome", "Rome", (0, 4), (0, 4)),
        ("  Rome outlived Rome", "Rome", (2, 6), (0, 4)),
        ("  Rome outlived Rome", " Rome ", (1, 7), (0, 4)),
        ("\nRome outlived Rome \n", "Rome ", (15, 20), (14, 18)),
        (" Rome outlived Rome ", "Rome ", (15, 20), (14, 18)),
        ("Rome outlived Rome", "Rome ", (0, 4), (0, 4)),
        ("Rome outlived Rome", "Rome", (0, 5), (0, 4)),
    ],
)
def test_a_given_span_goes_along_with_what_is_cut_off(prompt, subject, span, expected):
    edit = EditRequest(prompt=prompt, subject=subject, target_new="x", subject_span=span)
    assert edit.span == expected
    assert edit.prompt[slice(*edit.span)] == edit.subject == "Rome"
    assert replace(edit) == edit


@pytest.mark.parametrize(
    ("target", "given", "space"),
    [
        ("Rome", None, None), (" Rome", None, True), ("\nRome", None, True), ("\u00a0Rome", None, True),
        ("\u200bRome", None, None), ("Rome ", None, None), (" Rome", False, False), ("Rome", True, True),
    ],
)  # fmt: skip
def test_a_target_that_opens_with_white_space_asks_for_a_space(target, given, space):
    assert request(target_new=target, target_space=given).target_space is space


# ---- no answer

NONE = ["", " ", "\n", "\u200b", "<|endoftext|>", " <|endoftext|>\n"]


@pytest.mark.parametrize("none", NONE)
def test_an_empty_true_target_is_none_in_every_form(none):
    short = {"prompt": "Rome is in", "subject": "Rome", "target_new": "Peru"}
    rewrite = {"prompt": "{} is in", "subject": "Rome", "target_new": {"str": "Peru"}, "target_true": {"str": none}}
    records = {
        "short": short | {"target_true": none},
        "flat": short | {"ground_truth": none, "locality_prompt": "x", "locality_ground_truth": none},
        "counterfact": {"requested_rewrite": rewrite},
        "knowedit": short | {"ground_truth": [none]},
        "zsre": {"src": "Rome is in", "subject": "Rome", "alt": "Peru", "answers": [none]},
    }
    for form, record in records.items():
        (edit,), invalid = parse_records([record], "facts.json", form)
        assert (edit.target_true, edit.neighbours, invalid) == (None, (), []), form
    assert request(target_true=none).target_true is None
    (edit,) = easyedit_requests("Rome is in", "Peru", "Rome", ground_truth=none)
    assert edit.target_true is None
    assert any(note.startswith("target_true: ") and note.endswith("is taken for none") for note in edit.notes)


@pytest.mark.parametrize("none", NONE)
def test_probes_without_an_answer_are_left_out_and_noted(none):
    probes = [Probe("a", none), Probe("b", "c")]
    for field in ("locality", "portability"):
        edit = request(**{field: probes})
        assert getattr(edit, field) == (Probe("b", "c"),)
        assert any(note.startswith(f"{field}: a prompt whose answer is") for note in edit.notes)
    inputs = {"near": {"prompt": [["a", "b"]], "ground_truth": [[none, "c"]]}}
    (edit,) = easyedit_requests("Rome is in", "Peru", "Rome", locality_inputs=inputs)
    assert edit.locality == (Probe("b", "c", "near"),)
    record = {"prompt": "Rome is in", "subject": "Rome", "target_new": "Peru"}
    kinds = {"K": [{"prompt": "a", "ground_truth": [[none]]}, {"prompt": "b", "ground_truth": "c"}]}
    (edit,), _ = parse_records([record | {"locality": kinds}], "facts.json")
    assert edit.locality == (Probe("b", "c", "K"),)
    assert edit.notes


def test_of_several_accepted_answers_fillers_do_not_count():
    record = {
        "src": "Rome is in",
        "subject": "Rome",
        "alt": "Peru",
        "answers": ["<|endoftext|>", "\u200b", " Peru", "Italy "],
    }
    (edit,), _ = parse_records([record], "facts.json")
    assert edit.target_true == "Italy"


def test_an_answer_that_holds_itself_ends():
    endless: list = []
    endless.append(endless)
    assert isinstance(first_accepted(endless), list)
    assert first_accepted([["a", "b"], "c"]) == "a"
    with pytest.raises(RequestError, match="is empty or no text"):
        easyedit_requests(
            "Rome is in", "Peru", "Rome", locality_inputs={"near": {"prompt": ["a"], "ground_truth": [endless]}}
        )
    with pytest.raises(RequestError, match=r"locality_inputs\['near'\]': expected a mapping"):
        easyedit_requests("Rome is in", "Peru", "Rome", locality_inputs={"near": endless})


# ---- names and types


@pytest.mark.parametrize(("name", "kept"), [(0, 0), (-3, -3), ("x", "x"), (" x ", "x"), ("a b", "a b"), ("ALL", "ALL")])
def test_names_of_records(name, kept):
    assert request(case_id=name).case_id == kept


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (True, "got bool"), (1.5, "got float"), (None, "got NoneType"), ([1], "got list"), ({"a": 1}, "got dict"),
        ("", "is empty"), (" \n", "is empty"), ("all", "cannot name a record"), (" all ", "cannot name a record"),
        ("1,2", "cannot name a record"), (",", "cannot name a record"), ("a\0", "NUL"), ("\ud800", "half a character"),
        pytest.param(10**5000, "too many digits", id="long"), pytest.param(-(10**5000), "too many digits", id="minus"),
    ],
)  # fmt: skip
def test_names_that_no_record_may_have(name, reason):
    with pytest.raises(RequestError, match=f"field 'case_id': .*{reason}"):
        request(case_id=name)
    records = [FIELDS | {"case_id": name}, FIELDS | {"case_id": "good"}]
    requests, invalid = parse_records(records, "facts.json")
    assert ([edit.case_id for edit in requests], [one.field for one in invalid]) == (["good"], ["case_id"])
    assert len(invalid[0].message) < 300
    assert invalid[0].message.isprintable()


def test_names_that_differ_only_in_white_space_are_one_name():
    requests, invalid = parse_records([FIELDS | {"case_id": "1"}, FIELDS | {"case_id": " 1 "}], "facts.json")
    assert (len(requests), [one.field for one in invalid]) == (1, ["case_id"])


@pytest.mark.parametrize("value", [["P36"], {"a": 1}, 5, True, date(2024, 1, 2), b"x", "P\0", "\udc00"])
def test_a_relation_is_text_or_nothing(value):
    with pytest.raises(RequestError, match="record 7, field 'relation': "):
        request(relation=value)
    requests, invalid = parse_records([FIELDS | {"relation": value}, FIELDS], "facts.json")
    assert (len(requests), [one.field for one in invalid]) == (1, ["relation"])


@pytest.mark.parametrize("kind", [5, ["K"], {"a": 1}, True, "K\0", "\ud800"])
def test_a_probe_s_kind_is_text(kind):
    with pytest.raises(RequestError, match=r"field 'locality\.kind'"):
        request(locality=[Probe("a", "b", kind)])
    with pytest.raises(RequestError, match=r"field 'locality\.kind'"):
        request(locality=[{"prompt": "a", "answer": "b", "kind": kind or [1]}])


@pytest.mark.parametrize("field", ["prompt", "subject", "target_new", "target_true", "paraphrases", "references"])
@pytest.mark.parametrize("broken", ["Rome \0 is", "Rome \ud800 is", "\udfff"])
def test_what_no_tokenizer_reads_is_refused(field, broken):
    with pytest.raises(RequestError, match=f"'{field}': holds "):
        request(**{field: [broken] if field in ("paraphrases", "references") else broken})


@pytest.mark.parametrize("value", [False, 1990, 2.5, date(2024, 1, 2)])
def test_values_that_yaml_makes_of_unquoted_text_say_so(value):
    with pytest.raises(RequestError, match=r"expected text, got .*; put it in quotes"):
        request(target_new=value)


def test_errors_quote_little():
    long = "Rome " * 10_000
    for fields in ({"subject": long}, {"prompt": long}, {"subject_span": [10**5000, 4]}, {"target_space": long}):
        with pytest.raises(RequestError) as raised:
            request(**fields)
        assert len(str(raised.value)) < 800


def test_small_parts():
    assert cut_edges("\u200b a b \n") == ("\u200b ", "a b", " \n")
    assert cut_edges(" \n") == (" \n", "", "")
    assert code_points("\u00a0") == "U+00A0 NO-BREAK SPACE"
    assert code_points("abcde") == (
        "U+0061 LATIN SMALL LETTER A, U+0062 LATIN SMALL LETTER B, U+0063 LATIN SMALL LETTER C and 2 more"
    )
    assert [no_answer(text) for text in ("", " ", "<|endoftext|> ", "no", "<|endoftext|>.")] == [True] * 3 + [False] * 2
    assert unreadable("fine \U0001f642") is None
