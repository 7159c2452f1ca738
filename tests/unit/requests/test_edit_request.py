import pytest

from rome_pl.requests.edit_request import EditRequest, RequestError, locate_subject

FIELDS = {"prompt": "The Eiffel Tower is in", "subject": "Eiffel Tower", "target_new": "Rome"}


def request(**fields):
    return EditRequest(**FIELDS | {"case_id": 7, "source": "facts.json"} | fields)


@pytest.mark.parametrize(
    ("prompt", "subject", "start"),
    [
        ("Rome is in", "Rome", 0),
        ("I love Rome", "Rome", 7),
        ("Rome", "Rome", 0),
        ("Rome outlived Rome, says", "Rome", 14),
        ("In Rome, as in Rome, one", "Rome", 15),
        ("Rome, the romance of Rome in Romea", "Rome", 21),
        ("The art of Art was art", "Art", 11),
        ("Rome beats Romea", "Rome", 0),
        ("Rome beats aRome", "Rome", 0),
        ("Romea and Romeo", "Rome", 10),
        ("Rome2 follows Rome_ and", "Rome", 14),
        ("banananana", "anana", 5),
        ("ana anana is", "ana", 0),
        ("a.a.a.", "a.a.", 2),
        ('"Rome" is in', "Rome", 1),
        ('The song "Rome" is by', '"Rome"', 9),
        ("Rome\u2019s mayor", "Rome", 0),
        ("O'Neil's and O'Neil", "O'Neil", 13),
        ("{} and {Rome} are", "{Rome}", 7),
        ("{} is {}", "{}", 6),
        ("日本の首都は東京です。東京は", "東京", 11),
        ("在东京的", "东京", 1),
        ("Москва — столица", "Москва", 0),
        ("👍 and 👩‍🚀 fly", "👩‍🚀", 6),
        ("🙂🙂", "🙂", 1),
        ("C++ and C", "C++", 0),
    ],
)
def test_subject_is_its_last_whole_word_else_its_last_occurrence(prompt, subject, start):
    assert locate_subject(prompt, subject) == (start, start + len(subject))
    assert EditRequest(prompt=prompt, subject=subject, target_new="x").span == (start, start + len(subject))


@pytest.mark.parametrize(("prompt", "subject"), [("rome is in", "Rome"), ("Rom", "Rome"), ("Cafe\u0301 is", "Café")])
def test_subject_is_searched_to_the_letter(prompt, subject):
    assert locate_subject(prompt, subject) is None


def test_error_names_file_record_field_and_remedy():
    with pytest.raises(
        RequestError, match=r"^facts\.json, record 7, field 'subject': 'Paris' .*, or give subject_span"
    ):
        request(subject="Paris")


def test_error_keeps_its_parts():
    error = request().error("target_new", "is too long")
    assert (error.field, error.message, error.case_id, error.source) == ("target_new", "is too long", 7, "facts.json")
    assert str(RequestError("prompt", "is bad")) == "field 'prompt': is bad"


@pytest.mark.parametrize("field", ["prompt", "subject", "target_new", "paraphrases", "neighbours"])
@pytest.mark.parametrize("empty", ["", "  ", "\n\t", "\u3000", "\u200b", "\ufeff \u2060"])
def test_empty_text_is_refused(field, empty):
    value = ["fine", empty] if field in ("paraphrases", "neighbours") else empty
    with pytest.raises(RequestError, match=f"record 7, field '{field}': is empty; give the text or remove"):
        request(**{field: value})


@pytest.mark.parametrize("field", ["prompt", "subject", "target_new", "target_true"])
@pytest.mark.parametrize(("value", "kind"), [(5, "int"), (True, "bool"), (["Rome"], "list"), (b"Rome", "bytes")])
def test_anything_but_text_is_refused(field, value, kind):
    with pytest.raises(RequestError, match=f"record 7, field '{field}': expected text, got {kind}"):
        request(**{field: value})


@pytest.mark.parametrize("field", ["prompt", "subject", "target_new"])
def test_nothing_is_no_text(field):
    with pytest.raises(RequestError, match=f"record 7, field '{field}': expected text, got NoneType"):
        request(**{field: None})


@pytest.mark.parametrize("field", ["paraphrases", "neighbours"])
@pytest.mark.parametrize(("value", "kind"), [("A prompt", "str"), (5, "int"), ({"a": 1}, "dict"), (None, "NoneType")])
def test_prompts_must_be_a_list(field, value, kind):
    with pytest.raises(RequestError, match=f"record 7, field '{field}': expected a list of prompts, got {kind}"):
        request(**{field: value})


@pytest.mark.parametrize("field", ["paraphrases", "neighbours"])
def test_every_prompt_of_a_list_must_be_text(field):
    with pytest.raises(RequestError, match=f"record 7, field '{field}': expected text, got int"):
        request(**{field: ["fine", 5]})


def test_lists_of_prompts_become_tuples():
    edit = request(paraphrases=["a", "b"], neighbours=["c"])
    assert (edit.paraphrases, edit.neighbours) == (("a", "b"), ("c",))


@pytest.mark.parametrize("true", ["Rome", " Rome", "Rome\n"])
def test_edit_to_the_same_answer_is_refused(true):
    with pytest.raises(RequestError, match="record 7, field 'target_new': equals target_true: there is nothing"):
        request(target_true=true)


@pytest.mark.parametrize("value", ["yes", 1, 0])
def test_target_space_is_true_false_or_nothing(value):
    with pytest.raises(RequestError, match=r"record 7, field 'target_space': expected true, false or nothing, got "):
        request(target_space=value)


def test_given_span_overrides_the_search():
    edit = EditRequest(prompt="Rome outlived Rome", subject="Rome", target_new="x", subject_span=[0, 4])
    assert edit.span == (0, 4)


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ((0,), "expected two character positions"),
        ((4, 16, 20), "expected two character positions"),
        ((4.0, 16.0), "expected two character positions"),
        (("4", "16"), "expected two character positions"),
        ("4-16", "expected two character positions"),
        (5, "expected two character positions"),
        ((-1, 16), "lies outside the prompt of 22 characters"),
        ((16, 4), "lies outside the prompt"),
        ((4, 4), "lies outside the prompt"),
        ((4, 23), "lies outside the prompt"),
        ((3, 15), "covers ' Eiffel Towe', but the subject is 'Eiffel Tower'"),
        ((True, 16), "expected two character positions"),
        ((0, 3), "covers 'The', but the subject is 'Eiffel Tower'"),
    ],
)
def test_given_span_must_cover_the_subject(span, message):
    with pytest.raises(RequestError, match=f"facts.json, record 7, field 'subject_span': .*{message}"):
        request(subject_span=span)


@pytest.mark.parametrize("text", ["{}", "{", "}", "{0} {x!r:>{y}}", "%s %(x)d", "{{}}"])
def test_braces_and_percent_signs_are_plain_text(text):
    edit = EditRequest(prompt=f"In {text}, Rome is", subject="Rome", target_new=text, paraphrases=[text])
    assert (edit.prompt, edit.target_new, edit.paraphrases) == (f"In {text}, Rome is", text, (text,))
    assert edit.prompt[slice(*edit.span)] == "Rome"


@pytest.mark.parametrize("field", ["prompt", "subject", "target_new", "target_true", "paraphrases"])
def test_half_a_character_is_refused(field):
    values = {"prompt": "Rome is", "subject": "Rome", "target_new": "old"}
    broken = "Rome \ud800 is"
    with pytest.raises(RequestError, match=f"'{field}': holds half a character"):
        EditRequest(**values | {field: [broken] if field == "paraphrases" else broken})
