import contextlib
import math

import pytest
import torch

from rome_pl.errors import OptionError
from rome_pl.metrics import TextMeasure, held_out_text, measure_text, perplexity
from rome_pl.model.architecture import find_site
from rome_pl.write.closed_form import Assertion, Update
from rome_pl.write.edited_weight import EditedWeight, LayerWrite
from tests.tiny import KeepFloat64, tiny_language_model

TEXT = "The tide comes in twice a day, and twice a day it goes out again, whoever is watching. Miss Vane is."


@pytest.fixture(autouse=True)
def float64_everywhere():
    with KeepFloat64():
        yield


def plain(now, then, text, window):
    """Perplexity, divergence and number of tokens, one window at a time."""
    ids = now.tokenizer(text, add_special_tokens=False)["input_ids"]
    surprise, divergence, count = 0.0, 0.0, 0
    for start in range(0, len(ids), window):
        piece = torch.tensor([ids[start : start + window]])
        if piece.shape[1] < 2:
            continue
        with torch.no_grad():
            p, q = (other.model(piece).logits[0].softmax(-1) for other in (then, now))
        for place in range(piece.shape[1] - 1):
            surprise -= math.log(q[place, piece[0, place + 1]])
            divergence += float((p[place] * (p[place] / q[place]).log()).sum())
            count += 1
    return math.exp(surprise / count), divergence / count, count


def edited(language_model, scale=1.0):
    """The weight of layer 1 with a random change of rank one."""
    site = find_site(language_model.model, 1)
    weight = EditedWeight(site, lambda keys: keys)
    generator = torch.Generator().manual_seed(3)
    left, right = (
        scale * torch.randn(1, size, dtype=torch.float64, generator=generator) for size in (site.d_value, site.d_key)
    )
    weight.restore(LayerWrite(("a",), Assertion(right, right, left), Update(left, right), (1.0,)))
    return weight


def unedited(weight, language_model):
    @contextlib.contextmanager
    def context():
        with weight.unedited():
            yield language_model

    return context


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("window", [2, 7, 16, 128])
def test_perplexity_and_divergence_equal_a_plain_computation(family, window):
    now, then = tiny_language_model(family), tiny_language_model(family, seed=7)
    found = measure_text(now, TEXT, lambda: contextlib.nullcontext(then), window)
    assert (found.perplexity, found.divergence, found.n) == pytest.approx(plain(now, then, TEXT, window), rel=1e-9)
    assert found.divergence > 0
    assert perplexity(now, TEXT, window) == found.perplexity
    assert measure_text(now, TEXT, window=window) == TextMeasure(found.perplexity, None, found.n)


def test_windows_are_no_longer_than_the_model_reads(language_model):
    long = measure_text(language_model, TEXT * 10, window=1000)
    assert long == measure_text(language_model, TEXT * 10, window=128)
    assert long.n == sum(
        length - 1
        for length in map(len, torch.tensor(language_model.tokenizer(TEXT * 10)["input_ids"]).split(128))
        if length > 1
    )


def test_a_last_window_of_one_token_predicts_nothing(language_model):
    count = len(language_model.tokenizer(TEXT)["input_ids"])
    window = next(size for size in range(2, count) if count % size == 1)
    assert measure_text(language_model, TEXT, window=window).n == count - 1 - count // window


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_that_predicts_nothing_is_refused(text, language_model):
    with pytest.raises(ValueError, match="at least two tokens"):
        measure_text(language_model, text)


def test_a_model_does_not_diverge_from_itself(language_model):
    assert measure_text(language_model, TEXT, lambda: contextlib.nullcontext(language_model)).divergence == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_edit_diverges_from_the_model_without_it(dtype):
    language_model, base = tiny_language_model(dtype=dtype), tiny_language_model(dtype=dtype)
    before = perplexity(base, TEXT)
    weight = edited(language_model)
    after = language_model.model.state_dict()[weight.site.name].clone()
    found = measure_text(language_model, TEXT, unedited(weight, language_model), 16)
    assert found.divergence > 1e-3
    reference = measure_text(language_model, TEXT, lambda: contextlib.nullcontext(base), 16)
    assert found == reference
    assert torch.equal(language_model.model.state_dict()[weight.site.name], after)
    with weight.unedited():
        assert perplexity(language_model, TEXT) == before
    assert perplexity(language_model, TEXT) != before
    small = edited(tiny_language_model(dtype=dtype), 1e-3)
    assert small.change < 1e-2 * weight.change


def test_the_edited_weight_is_back_after_an_exception(language_model):
    original = find_site(language_model.model, 1).weight.detach().clone()
    weight = edited(language_model)
    after = weight.site.weight.detach().clone()
    assert not torch.equal(after, original)

    def fails_inside():
        with weight.unedited():
            assert torch.equal(weight.site.weight, original)
            raise RuntimeError("injected")

    with pytest.raises(RuntimeError, match="injected"):
        fails_inside()
    assert torch.equal(weight.site.weight, after)
    assert weight.names == ["a"]

    @contextlib.contextmanager
    def broken():
        with weight.unedited():
            yield None  # no model at all

    with pytest.raises(AttributeError):
        measure_text(language_model, TEXT, broken)
    assert torch.equal(weight.site.weight, after)


def test_the_text_of_the_package_is_long_and_can_be_replaced(whole_text, language_model, tmp_path):
    assert len(language_model.tokenizer(held_out_text(), verbose=False)["input_ids"]) >= 4000
    assert len(held_out_text().split()) > 3000
    (tmp_path / "mine.txt").write_text("Grüße ☃", encoding="utf-8")
    assert held_out_text(str(tmp_path / "mine.txt")) == "Grüße ☃"
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    for name in ("latin.txt", "missing.txt", "."):
        with pytest.raises(OptionError, match=r"held_out_text: .* cannot be read as UTF-8 text"):
            held_out_text(str(tmp_path / name))
