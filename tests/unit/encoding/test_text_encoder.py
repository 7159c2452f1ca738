from dataclasses import replace
from functools import cache, partial
from itertools import accumulate, product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import GPT2TokenizerFast

from rome_pl.encoding.aligned_rows import align
from rome_pl.encoding.encoded_rows import EncodedRow
from rome_pl.encoding.text_encoder import TextEncoder, TokenizerError
from rome_pl.metrics.probes import measure_answers
from rome_pl.requests.edit_request import EditRequest, RequestError
from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer, tiny_language_model

TRAINED = {
    "byte level": byte_level_tokenizer,
    "byte level, BOS": partial(byte_level_tokenizer, bos=True),
    "sentencepiece": sentencepiece_tokenizer,
}
FILES = {"vocab": "vocab.json", "merges": "merges.txt"}
PLACES = ("subject_last", "subject_first", "subject_first_after_last", "last")


@cache
def trained(name):
    return TextEncoder(TRAINED[name](), 512)


@pytest.fixture(scope="module")
def gpt2(data_folder):
    files = {name: str(data_folder / "gpt2_tokenizer" / file) for name, file in FILES.items()}
    return TextEncoder(GPT2TokenizerFast(**files), 512)


@pytest.fixture(scope="module", params=[*TRAINED, "gpt2"])
def encoder(request):
    return request.getfixturevalue("gpt2") if request.param == "gpt2" else trained(request.param)


def property_test(examples=60):
    # The fixtures are read only, so examples may share them; a cold tokenizer is no slow test.
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(derandomize=True, database=None, max_examples=examples, deadline=None, suppress_health_check=checks)


# ---- texts

LETTERS = "aeRst 3é.,'\"{}(-東京はไท서울Ж🙂👍"
WORDS = ["Rome", "the", "Saint-Étienne", "O'Neil", "Danielle Darrieux", "Москва", '"Help!"', "{}", "3", "."]
OTHERS = ["東京", "東京タワー", "巴黎", "กรุงเทพ", "ประเทศไทย", "서울", "서울특별시", "🙂", "👩\u200d🚀", "«Да»"]
ANSWERS = ["violin", " violin", "plays the violin", "1990", "👩\u200d🚀!"]

strings = st.text(LETTERS, min_size=1, max_size=6)
phrases = st.lists(st.one_of(st.sampled_from(WORDS + OTHERS), strings), max_size=4)
joined = st.tuples(st.sampled_from(["", " ", ", "]), phrases).map(lambda pair: pair[0].join(pair[1]))
subjects = st.one_of(st.sampled_from(WORDS + OTHERS), strings.map(str.strip).filter(bool))
answers = st.one_of(st.sampled_from(ANSWERS + WORDS + OTHERS), strings.filter(str.strip))
spaces = st.sampled_from([None, None, True, False])


@st.composite
def edits(draw):
    before, subject, after = draw(joined), draw(subjects), draw(joined)
    return EditRequest(
        prompt=before + subject + after,
        subject=subject,
        subject_span=(len(before), len(before) + len(subject)),
        target_new=draw(answers),
        target_space=draw(spaces),
    )


def edit(prompt, target, subject=None, **fields):
    return EditRequest(prompt=prompt, subject=subject or prompt.strip(), target_new=target, **fields)


def fields(request):
    """What a request was made of."""
    return {**request.content(), "case_id": request.case_id, "source": request.source}


# ---- an oracle that knows nothing of offsets: the bytes of every token


