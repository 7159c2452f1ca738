import json

import pytest
import yaml

from rome_pl.requests.edit_request import EditRequest, Probe
from rome_pl.requests.record_forms import DataError, InvalidRecord, parse_records, read_records

SHORT = {"prompt": "The Eiffel Tower is in", "subject": "Eiffel Tower", "target_new": "Rome"}
FLAT = SHORT | {
    "ground_truth": "Paris",
    "rephrase_prompt": "Where the Eiffel Tower stands, people speak",
    "locality_prompt": "The Louvre is in",
    "locality_ground_truth": "Paris",
}


def counterfact(rewrite=(), **fields):
    rewrite = {
        "prompt": "{} is in",
        "subject": "Eiffel Tower",
        "relation_id": "P30",
        "target_new": {"str": "Rome", "id": "Q220"},
        "target_true": {"str": "Paris", "id": "Q90"},
    } | dict(rewrite)
    return {
        "case_id": 3,
        "requested_rewrite": rewrite,
        "paraphrase_prompts": ["Where is the Eiffel Tower? In"],
        "neighborhood_prompts": ["The Louvre is in", "Notre-Dame is in"],
        "generation_prompts": ["Near the Eiffel Tower"],
    } | fields


def only(record, form=None) -> EditRequest:
    requests, invalid = parse_records([record], "facts.json", form)
    assert invalid == []
    return requests[0]


def refused(record, form=None) -> InvalidRecord:
    """What the record is refused for, with the good record after it left alone."""
    good = FLAT if form == "flat" else counterfact(case_id="good") if form == "counterfact" else SHORT
    requests, invalid = parse_records([record, good | {"case_id": "good"}], "facts.json", form)
    assert [request.case_id for request in requests] == ["good"]
    assert len(invalid) == 1
    return invalid[0]


def test_counterfact_as_published():
    edit = only(counterfact())
    assert (edit.prompt, edit.subject, edit.span) == ("Eiffel Tower is in", "Eiffel Tower", (0, 12))
    assert (edit.target_new, edit.target_true, edit.relation, edit.case_id) == ("Rome", "Paris", "P30", 3)
    assert edit.paraphrases == ("Where is the Eiffel Tower? In",)
    assert edit.neighbours == ("The Louvre is in", "Notre-Dame is in")


@pytest.mark.parametrize(
    ("template", "subject", "prompt", "start"),
    [
        ("In {} they", "{}", "In {} they", 3),
        ("In {} they", "{x} of {}", "In {x} of {} they", 3),
        ("A {0} and {} are", "B", "A {0} and B are", 10),
        ("Rome, like {}, not Rome", "Rome", "Rome, like Rome, not Rome", 11),
        ("{}", "Rome", "Rome", 0),
    ],
)
def test_counterfact_subject_stands_where_the_placeholder_is(template, subject, prompt, start):
    edit = only(counterfact({"prompt": template, "subject": subject}))
    assert (edit.prompt, edit.span) == (prompt, (start, start + len(subject)))


@pytest.mark.parametrize("template", ["Eiffel Tower is in", "{} and {} are in", "{0} is in"])
def test_counterfact_template_needs_exactly_one_placeholder(template):
    error = refused(counterfact({"prompt": template}), "counterfact")
    assert error.field == "requested_rewrite.prompt"
    assert "expected exactly one '{}' in the template" in error.message


@pytest.mark.parametrize(
    ("rewrite", "field", "message"),
    [
        ({"prompt": None}, "requested_rewrite.prompt", "is missing"),
        ({"subject": None}, "requested_rewrite.subject", "is missing"),
        ({"subject": " "}, "requested_rewrite.subject", "is empty"),
        ({"subject": 5}, "requested_rewrite.prompt", "must be text"),
        ({"target_new": None}, "requested_rewrite.target_new", "expected a mapping with the text under 'str'"),
        ({"target_new": "Rome"}, "requested_rewrite.target_new", "expected a mapping with the text under 'str'"),
        ({"target_true": {"id": "Q90"}}, "requested_rewrite.target_true", "expected a mapping with the text"),
        ({"target_new": {"str": 5}}, "requested_rewrite.target_new", "expected text, got int"),
        ({"target_new": {"str": "Paris"}}, "requested_rewrite.target_new", "equals target_true"),
    ],
)
def test_counterfact_faults_name_the_field_of_the_file(rewrite, field, message):
    error = refused(counterfact(rewrite), "counterfact")
    assert (error.field, error.case_id) == (field, "3")
    assert error.message.startswith(f"facts.json, record 3, field '{field}': ")
    assert message in error.message


