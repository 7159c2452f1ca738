import itertools
import random

import pytest
import torch

from rome_pl.encoding.encoded_rows import EncodedRow
from rome_pl.forward import token_trees as packs
from rome_pl.forward.token_trees import forwards, pack_texts, takes_branches
from rome_pl.metrics.probes import Changes, measure_answers
from rome_pl.model.architecture import find_site
from rome_pl.write.closed_form import Update
from tests.tiny import FAMILIES, KeepFloat64, tiny_language_model

# Families whose attention takes any mask; the others are measured a row a text.
BRANCHING = {
    "gpt2",
    "gptj",
    "gpt_neox",
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "olmo2",
    "stablelm",
    "opt",
    "falcon",
    "phi",
}


def some_texts(seed, count=40, alphabet=3, longest=7):
    chance = random.Random(seed)
    return [tuple(chance.choices(range(5, 5 + alphabet), k=chance.randint(1, longest))) for _ in range(count)]


@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize("width", [1, 8, 256])
def test_every_text_is_a_path_of_its_pack_and_sees_itself_alone(branches, width, monkeypatch):
    monkeypatch.setattr(packs, "WIDTH", width)
    texts = some_texts(1)
    owners = [number % 3 for number in range(len(texts))]
    made = pack_texts(texts, owners, branches)
    assert sorted(number for pack in made for number in pack.texts) == list(range(len(texts)))
    for pack in made:
        assert len({owners[number] for number in pack.texts}) == 1
        for number, columns in zip(pack.texts, pack.columns, strict=True):
            assert [pack.ids[column] for column in columns] == list(texts[number])
            assert [pack.depths[column] for column in columns] == list(range(len(columns)))
            for depth, column in enumerate(columns):
                seen = [other for other in range(len(pack.ids)) if other <= column < pack.ends[other]]
                assert seen == columns[: depth + 1]


@pytest.mark.parametrize("branches", [True, False])
def test_no_beginning_is_held_twice(branches):
    texts = some_texts(2)
    made = pack_texts(texts, [0] * len(texts), branches)
    beginnings = {text[:length] for text in texts for length in range(1, len(text) + 1)}
    if branches:
        assert len(made) == 1
        assert len(made[0].ids) == len(beginnings)
    else:
        whole = [text for text in set(texts) if not any(o != text and o[: len(text)] == text for o in texts)]
        assert sorted(tuple(pack.ids) for pack in made) == sorted(whole)


def test_a_pack_is_no_wider_than_asked_unless_a_single_text_is(monkeypatch):
    monkeypatch.setattr(packs, "WIDTH", 12)
    texts = [*some_texts(3), tuple(range(30)), tuple(range(20))]
    made = pack_texts(texts, [0] * len(texts), True)
    assert [len(pack.ids) for pack in made if len(pack.ids) > 12] == [30]


def test_forwards_keep_to_their_size_and_lose_no_pack(monkeypatch):
    monkeypatch.setattr(packs, "TOKENS", 20)
    monkeypatch.setattr(packs, "PADDING", 3)
    made = pack_texts(some_texts(4), list(range(40)), False)
    batches = list(forwards(made))
    assert sorted(id(pack) for batch in batches for pack in batch) == sorted(map(id, made))
    for batch in batches:
        sizes = [len(pack.ids) for pack in batch]
        assert max(sizes) * len(batch) <= 20
        assert max(sizes) * len(batch) - sum(sizes) <= 3
    assert any(len(batch) > 1 for batch in batches)


def rows_of(texts):
    """Rows whose last token or two are the target's beginning; every length of target and prompt is there."""
    rows = []
    for text, extra in zip(texts, itertools.cycle((0, 1, 2))):
        ids = tuple(token + 20 for token in text)
        first = max(0, len(ids) - 1 - extra)
        rows.append(EncodedRow(ids, first, (*ids[first + 1 :], 7), first))
    return rows


def one_by_one(language_model, row):
    with torch.no_grad():
        log_probs = language_model.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    return float(torch.stack([log_probs[row.first + i, token] for i, token in enumerate(row.target)]).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_answers_equal_those_of_each_text_alone(family):
    with KeepFloat64():
        language_model = tiny_language_model(family)
        rows = rows_of(some_texts(5, longest=9))
        rows += rows_of([tuple(random.Random(6).choices(range(90), k=100))])
        for row, answer in zip(rows, measure_answers(language_model, rows), strict=True):
            assert answer.log_prob == pytest.approx(one_by_one(language_model, row), abs=1e-9)
        assert takes_branches(language_model) == (family in BRANCHING)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attentions_take_branches(implementation):
    language_model = tiny_language_model("llama")
    language_model.model.set_attn_implementation(implementation)
    assert takes_branches(language_model)


def test_each_owner_sees_its_own_change_alone():
    language_model = tiny_language_model("llama")
    site = find_site(language_model.model, 1)
    weight = site.weight
    chance = torch.Generator().manual_seed(0)
    updates = [
        [Update(*(torch.randn(1, size, generator=chance, dtype=torch.float64) for size in weight.shape))]
        for _ in range(2)
    ]
    texts = some_texts(7, count=12)
    rows = rows_of(texts) * 3
    owners = [None, *updates]
    changes = Changes([site], [owners[place // len(texts)] for place in range(len(rows))])
    found = measure_answers(language_model, rows, changes)
    for place, row in enumerate(rows):
        update = changes.updates[place]
        with torch.no_grad():
            kept = weight.clone()
            if update is not None:
                weight += update[0].left.T @ update[0].right
            expected = one_by_one(language_model, row)
            weight.copy_(kept)
        assert found[place].log_prob == pytest.approx(expected, abs=1e-9)


def test_a_model_is_tried_once(monkeypatch):
    language_model = tiny_language_model("llama")
    tried = []
    monkeypatch.setattr(packs, "_try_branches", lambda tried_model: tried.append(tried_model) or True)
    assert takes_branches(language_model)
    assert takes_branches(language_model)
    assert len(tried) == 1


@pytest.mark.parametrize("family", ["mistral", "gpt_neo", "bloom"])
def test_a_window_or_a_mask_of_the_models_own_is_noticed(family):
    assert not takes_branches(tiny_language_model(family))