@cache
def byte_of():
    """GPT-2's table of printable stand-ins for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def pieces(encoder, ids):
    """The bytes of every token; a BOS has none, nor has the mark that sentencepiece puts before a text."""
    tokens = encoder.tokenizer.convert_ids_to_tokens(list(ids))
    if encoder is not trained("sentencepiece"):
        return [b"" if token == "<s>" else bytes(byte_of()[letter] for letter in token) for token in tokens]
    texts = []
    for index, token in enumerate(tokens):
        if token.startswith("<0x"):
            texts.append(bytes([int(token[3:5], 16)]))
        else:
            word = token[1:] if index == 1 else token  # the token after the BOS opens with the mark
            texts.append(b"" if token == "<s>" else word.replace("▁", " ").encode())
    return texts


def whole(row):
    return row.ids + row.target[-1:]


def text_of(encoder, row):
    return b"".join(pieces(encoder, whole(row))).decode()


def target_text(encoder, row):
    return b"".join(pieces(encoder, whole(row))[row.first + 1 :]).decode()


def lookup_bytes(encoder, row):
    """Begin and end of the lookup token in the text's bytes."""
    ends = list(accumulate(map(len, pieces(encoder, whole(row)))))
    return ends[row.lookup] - len(pieces(encoder, whole(row))[row.lookup]), ends[row.lookup]


def size(text):
    return len(text.encode())


# ---- ids and targets


@given(edit=edits())
@example(edit=edit("R", "Rome", target_space=False))  # GPT-2 opens "RRome" with a token that holds all of the prompt
@example(edit=edit("Rome ", " violin"))
@property_test(150)
def test_row_is_the_prompt_then_the_target(encoder, edit):
    row = encoder.edit(edit).rows[0]
    bare = edit.prompt.rstrip()
    text = text_of(encoder, row)
    assert text in (edit.prompt + edit.target_new, edit.prompt + " " + edit.target_new)
    assert target_text(encoder, row) == text[len(bare) :]
    assert row.ids[row.first + 1 :] == row.target[:-1]
    assert row.first == len(row.ids) - len(row.target)


@given(edit=edits())
@example(edit=edit("R", "Rome", target_space=False))  # GPT-2 opens "RRome" with a token that holds all of the prompt
@property_test(150)
def test_ids_are_those_of_the_joined_text_unless_a_token_spans_both_sides(encoder, edit):
    row = encoder.edit(edit).rows[0]
    bare = edit.prompt.rstrip()
    joined_ids = tuple(encoder.tokenizer(text_of(encoder, row))["input_ids"])
    if size(bare) in accumulate(map(len, pieces(encoder, joined_ids))):
        assert whole(row) == joined_ids
    else:
        assert row.ids[: row.first + 1] == tuple(encoder.tokenizer(bare)["input_ids"])


@given(edit=edits())
@property_test()
def test_target_ids_decode_to_the_target(encoder, edit):
    row = encoder.edit(edit).rows[0]
    # Sentencepiece's decoder takes the space off a text's first word.
    assert encoder.tokenizer.decode(row.target).strip() == edit.target_new.strip()


@pytest.mark.parametrize("target", ["東京", "北京市", "🙂", "👩‍🚀🙂", "ไทย", "é"])
def test_multibyte_targets_keep_their_ids(encoder, target):
    row = encoder.continuation("The sign says:", target, edit("The sign says:", target, target_space=False))
    # A line break opens no word, so the target's ids after it are those inside a text.
    expected = encoder.tokenizer("\n" + target, add_special_tokens=False)["input_ids"]
    assert row.target == tuple(expected[len(expected) - len(row.target) :])
    assert size(target) == sum(map(len, pieces(encoder, whole(row))[row.first + 1 :]))


def test_target_cut_inside_characters_is_kept_as_ids(encoder):
    row = encoder.continuation("首都は", "東京", edit("首都は", "東京"))
    # Single tokens that are parts of a character: decoding each and encoding it again gives other ids.
    again = [token for part in row.target for token in encoder.tokenizer(encoder.tokenizer.decode([part]))["input_ids"]]
    assert tuple(again) != row.target
    assert target_text(encoder, row) == "東京"


def test_token_that_spans_both_sides_is_split_as_whoever_prompts_would(gpt2):
    row = gpt2.continuation("首都は", "東京", edit("首都は", "東京"))
    assert row.ids[: row.first + 1] == tuple(gpt2.tokenizer("首都は")["input_ids"])
    split = gpt2.continuation("The vio", "lin", edit("The vio", "lin", target_space=False))
    assert whole(split) == tuple(gpt2.tokenizer("The vio")["input_ids"] + gpt2.tokenizer("lin")["input_ids"])
    assert whole(split) != tuple(gpt2.tokenizer("The violin")["input_ids"])