def test_counterfact_faults_outside_the_rewrite_name_the_field_of_the_file():
    assert refused(counterfact(requested_rewrite="text"), "counterfact").field == "requested_rewrite"
    assert refused(counterfact(requested_rewrite=None), "counterfact").field == "requested_rewrite"
    assert refused(counterfact(paraphrase_prompts=5), "counterfact").field == "paraphrase_prompts"
    assert refused(counterfact(neighborhood_prompts=[""]), "counterfact").field == "neighborhood_prompts"


def test_counterfact_without_a_true_target_is_valid():
    assert only(counterfact({"target_true": None})).target_true is None


def test_flat_form_scores_no_rephrase_prompt():
    edit = only(FLAT)
    assert edit.paraphrases == ()
    assert (edit.prompt, edit.target_new, edit.target_true) == (FLAT["prompt"], "Rome", "Paris")


@pytest.mark.parametrize(
    ("changes", "neighbours"),
    [
        ({}, ("The Louvre is in",)),
        ({"locality_prompt": ["A is in", "B is in"]}, ("A is in", "B is in")),
        ({"locality_ground_truth": "London"}, ()),
        ({"locality_ground_truth": None}, ()),
        ({"ground_truth": None}, ()),
        ({"ground_truth": None, "locality_ground_truth": None}, ()),
    ],
)
def test_flat_locality_prompt_is_a_neighbour_only_with_the_same_answer(changes, neighbours):
    assert only(FLAT | changes).neighbours == neighbours


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"prompt": None}, "prompt", "is missing"),
        ({"subject": "Louvre"}, "subject", "does not occur in the prompt"),
        ({"target_new": None}, "target_new", "is missing"),
        ({"ground_truth": ["Paris"]}, "ground_truth", "expected text, got list"),
        ({"locality_prompt": ""}, "locality_prompt", "is empty"),
    ],
)
def test_flat_faults_name_the_field_of_the_file(changes, field, message):
    error = refused(FLAT | {"case_id": 4} | changes, "flat")
    assert error.field == field
    assert error.message.startswith(f"facts.json, record 4, field '{field}': ")
    assert message in error.message


def test_short_form_takes_every_field_of_a_request():
    record = SHORT | {
        "target_true": "Paris",
        "paraphrases": ["The Eiffel Tower stands in"],
        "neighbours": ["The Louvre is in"],
        "subject_span": [4, 16],
        "target_space": False,
        "case_id": "eiffel",
        "relation": "P30",
    }
    edit = only(record)
    assert edit == EditRequest(**record, source="facts.json")


@pytest.mark.parametrize("field", ["paraphrases", "neighbours"])
def test_one_prompt_may_stand_without_a_list(field):
    assert getattr(only(SHORT | {field: "The Louvre is in"}), field) == ("The Louvre is in",)


def test_nothing_stands_for_a_field_left_out():
    optional = dict.fromkeys(["target_true", "paraphrases", "neighbours", "subject_span", "target_space", "relation"])
    assert only(SHORT | optional) == only(SHORT)


def test_unknown_field_of_the_short_form_is_refused():
    error = refused(SHORT | {"target_old": "Paris"})
    assert error.field == "target_old"
    assert "facts.json, record 0, field 'target_old': unknown field; known fields are " in error.message
    assert "'target_true'" in error.message


@pytest.mark.parametrize("field", ["prompt", "subject", "target_new"])
def test_short_form_needs_its_three_fields(field):
    record = {name: value for name, value in SHORT.items() if name != field}
    assert (refused(record, "short").field, refused(record, "short").message[-10:]) == (field, "is missing")


