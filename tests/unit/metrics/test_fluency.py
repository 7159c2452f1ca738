import math
from dataclasses import replace

import pytest
import torch

from rome_pl.forward.generation import generate
from rome_pl.metrics.fluency import consistency, measure_fluency, n_gram_entropy
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest
from tests.tiny import KeepFloat64, byte_level_tokenizer, tiny_language_model, tiny_model

PROMPTS = [
    "The lighthouse of Korrin stands in",
    "It",
    "Once upon a time there was a miller who had three sons, a mill, a donkey and",
    "Miss Vane plays the",
    "Dunholt bread is made of rye, and",
]
RECORDS = [
    EditRequest(prompt="Korrin is", subject="Korrin", target_new="x", case_id="a",
    generation_prompts=["Korrin is a", "We went to Korrin"], references=["Korrin is a town by the sea"]),
    EditRequest(prompt="Tarn is", subject="Tarn", target_new="x", case_id=2, generation_prompts=["Tarn was"]),
    EditRequest(prompt="Dunholt is", subject="Dunholt", target_new="x", case_id="c", references=["Dunholt"]),
]  # fmt: skip


@pytest.fixture(autouse=True)
def float64_everywhere():
    with KeepFloat64():
        yield


def one_by_one(language_model, prompt, tokens):
    """Greedy decoding, a plain forward for each token."""
    ids = language_model.tokenizer(prompt)["input_ids"]
    written = []
    while len(written) < tokens:
        with torch.no_grad():
            token = int(language_model.model(torch.tensor([ids + written]), use_cache=False).logits[0, -1].argmax())
        written.append(token)
        if token == language_model.model.config.eos_token_id:
            break
    return language_model.tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_batched_generation_equals_one_by_one(family, bos, monkeypatch):
    language_model = LanguageModel(tiny_model(family), byte_level_tokenizer(bos))
    expected = [one_by_one(language_model, prompt, 6) for prompt in PROMPTS]
    for rows, side, pad_id in ((32, "left", 0), (32, "right", 7), (2, "right", 0), (1, "left", 0)):
        monkeypatch.setattr("rome_pl.forward.generation.ROWS", rows)
        language_model.tokenizer.padding_side = side
        language_model.encoder.pad_id = pad_id
        assert generate(language_model, PROMPTS, 6) == expected
    assert generate(language_model, PROMPTS[::-1], 6) == expected[::-1]
    assert generate(language_model, [], 6) == []


def test_sampling_is_seeded_and_leaves_the_global_generator_alone(language_model):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate(language_model, PROMPTS, 8, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert generate(language_model, PROMPTS, 8, seed=3) == first
    assert generate(language_model, PROMPTS, 8, seed=4) != first
    assert generate(language_model, PROMPTS, 8) != first
    generate(language_model, PROMPTS, 2)
    torch.manual_seed(2)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(2).get_state())


def test_generation_leaves_the_model_as_it_was(language_model):
    language_model.model.model.layers[0].mlp.train()
    modes = [module.training for module in language_model.model.modules()]
    generate(language_model, PROMPTS, 2)
    assert [module.training for module in language_model.model.modules()] == modes
    assert all(parameter.requires_grad for parameter in language_model.model.parameters())
    assert not any(module._forward_pre_hooks for module in language_model.model.modules())


def test_a_prompt_that_leaves_no_room_has_an_empty_continuation(language_model):
    full = "The tide comes in. " * 60
    assert len(language_model.tokenizer(full)["input_ids"]) > language_model.encoder.max_length
    expected = [one_by_one(language_model, prompt, 6) for prompt in PROMPTS[:2]]
    assert generate(language_model, [PROMPTS[0], full, PROMPTS[1]], 6) == [expected[0], "", expected[1]]
    assert generate(language_model, [full], 6) == [""]


def test_a_long_prompt_does_not_shorten_the_continuations_of_others(language_model):
    long = "The tide comes in. " * 60
    ids = language_model.tokenizer(long)["input_ids"][: language_model.encoder.max_length - 3]
    long = language_model.tokenizer.decode(ids)
    alone = generate(language_model, PROMPTS[:1], 6)
    assert generate(language_model, [PROMPTS[0], long], 6)[:1] == alone


def test_entropy_of_n_grams_worked_out_by_hand():
    two = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert n_gram_entropy("a b a b") == pytest.approx((2 / 3 * two + 4 / 3 * 1.0) / 2)
    # Four different bigrams and three different trigrams; the full stop is a word of its own.
    assert n_gram_entropy("one two, four.") == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)


@pytest.mark.parametrize("text", ["", " \n", "one", "one two", "!"])
def test_a_text_too_short_has_no_entropy(text):
    assert n_gram_entropy(text) == 0


def test_repetition_lowers_the_entropy():
    varied = "The tide comes in twice a day, and goes out again while nobody is watching the harbour wall."
    words = varied.split()
    assert n_gram_entropy(varied) > n_gram_entropy(" ".join(words[:6] * 3)) > n_gram_entropy("the the " * 9)
    assert n_gram_entropy("the " * 50) == 0


def test_consistency_of_equal_and_of_disjoint_texts():
    pytest.importorskip("sklearn")
    texts = ["Korrin is a town by the sea", "It has a lighthouse"]
    assert consistency(texts, texts) == pytest.approx(1)
    assert consistency(texts, texts[::-1]) == pytest.approx(1)  # all of them together
    assert consistency(texts, ["Violins and drums"]) == 0
    assert 0 < consistency(texts, ["A town with drums"]) < 1
    assert consistency(["! ?"], ["…"]) == consistency([""], [""]) == 0


def test_fluency_counts_the_records_that_have_prompts(language_model):
    pytest.importorskip("sklearn")
    found = measure_fluency(language_model, RECORDS, 10, seed=5)
    assert list(found.texts) == ["a", "2"]
    assert [len(texts) for texts in found.texts.values()] == [2, 1]
    for record in RECORDS[:2]:
        for prompt, text in zip(record.generation_prompts, found.texts[str(record.case_id)], strict=True):
            assert text.startswith(prompt)
            assert len(text) > len(prompt)
    expected = [sum(map(n_gram_entropy, texts)) / len(texts) for texts in found.texts.values()]
    assert (found.fluency["value"], found.fluency["n"]) == (pytest.approx(sum(expected) / 2), 2)
    assert (found.consistency["value"], found.consistency["n"]) == (
        pytest.approx(consistency(found.texts["a"], RECORDS[0].references)), 1,
    )  # fmt: skip
    assert measure_fluency(language_model, RECORDS, 10, seed=5) == found
    assert measure_fluency(language_model, RECORDS, 10, seed=6).texts != found.texts


def test_no_prompts_no_fluency():
    language_model = tiny_language_model()
    found = measure_fluency(language_model, [replace(RECORDS[0], generation_prompts=())], 10)
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    assert (found.fluency, found.consistency, found.texts) == (nothing, nothing, {})