@given(edit=edits())
@property_test()
def test_bos_moves_every_position_by_one(edit):
    without, with_bos = trained("byte level"), trained("byte level, BOS")
    for place, position in product(PLACES, ("subject", "last")):
        plain, opened = (encoder.edit(edit, ("",), place, position) for encoder in (without, with_bos))
        for row, same in zip((*plain.rows, plain.kl_row), (*opened.rows, opened.kl_row), strict=True):
            moved = EncodedRow((1, *row.ids), row.lookup + 1, row.target, row.first + 1)
            assert same == moved


@given(edit=edits())
@example(edit=edit("Rome plays the", "violin", "Rome"))
@property_test()
def test_space_before_or_after_the_boundary_is_the_same_text(encoder, edit):
    row = encoder.continuation(edit.prompt, edit.target_new, edit)
    for space in (" ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", " \ufeff\n"):
        assert encoder.continuation(edit.prompt + space, edit.target_new + space, edit) == row
    forced = replace(edit, target_space=True)
    same = [EditRequest(**{**fields(edit), "target_new": " " + edit.target_new, "target_space": None}), forced]
    assert same[0] == forced
    for request in same:
        row = encoder.continuation(request.prompt, request.target_new, request)
        assert text_of(encoder, row) == f"{edit.prompt} {edit.target_new}"


def test_eos_that_the_tokenizer_appends_is_dropped():
    tokenizer = byte_level_tokenizer()
    ends = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), ends])
    assert tokenizer("Rome")["input_ids"][-1] == 2
    encoder, request = TextEncoder(tokenizer, 512), edit("Rome is in", "Spain", "Rome")
    assert encoder.edit(request) == trained("byte level, BOS").edit(request)
    assert encoder.prompt("Rome") == trained("byte level, BOS").prompt("Rome")


def test_eos_that_the_user_writes_is_kept(encoder):
    end = "<|endoftext|>" if encoder.tokenizer.eos_token == "<|endoftext|>" else "</s>"
    row = encoder.continuation("Rome is in", f"Spain{end}", edit("Rome is in", f"Spain{end}"))
    assert row.target[-1] == encoder.tokenizer.eos_token_id


# ---- the lookup token


def check_lookup(encoder, row, place, begin, end, prompt_end):
    """Byte positions of the subject and of the prompt's end against the lookup token's."""
    first, past = lookup_bytes(encoder, row)
    if place == "subject_last":
        assert first < end <= past
    elif place == "subject_first":
        assert first <= begin < past
    elif place == "last":
        assert past == prompt_end
        assert row.lookup == row.first
    else:
        assert first >= end or past == prompt_end


@pytest.mark.parametrize("place", PLACES)
@given(edit=edits())
@property_test()
def test_lookup_token_stands_where_the_strategy_says(encoder, edit, place):
    row = encoder.edit(edit, fact_token=place).rows[0]
    begin, end = (size(edit.prompt[:edge]) for edge in edit.span)
    check_lookup(encoder, row, place, begin, end, size(edit.prompt.rstrip()))


@given(edit=edits())
@property_test()
def test_token_after_the_subject_follows_its_last(encoder, edit):
    last = encoder.edit(edit, fact_token="subject_last").rows[0]
    after = encoder.edit(edit, fact_token="subject_first_after_last").rows[0]
    assert after.lookup == min(last.lookup + 1, last.first)


CONTEXTS = ("", "Well. ", "東京は. ", "🙂 {} \n. ", "The  end. ")