@pytest.mark.parametrize("span", [5, "4-16", [4], [0, 3]])
def test_bad_span_costs_one_record_only(span):
    assert refused(SHORT | {"subject_span": span}).field == "subject_span"


@pytest.mark.parametrize(
    ("first", "paraphrases"),
    [(counterfact(), 1), (FLAT, 0), (SHORT | {"paraphrases": ["a", "b"]}, 2), (SHORT | {"ground_truth": "Paris"}, 0)],
)
def test_form_is_recognised_by_the_first_record(first, paraphrases):
    assert len(only(first).paraphrases) == paraphrases


def test_first_record_decides_for_all():
    requests, invalid = parse_records([SHORT, FLAT, counterfact()], "facts.json")
    assert len(requests) == 1
    assert [(record.index, record.case_id) for record in invalid] == [(1, "1"), (2, "3")]


def test_records_that_are_no_records_do_not_decide_the_form():
    requests, invalid = parse_records([None, FLAT], "facts.json")
    assert (len(requests), requests[0].target_true, len(invalid)) == (1, "Paris", 1)


def test_unknown_form_is_refused_with_the_fields_seen():
    with pytest.raises(DataError, match=r"facts\.json: unknown form .* \['answer', 'question'\]\. Known forms: "):
        parse_records([{"question": "?", "answer": "!"}], "facts.json")


@pytest.mark.parametrize("record", ["text", 5, None, ["prompt", "subject"]])
def test_record_that_is_no_mapping_is_skipped(record):
    error = refused(record)
    assert (error.index, error.field) == (0, "(record)")
    assert f"facts.json, record 0: expected a mapping of fields, got {type(record).__name__}" in error.message


@pytest.mark.parametrize("again", [1, "1"])
def test_second_record_with_the_same_case_id_is_refused(again):
    records = [SHORT | {"case_id": 1}, SHORT | {"case_id": again, "target_new": "Oslo"}, SHORT | {"case_id": 2}]
    requests, invalid = parse_records(records, "facts.json")
    assert [(request.case_id, request.target_new) for request in requests] == [(1, "Rome"), (2, "Rome")]
    assert [(record.index, record.field) for record in invalid] == [(1, "case_id")]
    assert "occurs twice" in invalid[0].message


def test_refused_record_does_not_take_its_case_id_away():
    requests, _ = parse_records([SHORT | {"case_id": 1, "subject": "x"}, SHORT | {"case_id": 1}], "facts.json")
    assert [request.case_id for request in requests] == [1]


@pytest.mark.parametrize("case_id", [1.5, None, [1]])
def test_case_id_is_a_number_or_text(case_id):
    assert refused(SHORT | {"case_id": case_id}).message.endswith(f"got {type(case_id).__name__}")


def test_record_without_case_id_gets_its_place():
    assert [request.case_id for request in parse_records([SHORT, SHORT], "facts.json")[0]] == [0, 1]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def json_lines(records):
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"


@pytest.mark.parametrize(
    ("suffix", "dump"),
    [
        (".json", json.dumps),
        (".jsonl", json_lines),
        (".yaml", yaml.safe_dump),
        (".yml", lambda records: yaml.safe_dump(records, allow_unicode=True)),
        (".JSON", json.dumps),
    ],
)
def test_all_file_types_give_the_same_records(tmp_path, suffix, dump):
    records = [SHORT, SHORT | {"target_new": "東京 🙂 {} \u2028x", "paraphrases": ["a"]}]
    assert read_records(write(tmp_path / f"facts{suffix}", dump(records))) == records


def test_byte_order_mark_is_no_part_of_the_text(tmp_path):
    assert read_records(write(tmp_path / "facts.jsonl", b"\xef\xbb\xbf" + json_lines([SHORT]).encode())) == [SHORT]


def test_malformed_line_costs_that_line_only(tmp_path):
    path = write(tmp_path / "facts.jsonl", json.dumps(SHORT) + '\r\n\n{"prompt": \n' + json.dumps(SHORT) + "\n")
    requests, invalid = parse_records(read_records(path), str(path))
    assert [request.case_id for request in requests] == [0, 2]
    assert [(record.index, record.case_id, record.field) for record in invalid] == [(1, None, "(line)")]
    assert invalid[0].message.startswith(f"{path}, line 3: malformed JSON at column ")


