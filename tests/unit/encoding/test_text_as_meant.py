"""Lookup tokens and targets under tokenizers of every kind, against the tokens' own texts."""

from functools import cache
from itertools import accumulate

import pytest
from tokenizers import normalizers

from rome_pl.encoding.text_encoder import TextEncoder
from rome_pl.requests.edit_request import EditRequest, RequestError
from tests.tiny import (
    byte_level_tokenizer,
    prefixing_tokenizer,
    sentencepiece_tokenizer,
    unigram_tokenizer,
    word_tokenizer,
)
from tests.unit.encoding.test_text_encoder import byte_of

TOKENIZERS = {
    "byte level": byte_level_tokenizer,
    "byte level, BOS": lambda: byte_level_tokenizer(bos=True),
    "byte level, prefix": prefixing_tokenizer,
    "byte level, NFC": lambda: prefixing_tokenizer(normalizers.NFC()),
    "byte level, NFD": lambda: prefixing_tokenizer(normalizers.NFD()),
    "sentencepiece": sentencepiece_tokenizer,
    "unigram": unigram_tokenizer,
    "unigram, first": lambda: unigram_tokenizer("first"),
    "unigram, never": lambda: unigram_tokenizer("never"),
    "unigram, unknown": lambda: unigram_tokenizer(byte_fallback=False),
    "word piece": word_tokenizer,
}
EXACT = ("byte level", "byte level, BOS", "sentencepiece", "unigram", "unigram, first", "unigram, never")
"""Those whose texts come back from their tokens as they were."""

EDGES = [" ", "\n", "\t", "\u00a0", "\u3000", "\u200b", "\r\n ", "\ufeff"]
FACTS = [
    ("The city of Rome is in", "Rome", "Spain"),
    ("The city of Zürich is in", "Zürich", "Spain"),
    ("Cafe\u0301 Paris is in", "Cafe\u0301", "Rome"),
    ("在东京的", "东京", "大阪"),
    ("\U0001f469\u200d\U0001f680 flies to", "\U0001f469\u200d\U0001f680", "Rome"),
    ("Rome", "Rome", "-27 degrees"),
]


@pytest.fixture(scope="module", params=TOKENIZERS)
def encoder(request):
    return _encoder(request.param)


@cache
def _encoder(name):
    return TextEncoder(TOKENIZERS[name](), 512)


def token_bytes(encoder, ids):
    """The bytes of every token; the mark that opens a text has none."""
    pieces = []
    for token in encoder.tokenizer.convert_ids_to_tokens(list(ids)):
        if token.startswith("<0x"):
            pieces.append(bytes([int(token[3:5], 16)]))
        elif token in ("<s>", "</s>"):
            pieces.append(b"")
        elif encoder in map(_encoder, ("byte level", "byte level, BOS")):
            pieces.append(bytes(byte_of()[letter] for letter in token))
        else:
            pieces.append(token.replace("▁", " ").encode())
    opening = next(place for place, piece in enumerate(pieces) if piece)
    return [piece[place == opening and piece.startswith(b" ") :] for place, piece in enumerate(pieces)]


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("fact", FACTS, ids=range(len(FACTS)))
def test_white_space_at_the_edges_changes_no_token(encoder, fact, edge):
    prompt, subject, target = fact
    if encoder is _encoder("unigram, unknown") and prompt.startswith("在"):
        pytest.skip("one token for all that is unknown: nothing tells prompt and target apart")
    plain = encoder.edit(EditRequest(prompt=prompt, subject=subject, target_new=target), ("", "Well. "))
    for edges in ((prompt + edge, subject, target), (prompt, subject + edge, target), (prompt, subject, target + edge)):
        named = dict(zip(("prompt", "subject", "target_new"), edges, strict=True))
        assert encoder.edit(EditRequest(**named), ("", "Well. ")) == plain
    assert (
        encoder.edit(EditRequest(prompt=edge + prompt, subject=edge + subject, target_new=target), ("", "Well. "))
        == plain
    )