@given(edit=edits())
@property_test()
def test_contexts_shift_lookup_and_target_with_the_text(encoder, edit):
    for place in PLACES:
        rows = encoder.edit(edit, CONTEXTS, place).rows
        assert len(rows) == len(CONTEXTS)
        for context, row in zip(CONTEXTS, rows, strict=True):
            begin, end = (size(context + edit.prompt[:edge]) for edge in edit.span)
            check_lookup(encoder, row, place, begin, end, size((context + edit.prompt).rstrip()))
            assert text_of(encoder, row) == context + text_of(encoder, rows[0])
            assert target_text(encoder, row) == target_text(encoder, rows[0])


@pytest.mark.parametrize("context", CONTEXTS[1:])
def test_lookup_character_is_the_same_under_every_context(gpt2, context):
    request = edit("The mother tongue of Danielle Darrieux is", "English", "Danielle Darrieux")
    bare, row = gpt2.edit(request, ("", context)).rows
    assert row.ids[row.lookup] == bare.ids[bare.lookup]
    assert gpt2.describe(request, "subject_last") == ("ux", " English")


@pytest.mark.parametrize(
    ("span", "place", "expected"),
    [
        (None, "subject_last", 16),
        (None, "subject_first", 16),
        ((0, 4), "subject_last", 3),
        ((0, 4), "subject_first", 0),
        ((0, 4), "subject_first_after_last", 5),
    ],
)
def test_subject_that_occurs_twice(gpt2, span, place, expected):
    request = edit("Rome outlived Rome and", "Paris", "Rome", subject_span=span)
    begin, end = lookup_bytes(gpt2, gpt2.edit(request, fact_token=place).rows[0])
    assert begin <= expected < end


@pytest.mark.parametrize("place", PLACES)
def test_white_space_before_the_subject_belongs_to_it_with_bos_or_without(place):
    request = edit(" Rome is in", "Spain", " Rome")
    row, same = (trained(name).edit(request, fact_token=place).rows[0] for name in ("byte level", "byte level, BOS"))
    assert same.lookup == row.lookup + 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("position", ["subject", "last"])
def test_divergence_is_taken_at_the_subject_or_at_the_end(encoder, place, position):
    request = edit("The town of Rome lies in", "Spain", "Rome")
    full = encoder.edit(request, fact_token=place, kl_position="last").kl_row
    assert b"".join(pieces(encoder, full.ids)) == b"Rome is a"
    row = encoder.edit(request, fact_token=place, kl_position=position).kl_row
    assert row.target == ()
    assert row.lookup == full.lookup
    assert row.first == (len(full.ids) - 1 if position == "last" else row.lookup)
    assert row.ids == full.ids[: row.first + 1]  # whatever follows cannot matter
    ends = list(accumulate(map(len, pieces(encoder, row.ids))))
    past = ends[row.lookup]
    assert {
        "subject_last": past == 4,
        "subject_first": 1 <= past <= 4 and (row.lookup == 0 or ends[row.lookup - 1] == 0),
        "subject_first_after_last": ends[row.lookup - 1] == 4,
        "last": past == 9,
    }[place]


def test_prompt_is_looked_up_at_its_last_token(encoder):
    row = encoder.prompt("Rome is in")
    assert (row.lookup, row.first, row.target) == (len(row.ids) - 1, len(row.ids) - 1, ())
    assert row.ids == tuple(encoder.tokenizer("Rome is in")["input_ids"])


# ---- the space between prompt and target


