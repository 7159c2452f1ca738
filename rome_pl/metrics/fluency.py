"""Scores of generated text: fluency and consistency (Meng et al. 2022, App. B), and batched generation."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rome_pl.forward.generation import generate
from rome_pl.metrics.intervals import Entry, bootstrap_interval, entry
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest

__all__ = ["Fluency", "consistency", "measure_fluency", "n_gram_entropy"]


WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""Weight of the entropy of n-grams, by n."""


@dataclass(frozen=True)
class Fluency:
    """Scores of generated texts.

    Args:
        fluency: Weighted entropy of its 2- and 3-grams, in bits (papers print a hundred times that); a mean over
            records with its interval. Text that repeats itself has little.
        consistency: TF-IDF cosine with reference texts; ``n`` is 0 where no record has any.
        texts: The texts, by record.
    """

    fluency: Entry
    consistency: Entry
    texts: dict[str, list[str]]


def measure_fluency(
    language_model: LanguageModel, requests: Sequence[EditRequest], tokens: int, seed: int = 0
) -> Fluency:
    """Measure the fluency of texts that a model generates, and their consistency with the records' reference texts.

    Args:
        language_model: The model, with its current weights.
        requests: The records. Those without generation prompts do not count.
        tokens: Largest number of tokens of a text.
        seed: Seed of the sampling.
    """
    chosen = [request for request in requests if request.generation_prompts]
    prompts = [prompt for request in chosen for prompt in request.generation_prompts]
    written = iter(generate(language_model, prompts, tokens, seed))
    texts = {
        str(request.case_id): [prompt + next(written) for prompt in request.generation_prompts] for request in chosen
    }
    entropies = [sum(map(n_gram_entropy, found)) / len(found) for found in texts.values()]
    likeness = [
        consistency(texts[str(request.case_id)], request.references) for request in chosen if request.references
    ]
    return Fluency(
        entry(torch.tensor(entropies, dtype=torch.float64), bootstrap_interval),
        entry(torch.tensor(likeness, dtype=torch.float64), bootstrap_interval),
        texts,
    )


def n_gram_entropy(text: str) -> float:
    """Weighted mean of the entropies of a text's 2- and 3-grams, in bits; 0 for a text too short to have any.

    Its units are words and punctuation marks, without a tokenizer of any language.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    total = 0.0
    for n, weight in WEIGHTS.items():
        counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
        size = sum(counts.values())
        total -= weight * sum(count / size * math.log2(count / size) for count in counts.values())
    return total / len(WEIGHTS)


def consistency(texts: Sequence[str], references: Sequence[str]) -> float:
    """Cosine of TF-IDF vectors of all texts together and all references together.

    Raises:
        ImportError: If scikit-learn is not installed (``pip install rome_pl[consistency]``).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        vectors = TfidfVectorizer().fit_transform([" ".join(texts), " ".join(references)])
    except ValueError as error:
        if "empty vocabulary" not in str(error):
            raise
        return 0.0  # no word in either
    return float((vectors[0] @ vectors[1].T).toarray()[0, 0])