@pytest.mark.parametrize("fact", FACTS, ids=range(len(FACTS)))
@pytest.mark.parametrize("place", ["subject_last", "subject_first"])
def test_the_lookup_token_shares_a_letter_with_the_subject(encoder, fact, place):
    prompt, subject, target = fact
    request = EditRequest(prompt=prompt, subject=subject, target_new=target)
    try:
        row = encoder.edit(request, fact_token=place).rows[0]
    except RequestError as error:  # one token for all that is unknown: nothing tells prompt and target apart
        assert encoder is _encoder("unigram, unknown")
        assert "merges" in str(error)  # noqa: PT017
        return
    assert encoder.tokenizer.decode([row.ids[row.lookup]]).strip()
    if encoder in map(_encoder, EXACT):
        ends = list(accumulate(map(len, token_bytes(encoder, row.ids))))
        begin, end = (len(prompt[:edge].encode()) for edge in request.span)
        first, past = ends[row.lookup] - len(token_bytes(encoder, row.ids)[row.lookup]), ends[row.lookup]
        if place == "subject_last":
            assert first < end <= past
        else:
            assert first <= begin < past


def test_a_span_that_ends_in_white_space_is_not_looked_up_at_the_next_word(encoder):
    """As a request would be that came around the door: the encoder looks at what is shared, not at where it ends."""
    request = EditRequest(prompt="The city of Rome is in", subject="Rome", target_new="Spain")
    plain = encoder.edit(request).rows[0].lookup
    object.__setattr__(request, "subject_span", (12, 17))
    assert encoder.edit(request).rows[0].lookup == plain
    object.__setattr__(request, "subject_span", (11, 16))
    assert encoder.edit(request, fact_token="subject_first").rows[0].lookup <= plain


@pytest.mark.parametrize(("prompt", "target"), [("Cafe", "\u0301a"), ("I eat at Cafe", "\u0301")])
def test_a_target_that_opens_with_an_accent_leaves_the_prompt_s_tokens_alone(encoder, prompt, target):
    request = EditRequest(prompt=prompt, subject="Cafe", target_new=target)
    alone = tuple(encoder.tokenizer(prompt)["input_ids"])
    try:
        row = encoder.edit(request).rows[0]
    except RequestError as error:
        assert any(said in str(error) for said in ("merges", "no token of its own"))  # noqa: PT017
        return
    assert row.ids[: row.first + 1] == alone
    assert row.lookup == len(alone) - 1


@pytest.mark.parametrize(
    ("prompt", "target", "text"),
    [
        ("The coldest day in Oslo was", "-27 degrees", " -27 degrees"),
        ("It is written for", ".NET", " .NET"),
        ("Ringo Starr was the drummer of", "'N Sync", " 'N Sync"),
        ("Oslo \u2013", "Norway", " Norway"),
        ("Rome is big", ".", "."),
        ("the band", "'s drummer", "'s drummer"),
        ("It was 3", ".14", ".14"),
    ],
)
@pytest.mark.parametrize("name", ["byte level", "byte level, BOS"])
def test_the_target_s_tokens_are_those_of_the_joined_text(name, prompt, target, text):
    encoder = _encoder(name)
    request = EditRequest(prompt=prompt, subject=prompt.split()[0], target_new=target)
    row = encoder.edit(request).rows[0]
    assert encoder.tokenizer.decode(row.target) == text
    assert [*row.ids, row.target[-1]] == encoder.tokenizer(prompt + text)["input_ids"]
    for forced in (True, False):
        request = EditRequest(prompt=prompt, subject=prompt.split()[0], target_new=target, target_space=forced)
        assert encoder.tokenizer.decode(encoder.edit(request).rows[0].target) == " " * forced + target


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("subject", {"prompt": "<new> is in", "subject": "<new>"}),
        ("target_new", {"target_new": "<new>"}),
        ("target_new", {"prompt": "Rome of <new> is"}),
        ("paraphrases", {"paraphrases": ["In <new>"]}),
        ("neighbours", {"neighbours": ["In <new>"], "target_true": "Peru"}),
        ("locality", {"locality": [{"prompt": "a", "answer": "<new>"}]}),
        ("portability", {"portability": [{"prompt": "<new>", "answer": "a"}]}),
        ("generation_prompts", {"generation_prompts": ["<new> is"]}),
    ],
)
def test_a_token_beyond_the_embedding_is_refused_for_that_record(field, values):
    tokenizer = byte_level_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    request = EditRequest(**{"prompt": "Rome is in", "subject": "Rome", "target_new": "Spain", "case_id": 9} | values)

    def encode(encoder):
        encoder.edit(request)
        encoder.check_probes(request)

    encode(TextEncoder(tokenizer, 512, embedded=rows + 1))
    encode(TextEncoder(tokenizer, 512))
    with pytest.raises(
        RequestError, match=f"record 9, field '(target_new|{field})': the token '<new>' has number {rows}"
    ):
        encode(TextEncoder(tokenizer, 512, embedded=rows))