@pytest.mark.parametrize(
    ("prompt", "target", "space"),
    [
        ("The mother tongue of Rome is", "Latin", True),
        ("Rome est la capitale de l'Italie et", "Évian", True),
        ("Рим — столица", "Италии", True),
        ("로마는 이탈리아의", "수도이다", True),
        ("She was born in", "1990", True),
        ("The mother tongue is", " Latin", False),
        ("罗马位于", "意大利", False),
        ("ローマは", "イタリア", False),
        ("ローマは", "スペイン", False),
        ("กรุงโรมอยู่ใน", "อิตาลี", False),
        ("罗马位于", "Italy", False),
        ("Rome is in", "意大利", False),
        ("罗马,", "意大利", False),
        ("他说\uff1a", "意大利", False),
        ("他说\uff1a", "Italy", False),
        ("Rome (", "Italy", False),
        ("They call it “", "Rome", False),
        ("They call it «", "Rome", False),
        ("Rome is in the Franco-", "Italian", False),
        ("See /", "usr", True),
        ("See /usr/", "share", False),
        ("It costs $", "5", False),
        ("Rome is big", ".", False),
        ("Rome is big", ", says", False),
        ("Rome is big", "!", False),
        ("Rome is big", "'s", False),
        ("Rome (big", ") is", False),
        ("They said “Rome", "”.", False),
    ],
)
def test_space_belongs_between_words_of_scripts_that_use_it(encoder, prompt, target, space):
    row = encoder.continuation(prompt, target, edit(prompt, target))
    assert target_text(encoder, row) == " " * space + target


@pytest.mark.parametrize("target", ['"Hamlet"', "🙂", "(unknown)", "«Да»"])
def test_space_before_other_signs_follows_the_tokenizer(gpt2, target):
    row = gpt2.continuation("He wrote", target, edit("He wrote", target))
    fused = gpt2.tokenizer.tokenize(f"a {target}")[1] != "Ġ"
    assert fused
    assert target_text(gpt2, row) == " " + target
    tiny = trained("byte level")
    assert tiny.tokenizer.tokenize(f"a {target}")[1] == "Ġ"
    assert target_text(tiny, tiny.continuation("He wrote", target, edit("He wrote", target))) == target


@pytest.mark.parametrize(("prompt", "target"), [("Rome is in", "Italy"), ("罗马位于", "意大利"), ("Rome is big", ".")])
@pytest.mark.parametrize("forced", [True, False])
def test_forced_space_overrides_the_rule(encoder, prompt, target, forced):
    row = encoder.continuation(prompt, target, edit(prompt, target, target_space=forced))
    assert target_text(encoder, row) == " " * forced + target


@pytest.mark.parametrize(("prompt", "target"), [("Rome is in ", "Italy"), ("Rome is in", " Italy")])
def test_space_already_there_is_not_doubled(encoder, prompt, target):
    row = encoder.continuation(prompt, target, edit(prompt, target, target_space=True))
    assert target_text(encoder, row) == " Italy"


# ---- what is refused


@pytest.mark.parametrize("slow", [SimpleNamespace(is_fast=False), SimpleNamespace()])
def test_tokenizer_without_offsets_is_refused(slow):
    with pytest.raises(TokenizerError, match=r"SimpleNamespace gives no character offsets.*load the fast tokenizer"):
        TextEncoder(slow, 512)


def test_row_may_fill_the_model_but_not_exceed_it(encoder):
    request = edit("Rome is in", "Spain and Portugal", "Rome", case_id=9)
    row = encoder.edit(request).rows[0]
    assert TextEncoder(encoder.tokenizer, len(row.ids)).edit(request).rows[0] == row
    shorter = TextEncoder(encoder.tokenizer, len(row.ids) - 1)
    with pytest.raises(RequestError, match=f"record 9, field 'target_new': .* reads {len(row.ids) - 1}; shorten"):
        shorter.edit(request)


@pytest.mark.parametrize("field", ["paraphrases", "neighbours"])
def test_probe_that_the_model_cannot_read_is_refused(field):
    encoder = TextEncoder(byte_level_tokenizer(), 60)
    encoder.check_probes(edit("Rome is in", "Spain", "Rome", **{field: ["A town"]}))
    with pytest.raises(RequestError, match="the model reads 60; shorten"):
        encoder.check_probes(edit("Rome is in", "Spain", "Rome", **{field: ["A town", "A big town " * 20]}))


def test_unknown_strategy_is_refused(encoder):
    with pytest.raises(ValueError, match=r"fact_token is 'middle'; expected one of .*'subject_last'"):
        encoder.edit(edit("Rome is in", "Spain", "Rome"), fact_token="middle")


