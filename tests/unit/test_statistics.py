import logging

import pytest
import torch

from rome_pl.architecture import find_site
from rome_pl.second_moment import StatisticsError
from rome_pl.statistics import accumulate, generated_texts, read_corpus, resolve_second_moment
from tests.tiny import FAMILIES, tiny_language_model

TEXTS = [
    "The tide comes in twice a day.",
    "Nobody had seen the lighthouse keeper since the storm.",
    "Bread needs time.",
] * 9


def plain_keys(language_model, site, ids):
    """Every key of a text, from a plain forward."""
    kept = []
    handle = site.projection.register_forward_hook(lambda _, inputs, __: kept.append(inputs[0].reshape(-1, site.d_key)))
    with torch.no_grad():
        language_model.model(torch.tensor([ids]))
    handle.remove()
    return torch.cat(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_forwards(family):
    language_model = tiny_language_model(family)
    site = find_site(language_model.model, 1)
    text = "The tide comes in twice a day, and twice a day it goes out."
    ids = language_model.tokenizer(text)["input_ids"]
    moment = accumulate(language_model, site, [text], 10**6, "test")
    keys = plain_keys(language_model, site, ids)
    assert moment.info.count == len(ids)
    torch.testing.assert_close(moment.matrix, keys.T @ keys / len(ids), rtol=1e-8, atol=1e-10)


def test_counts_every_token_once_and_stops_at_the_wanted_number(language_model):
    site = find_site(language_model.model, 1)
    total = sum(len(language_model.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert accumulate(language_model, site, TEXTS, 10**6, "test").info.count == total
    assert accumulate(language_model, site, TEXTS, 101, "test").info.count == 101


def test_too_little_text_is_said(language_model, caplog):
    site = find_site(language_model.model, 1)
    with caplog.at_level(logging.WARNING):
        accumulate(language_model, site, ["Short."], 100, "test")
    assert "singular" in caplog.text
    assert "At least" in caplog.text


def test_without_text_the_model_writes_its_own_and_says_so(language_model, caplog):
    site = find_site(language_model.model, 1)
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        moment = resolve_second_moment(language_model, site, wanted=300, seed=3)
    assert "the model writes its own corpus of 300 tokens" in caplog.text
    assert moment.info.count == 300
    assert torch.equal(torch.get_rng_state(), state)
    caplog.clear()
    again = resolve_second_moment(language_model, site, wanted=300, seed=3)
    assert caplog.text == ""  # cached
    assert torch.equal(again.matrix, moment.matrix)  # the first run used what later runs read


def test_the_generated_corpus_depends_on_the_seed_alone(language_model):
    texts = list(generated_texts(language_model, 200, seed=1))
    assert texts == list(generated_texts(language_model, 200, seed=1))
    assert texts != list(generated_texts(language_model, 200, seed=2))


def test_the_cache_tells_models_corpora_and_layers_apart(tmp_path):
    corpus, other = tmp_path / "a.txt", tmp_path / "b.txt"
    corpus.write_text("\n".join(TEXTS), encoding="utf-8")
    other.write_text("\n".join(reversed(TEXTS)) * 2, encoding="utf-8")
    first, second = tiny_language_model("llama"), tiny_language_model("llama", seed=5)
    results = [
        resolve_second_moment(model, find_site(model.model, layer), corpus=str(path), wanted=200).matrix
        for model, layer, path in ((first, 1, corpus), (second, 1, corpus), (first, 0, corpus), (first, 1, other))
    ]
    assert all(not torch.allclose(results[0], result) for result in results[1:])


def test_statistics_of_another_model_are_refused(language_model, tmp_path):
    other = tiny_language_model("llama", seed=5)
    site = find_site(other.model, 1)
    accumulate(other, site, TEXTS, 10**6, "test").save(tmp_path / "c.safetensors")
    with pytest.raises(StatisticsError, match="other weights"):
        resolve_second_moment(
            language_model, find_site(language_model.model, 1), statistics=str(tmp_path / "c.safetensors")
        )


def test_corpora_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("Élan".encode("latin-1"))
    with pytest.raises(StatisticsError, match="is empty"):
        list(read_corpus(str(tmp_path / "empty.txt")))
    with pytest.raises(StatisticsError, match="not UTF-8"):
        list(read_corpus(str(tmp_path / "latin.txt")))
    with pytest.raises(StatisticsError, match="no such file"):
        list(read_corpus("nobody/nothing-like-this"))