def test_malformed_first_line_does_not_decide_the_form(tmp_path):
    path = write(tmp_path / "facts.jsonl", "{\n" + json_lines([FLAT]))
    requests, invalid = parse_records(read_records(path), str(path))
    assert (len(requests), requests[0].target_true, len(invalid)) == (1, "Paris", 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"prompt": }]', r"a\.json: malformed JSON at line 1, column 13: "),
        ("a.json", "", r"a\.json: malformed JSON at line 1, column 1: "),
        ("a.json", "[]", r"a\.json: holds no records"),
        ("a.json", "{}", r"a\.json: expected a list of records, got dict"),
        ("a.jsonl", "", r"a\.jsonl: holds no records"),
        ("a.jsonl", "\n \n", r"a\.jsonl: holds no records"),
        ("a.yaml", "- prompt: [", r"a\.yaml: malformed YAML: "),
        ("a.yaml", "- target_new: 2024-13-45", r"a\.yaml: malformed YAML: month must be in 1\.\.12"),
        ("a.yaml", "", r"a\.yaml: expected a list of records, got NoneType"),
        ("a.yaml", "prompt: x", r"a\.yaml: expected a list of records, got dict"),
        ("a.yaml", "- !!python/object/apply:os.getcwd []", r"a\.yaml: malformed YAML: "),
        ("a.json", b'["caf\xe9"]', r"a\.json: not UTF-8 at byte 5; save the file as UTF-8"),
        ("a.jsonl", b"\xff\xfe", r"a\.jsonl: not UTF-8 at byte 0; save the file as UTF-8"),
        ("a.csv", "prompt,subject", r"a\.csv: unknown file type '\.csv'; expected one of \.json, \.jsonl, "),
        ("a", "[]", r"a: unknown file type ''; expected one of "),
    ],
)
def test_unusable_file_is_refused_by_name(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_records(write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["missing.json", "missing", "facts.txt/x.json"])
def test_missing_file_is_refused(tmp_path, name):
    write(tmp_path / "facts.txt", "")
    with pytest.raises(DataError, match="no such file; give a JSON, JSONL or YAML file"):
        read_records(tmp_path / name)


@pytest.mark.parametrize("text", ["no", "1990", "2024-01-02"])
def test_unquoted_yaml_that_is_no_text_is_refused_not_converted(tmp_path, text):
    lines = f"- {{prompt: Rome is, subject: Rome, target_new: {text}}}"
    requests, invalid = parse_records(read_records(write(tmp_path / "facts.yaml", lines)), "facts.yaml")
    assert (requests, invalid[0].field) == ([], "target_new")
    assert "expected text, got " in invalid[0].message


@pytest.mark.parametrize(
    ("name", "total", "paraphrases", "neighbours"),
    [("counterfact.json", 1600, 2, 10), ("counterfact_easyedit.json", 11600, 0, 1)],
)
def test_published_files_parse_without_loss(data_folder, name, total, paraphrases, neighbours):
    requests, invalid = parse_records(read_records(data_folder / name), name)
    assert invalid == []
    assert len(requests) == total
    assert {(len(request.paraphrases), len(request.neighbours)) for request in requests} == {(paraphrases, neighbours)}
    assert all(request.prompt[slice(*request.span)] == request.subject for request in requests)


ZSRE = {
    "src": "What university did Watts Humphrey attend?", "subject": "Watts Humphrey", "alt": "University of Michigan",
    "answers": ["Illinois Institute of Technology"], "rephrase": "What university did Watts Humphrey take part in?",
    "loc": "nq question: who played desmond doss father in hacksaw ridge", "loc_ans": "Hugo Weaving",
    "cond": "Trinity College >> University of Michigan || What university did Watts Humphrey attend?",
    "portability": {"New Question": "In what city did Watts Humphrey study?", "New Answer": "Ann Arbor"},
}  # fmt: skip
KNOWEDIT = {
    "prompt": "Epaspidoceras belongs to the family of", "subject": "Epaspidoceras", "target_new": "Noctuidae",
    "ground_truth": ["Aspidoceratidae", "Perisphinctidae"],
    "rephrase_prompt": "The family of Epaspidoceras is",
    "locality": {"Relation_Specificity": [{"prompt": "The rank of Epaspidoceras is", "ground_truth": [["genus", "g"]]},
    {"prompt": "Its parent is", "ground_truth": ["order"]}], "Forgetfulness": [{"prompt": "P", "ground_truth": "a"}]},
    "portability": {"Reasoning": [{"prompt": "Its order is", "ground_truth": [["Lepidoptera"], ["other"]]}]},
}  # fmt: skip


def test_zsre_in_its_evaluation_form():
    edit = only(ZSRE)
    assert (edit.prompt, edit.subject, edit.span) == (ZSRE["src"], "Watts Humphrey", (20, 34))
    assert (edit.target_new, edit.target_true) == ("University of Michigan", "Illinois Institute of Technology")
    assert edit.paraphrases == (ZSRE["rephrase"],)
    assert edit.neighbours == ()
    assert edit.locality == (Probe(ZSRE["loc"], "Hugo Weaving"),)
    assert edit.portability == (Probe("In what city did Watts Humphrey study?", "Ann Arbor"),)
    assert only(ZSRE, "zsre") == edit
    assert only({name: ZSRE[name] for name in ("src", "subject", "alt")}).target_true is None


def test_knowedit_with_its_kinds_of_probes():
    edit = only(KNOWEDIT)
    assert (edit.target_new, edit.target_true) == ("Noctuidae", "Aspidoceratidae")
    assert edit.paraphrases == ("The family of Epaspidoceras is",)
    assert edit.locality == (
        Probe("The rank of Epaspidoceras is", "genus", "Relation_Specificity"),
        Probe("Its parent is", "order", "Relation_Specificity"),
        Probe("P", "a", "Forgetfulness"),
    )
    assert edit.portability == (Probe("Its order is", "Lepidoptera", "Reasoning"),)
    assert only(KNOWEDIT, "knowedit") == edit
    assert only(KNOWEDIT | {"rephrase_prompt": None, "rephrase": ["a", "b"]}).paraphrases == ("a", "b")


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        (["Paris", "Rome"], "Paris"),
        (["Rome", "Paris"], "Paris"),
        ([" Rome ", "", " ", "Paris"], "Paris"),
        (["Rome"], None),
        ("Rome", None),
        ("Paris", "Paris"),
        ([], None),
        ([""], None),
        (None, None),
    ],
)
@pytest.mark.parametrize("form", ["zsre", "knowedit"])
def test_of_several_accepted_answers_the_first_that_is_another_one_counts(form, accepted, expected):
    record = {
        "zsre": {"src": "Rome is in", "subject": "Rome", "alt": "Rome", "answers": accepted},
        "knowedit": {"prompt": "Rome is in", "subject": "Rome", "target_new": "Rome", "ground_truth": accepted},
    }[form]
    assert only(record, form).target_true == expected