@pytest.mark.parametrize("contexts", [(), ("Well. ",), ("Well. ", "")])
def test_first_context_is_the_bare_prompt(encoder, contexts):
    with pytest.raises(ValueError, match="first context must be the empty text"):
        encoder.edit(edit("Rome is in", "Spain", "Rome"), contexts)


# ---- aligning


@st.composite
def rows(draw):
    ids = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=8)))
    target = tuple(draw(st.lists(st.integers(0, 9), max_size=len(ids))))
    first = len(ids) - max(len(target), 1)
    return EncodedRow(ids, draw(st.integers(0, len(ids) - 1)), target, first)


@given(batch=st.lists(rows(), min_size=1, max_size=6), pad_id=st.integers(0, 9))
@property_test(200)
def test_aligned_batch_holds_what_its_rows_hold(batch, pad_id):
    aligned = align(batch, pad_id)
    assert aligned.input_ids.shape == aligned.attention_mask.shape == aligned.position_ids.shape
    assert aligned.prefix + aligned.suffix == aligned.input_ids.shape[1]
    for index, row in enumerate(batch):
        alone = align([row], pad_id)
        begin = aligned.prefix - row.lookup
        columns = slice(begin, begin + len(row.ids))
        predicts = aligned.predict_row == index
        assert aligned.input_ids[index, columns].tolist() == alone.input_ids[0].tolist() == list(row.ids)
        assert aligned.position_ids[index, columns].tolist() == alone.position_ids[0].tolist() == [*range(len(row.ids))]
        assert (aligned.predict_column[predicts] - begin).tolist() == alone.predict_column.tolist()
        assert alone.predict_column.tolist() == [row.first + step for step in range(len(row.target))]
        assert aligned.labels[predicts].tolist() == alone.labels.tolist() == list(row.target)
        assert aligned.input_ids[index].tolist().count(pad_id) >= aligned.input_ids.shape[1] - len(row.ids)
        assert (aligned.position_ids[index] >= 0).all()


@given(batch=st.lists(rows(), min_size=1, max_size=6))
@property_test()
def test_only_padding_on_the_left_is_masked(batch):
    aligned = align(batch, 0)
    for row, mask in zip(batch, aligned.attention_mask.tolist(), strict=True):
        begin = aligned.prefix - row.lookup
        assert mask == [0] * begin + [1] * (len(mask) - begin)


@given(edit=edits())
@property_test()
def test_lookup_tokens_of_an_edit_share_a_column(encoder, edit):
    encoded = encoder.edit(edit, CONTEXTS, kl_position="last")
    batch = (*encoded.rows, encoded.kl_row)
    aligned = align(batch, encoder.pad_id)
    assert aligned.input_ids[:, aligned.prefix].tolist() == [row.ids[row.lookup] for row in batch]
    assert aligned.labels.tolist() == [token for row in batch for token in row.target]


# ---- through a model


@cache
def model(family):
    return tiny_language_model(family)


def plain_log_prob(language_model, row):
    """The same by an unpadded forward over the whole text."""
    ids = torch.tensor([whole(row)])
    with torch.no_grad():
        log_probs = language_model.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    begin = len(row.ids) + 1 - len(row.target)
    return float(torch.stack([log_probs[begin + t - 1, token] for t, token in enumerate(row.target)]).mean())


def target_log_probs(language_model, rows):
    """Mean log-probability of each row's target tokens."""
    return torch.tensor([answer.log_prob for answer in measure_answers(language_model, rows)], dtype=torch.float64)


def short_rows(language_model, requests, place="subject_last"):
    found = [language_model.encoder.edit(request, fact_token=place).rows[0] for request in requests]
    assume(all(len(row.ids) < 100 for row in found))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@given(requests=st.lists(edits(), min_size=1, max_size=6), place=st.sampled_from(PLACES))
