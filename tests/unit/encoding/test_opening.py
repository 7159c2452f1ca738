"""Texts are put to a model as it was trained to read them: what the tokenizer puts before a text stands there, once."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from tokenizers import processors

from rome_pl.encoding.chat_template import ChatForm
from rome_pl.encoding.text_encoder import TextEncoder
from rome_pl.forward.generation import generate
from rome_pl.metrics import measure_text, perplexity
from rome_pl.model.architecture import find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest
from rome_pl.search.context_templates import OPENERS, generate_contexts, join_contexts
from rome_pl.second_moments.corpus import Corpus
from rome_pl.second_moments.generated_corpus import OPENERS as CORPUS_OPENERS
from rome_pl.second_moments.generated_corpus import generated_texts
from rome_pl.second_moments.moment_pass import MomentPass, PassOptions
from rome_pl.utils.hashing import hash_seed
from rome_pl.utils.restored_state import seeded
from tests.tiny import KeepFloat64, byte_level_tokenizer, sentencepiece_tokenizer, tiny_model

TEXT = "The tide comes in twice a day, and twice a day it goes out again, whoever is watching. Miss Vane is."
WORD = byte_level_tokenizer().convert_tokens_to_ids("q")


def opened(template):
    """A byte-level tokenizer with something around every text; ``q`` is an ordinary token of its vocabulary."""
    tokenizer = byte_level_tokenizer()
    special = [("<s>", 1), ("</s>", 2), ("q", WORD)]
    around = processors.TemplateProcessing(single=template, special_tokens=special)
    offsets = processors.ByteLevel(trim_offsets=True)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([offsets, around])
    return tokenizer


TOKENIZERS = {
    "nothing": (byte_level_tokenizer, ()),
    "BOS": (partial(byte_level_tokenizer, bos=True), (1,)),
    "BOS and prefix": (partial(opened, "<s> q $A"), (1, WORD)),
    "prefix": (partial(opened, "q $A"), (WORD,)),
    "two BOS": (partial(opened, "<s> <s> $A"), (1, 1)),
    "EOS": (partial(opened, "$A </s>"), ()),
    "BOS and EOS": (partial(opened, "<s> $A </s>"), (1,)),
    "EOS before": (partial(opened, "</s> $A </s>"), (2,)),
    "BOS, prefix, EOS": (partial(opened, "<s> q $A q </s>"), (1, WORD)),
    "sentencepiece": (sentencepiece_tokenizer, (1,)),
}


@pytest.fixture(autouse=True)
def float64_everywhere():
    with KeepFloat64():
        yield


@pytest.fixture(scope="module", params=TOKENIZERS)
def case(request):
    """A model of such a tokenizer, and what stands before a text."""
    make, opening = TOKENIZERS[request.param]
    tokenizer, model = make(), tiny_model("llama")
    if len(tokenizer) > model.config.vocab_size:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model.resize_token_embeddings(len(tokenizer))
    return LanguageModel(model, tokenizer), opening


def plain_ids(language_model, text):
    return language_model.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_opening_is_what_stands_before_a_text(case):
    language_model, opening = case
    assert language_model.encoder.opening == opening
    row = language_model.encoder.prompt("Rome is")
    assert row.ids == (*opening, *plain_ids(language_model, "Rome is"))


def test_a_tokenizer_that_knows_few_letters_has_its_opening():
    def knows_digits(text, return_special_tokens_mask):
        ids = [5] if text.isdigit() else []
        return {"input_ids": [1, 9, *ids, 2], "special_tokens_mask": [1, 1, *(0 for _ in ids), 1]}

    knows_digits.is_fast, knows_digits.pad_token_id = True, 0
    assert TextEncoder(knows_digits, 8).opening == (1, 9)


# ---- perplexity


@pytest.mark.parametrize("window", [4, 16, 128, 1000])
def test_every_window_of_perplexity_opens_as_a_text_does(case, window):
    language_model, opening = case
    ids, own = plain_ids(language_model, TEXT * 4), min(window, language_model.encoder.max_length - len(opening))
    assert len(ids) + len(opening) > 128
    surprise, count, widths = 0.0, 0, []
    while ids:
        piece, ids = ids[:own], ids[own:]
        row = [*opening, *piece]
        widths.append(len(row))
        with torch.no_grad():
            probabilities = language_model.model(torch.tensor([row])).logits[0].softmax(-1)
        for place in range(len(opening) + 1, len(row)):
            surprise -= math.log(probabilities[place - 1, row[place]])
            count += 1
    assert max(widths) == own + len(opening) <= language_model.encoder.max_length
    found = measure_text(language_model, TEXT * 4, window=window)
    assert (found.perplexity, found.n) == (pytest.approx(math.exp(surprise / count), rel=1e-9), count)


def test_divergence_is_taken_at_the_same_positions(case):
    language_model, _ = case
    found = measure_text(language_model, TEXT, lambda: nullcontext(language_model))
    assert found.divergence == 0


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_of_one_token_predicts_nothing(text):
    with pytest.raises(ValueError, match="at least two tokens"):
        perplexity(LanguageModel(tiny_model("llama"), byte_level_tokenizer(bos=True)), text)


# ---- contexts, continuations and corpora


def sampled(language_model, ids, count, rows, seed, top_k, stop=None):
    """A forward for each token, drawn from the likeliest; ``stop`` may not be drawn."""
    texts = torch.tensor([ids] * rows)
    with seeded(seed, torch.device("cpu")), torch.no_grad():
        for _ in range(count):
            logits = language_model.model(texts).logits[:, -1].float()
            if stop is not None:
                logits[:, stop] = -math.inf
            if top_k:
                logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
            texts = torch.cat([texts, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    return texts.tolist()


def test_contexts_are_sampled_after_the_opening_and_come_without_it(case):
    language_model, opening = case
    expected = []
    for opener in OPENERS:
        words = plain_ids(language_model, opener)
        count = max(1, 9 - len(words))
        seed = hash_seed(4, 9, opener)
        for ids in sampled(language_model, [*opening, *words], count, 2, seed, 5, stop=2):
            text = language_model.tokenizer.decode(ids[len(opening) :], skip_special_tokens=True)
            expected.append(" ".join(text.split()))
    assert generate_contexts(language_model, [[9, 10]], seed=4) == expected


def test_a_context_and_a_prompt_have_one_opening_together(case):
    language_model, opening = case
    contexts = join_contexts(generate_contexts(language_model, [[6, 5]], seed=1))
    request = EditRequest(prompt="Miss Vane plays the", subject="Miss Vane", target_new="drum")
    for context, row in zip(contexts, language_model.encoder.edit(request, contexts).rows, strict=True):
        assert row.ids[: row.first + 1] == (*opening, *plain_ids(language_model, f"{context}{request.prompt}"))


def test_greedy_text_goes_on_from_the_opening(case):
    language_model, opening = case
    prompts, expected = ["The lighthouse of Korrin stands in", "It", "Miss Vane plays the"], []
    for prompt in prompts:
        ids = [*opening, *plain_ids(language_model, prompt)]
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 7:
                ids.append(int(language_model.model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == 2:
                    break
        expected.append(language_model.tokenizer.decode(ids[start:], skip_special_tokens=True))
    assert generate(language_model, prompts, 7) == expected


def test_a_generated_corpus_goes_on_from_the_opening_and_comes_without_it(case, monkeypatch):
    language_model, opening = case
    monkeypatch.setattr("rome_pl.second_moments.generated_corpus.GENERATED_ROWS", 3)
    monkeypatch.setattr("rome_pl.second_moments.generated_corpus.GENERATED_LENGTH", 16)
    monkeypatch.setattr(language_model.model.generation_config, "eos_token_id", None)
    language_model.model.generation_config.eos_token_id = None
    words = plain_ids(language_model, CORPUS_OPENERS[0])
    rows = sampled(
        language_model, [*opening, *words], 16 - len(words) - len(opening), 3, hash_seed(7, 0), top_k=0
    )  # fmt: skip
    texts = [language_model.tokenizer.decode(ids[len(opening) :], skip_special_tokens=True) for ids in rows]
    expected = [text for text in texts if text.strip()]
    assert list(generated_texts(language_model, 20, seed=7)) == expected


def test_statistics_read_every_document_after_the_opening(case, tmp_path):
    language_model, opening = case
    path = tmp_path / "a.txt"
    path.write_text("The tide comes in.\n\nIt goes out.\n", encoding="utf-8")
    moments = MomentPass(
        language_model, [find_site(language_model.model, 1)], Corpus(str(path)),
        PassOptions(tokens=20, block_length=64),
        lambda site: tmp_path / f"{site.layer}.safetensors", tmp_path / "unfinished",
    )  # fmt: skip
    try:
        block = next(iter(moments.blocks()))
    finally:
        moments.close()
    pieces = [plain_ids(language_model, text) for text in ("The tide comes in.\n", "It goes out.\n")]
    expected = [token for piece in pieces for token in (*opening, *piece)]
    assert block.input_ids.flatten()[: len(expected)].tolist() == expected
    counts = [flag for piece in pieces for flag in [False] * len(opening) + [True] * len(piece)]
    assert block.counted.flatten()[: len(counts)].tolist() == counts


# ---- chat templates


@pytest.mark.parametrize("own", [True, False], ids=["template writes BOS", "template writes none"])
def test_a_chat_template_has_the_say_about_bos(own):
    tokenizer = byte_level_tokenizer(bos=True)
    tokenizer.chat_template = (
        "{{ bos_token }}" if own else ""
    ) + "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    language_model = LanguageModel(tiny_model("llama"), tokenizer, chat=ChatForm())
    assert language_model.encoder.prompt("Rome is").ids.count(1) == own
    contexts = join_contexts(generate_contexts(language_model, [[6, 5]], seed=1))
    request = EditRequest(prompt="Miss Vane plays the", subject="Miss Vane", target_new="drum")
    assert all(row.ids.count(1) == own for row in language_model.encoder.edit(request, contexts).rows)
    # Ordinary text is no conversation.
    assert contexts == join_contexts(generate_contexts(language_model.with_chat(None), [[6, 5]], seed=1))
    assert perplexity(language_model, TEXT) == perplexity(language_model.with_chat(None), TEXT)