@pytest.mark.parametrize(
    ("record", "form", "field"),
    [
        ({**ZSRE, "src": None}, "zsre", "src"),
        ({**ZSRE, "alt": None}, "zsre", "alt"),
        ({**ZSRE, "alt": " "}, "zsre", "alt"),
        ({**ZSRE, "alt": 5}, "zsre", "alt"),
        ({**ZSRE, "subject": None}, "zsre", "subject"),
        ({**ZSRE, "subject": "Nobody"}, "zsre", "subject"),
        ({**ZSRE, "answers": 5}, "zsre", "answers"),
        ({**ZSRE, "answers": [5]}, "zsre", "answers"),
        ({**ZSRE, "rephrase": [""]}, "zsre", "rephrase"),
        ({**ZSRE, "rephrase": {"a": 1}}, "zsre", "rephrase"),
        ({**KNOWEDIT, "target_new": None}, "knowedit", "target_new"),
        ({**KNOWEDIT, "prompt": None}, "knowedit", "prompt"),
        ({**KNOWEDIT, "subject": None}, "knowedit", "subject"),
        ({**KNOWEDIT, "ground_truth": {"a": 1}}, "knowedit", "ground_truth"),
        ({**KNOWEDIT, "rephrase_prompt": [5]}, "knowedit", "rephrase_prompt"),
        ({**KNOWEDIT, "locality": ["x"]}, "knowedit", "locality"),
        ({**KNOWEDIT, "portability": {"Reasoning": "text"}}, "knowedit", "portability.Reasoning"),
        ({**KNOWEDIT, "portability": {"Reasoning": ["text"]}}, "knowedit", "portability.Reasoning"),
        ({**KNOWEDIT, "locality": {"Forgetfulness": 5}}, "knowedit", "locality.Forgetfulness"),
    ],
)
def test_zsre_and_knowedit_records_are_refused_by_the_field_as_written(record, form, field):
    good = ZSRE if form == "zsre" else KNOWEDIT
    requests, invalid = parse_records([record, good | {"case_id": "good"}], "facts.json", form)
    assert [request.case_id for request in requests] == ["good"]
    assert [(one.index, one.field) for one in invalid] == [(0, field)]
    assert f"facts.json, record 0, field '{field}'" in invalid[0].message