@property_test(15)
def test_batch_scores_are_those_of_a_plain_unpadded_forward(family, requests, place):
    language_model = model(family)
    batch = short_rows(language_model, requests, place)
    expected = torch.tensor([plain_log_prob(language_model, row) for row in batch], dtype=torch.float64)
    torch.testing.assert_close(target_log_probs(language_model, batch), expected, rtol=0, atol=1e-9)


@given(requests=st.lists(edits(), min_size=2, max_size=6))
@property_test(15)
def test_batch_of_many_scores_as_many_batches_of_one(requests):
    language_model = model("llama")
    batch = short_rows(language_model, requests)
    alone = torch.cat([target_log_probs(language_model, [row]) for row in batch])
    torch.testing.assert_close(target_log_probs(language_model, batch), alone, rtol=0, atol=1e-10)


@given(requests=st.lists(edits(), min_size=2, max_size=6), random=st.randoms(use_true_random=False))
@property_test(15)
def test_order_of_rows_changes_no_score(requests, random):
    language_model = model("llama")
    batch = short_rows(language_model, requests)
    order = random.sample(range(len(batch)), len(batch))
    shuffled = target_log_probs(language_model, [batch[index] for index in order])
    torch.testing.assert_close(shuffled, target_log_probs(language_model, batch)[order], rtol=0, atol=1e-10)


def test_more_rows_than_one_forward_takes_keep_their_order():
    language_model = model("llama")
    words = ["in", "at Rome", "for many years the", "by"]
    requests = [edit(f"The town {number} lies {words[number % 4]}", "Spain") for number in range(70)]
    batch = [language_model.encoder.edit(request).rows[0] for request in requests]
    scores = target_log_probs(language_model, batch)
    for index in (0, 1, 2, 63, 64, 69):
        assert scores[index] == pytest.approx(plain_log_prob(language_model, batch[index]), abs=1e-9)


@pytest.mark.parametrize(
    ("prompt", "target", "joined_text"),
    [
        ("plays the ", " violin", "plays the violin"),  # one space, not two
        ("plays the", "  violin", "plays the violin"),
        ("Question?\nAnswer:\n", "violin", "Question?\nAnswer: violin"),
        ("What year?", "1990", "What year? 1990"),
        ("the parents'", "house", "the parents' house"),
        ("He said '", "hello", "He said 'hello"),
        ('He said "', "hello", 'He said "hello'),
        ('He said "so"', "hello", 'He said "so" hello'),
        ("书名《", "Rome", "书名《Rome"),
        ("ﾛｰﾏ", "ﾛｰﾏ", "ﾛｰﾏﾛｰﾏ"),
        ("Price: $", "5", "Price: $5"),
    ],
)
def test_text_decides_what_joins_prompt_and_target(prompt, target, joined_text, encoder):
    request = EditRequest(prompt=prompt, subject=prompt.split()[0], target_new=target)
    row = encoder.continuation(prompt, target, request)
    assert [*row.ids, row.target[-1]] == encoder.tokenizer(joined_text)["input_ids"]


def test_an_error_names_the_field_whose_text_is_too_long():
    encoder = TextEncoder(byte_level_tokenizer(), 30)
    long = "word " * 40
    base = {"prompt": "Rome is in", "subject": "Rome", "target_new": "Peru"}
    for field, values in (
        ("paraphrases", {"paraphrases": [long]}),
        ("target_true", {"target_true": long}),
        ("target_new", {"target_new": long}),
    ):
        with pytest.raises(RequestError, match=f"field '{field}'.*the model reads 30"):
            encoder.check_probes(EditRequest(**{**base, **values}))


def test_positions_of_padding_stay_within_the_longest_row(tokenizer):
    """A row whose lookup token comes late beside one with a long rest makes a batch longer than either."""
    encoder = TextEncoder(tokenizer, 64)
    late = encoder.prompt("word " * 20)
    early = EncodedRow(late.ids, 1, (), len(late.ids) - 1)
    aligned = align([late, early], encoder.pad_id)
    assert aligned.input_ids.shape[1] > len(late.ids)
    assert int(aligned.position_ids.max()) == len(late.ids) - 1