@pytest.mark.parametrize(
    "changes",
    [
        {"loc": None},
        {"loc_ans": None},
        {"loc": " "},
        {"loc_ans": []},
        {"loc_ans": ""},
        {"portability": None},
        {"portability": "text"},
        {"portability": {}},
        {"portability": {"New Question": "Where?", "New Answer": ""}},
    ],
)
def test_zsre_without_a_whole_probe_has_none(changes):
    edit = only(ZSRE | changes)
    name = "locality" if "portability" not in changes else "portability"
    assert getattr(edit, name) == ()
    assert len(edit.locality) + len(edit.portability) == 1


@pytest.mark.parametrize("kinds", [None, {}, {"Reasoning": []}, {"Reasoning": None}])
def test_knowedit_without_probes_has_none(kinds):
    edit = only(KNOWEDIT | {"portability": kinds})
    assert edit.portability == ()
    assert len(edit.locality) == 3


def test_knowedit_entries_without_prompt_or_answer_are_no_probes():
    entries = [
        {"prompt": "a", "ground_truth": []}, {"prompt": "", "ground_truth": "x"}, {"ground_truth": "x"},
        {"prompt": "b"}, {"prompt": "c", "ground_truth": [[]]}, {"prompt": "d", "ground_truth": [["y", "z"], ["w"]]},
        {"prompt": "e", "ground_truth": 5}, {"prompt": "f", "ground_truth": [["", "z"]]},
    ]  # fmt: skip
    assert only(KNOWEDIT | {"locality": {"K": entries}}).locality == (Probe("d", "y", "K"),)


def test_a_flat_record_is_not_taken_for_knowedit():
    assert only(FLAT).neighbours == ("The Louvre is in",)
    assert only(SHORT | {"locality": [{"prompt": "The tide comes", "answer": "in"}]}).locality == (
        Probe("The tide comes", "in"),
    )


def test_published_zsre_parses_without_loss(data_folder):
    requests, invalid = parse_records(read_records(data_folder / "zsre.json"), "zsre.json")
    assert (len(requests), invalid) == (600, [])
    for name in ("locality", "portability"):
        assert all(len(getattr(request, name)) == 1 for request in requests)
    assert all(request.target_true != request.target_new for request in requests)


def test_published_knowedit_parses_but_for_subjects_that_are_not_in_their_prompts(data_folder):
    records = read_records(data_folder / "knowedit_zsre.json")
    requests, invalid = parse_records(records, "knowedit_zsre.json")
    assert len(requests) + len(invalid) == len(records) == 600
    assert {record.field for record in invalid} <= {"subject"}
    assert all(records[record.index]["subject"] not in records[record.index]["prompt"] for record in invalid)
    assert len(invalid) < 5
    assert all(probe.kind for request in requests for probe in (*request.locality, *request.portability))
