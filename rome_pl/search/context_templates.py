"""Contexts: short texts before the prompt, so that an edit does not depend on the subject's position.

Meng et al. 2022, Eq. 3.
"""

from collections.abc import Sequence

from rome_pl.forward.generation import Sampling, write_ids
from rome_pl.model.language_model import LanguageModel
from rome_pl.utils.hashing import hash_seed

__all__ = ["DEFAULT_LENGTH_PARAMS", "OPENERS", "generate_contexts", "join_contexts"]

DEFAULT_LENGTH_PARAMS = [[5, 10], [10, 10]]
"""Published setting: 10 contexts of about 5 tokens and 10 of about 10."""

OPENERS = ("The", "In", "It", "When", "A")
"""First words of generated contexts. Each is continued equally often."""


def generate_contexts(language_model: LanguageModel, length_params: Sequence[Sequence[int]], seed: int) -> list[str]:
    """Generate contexts with the model.

    Args:
        language_model: The model.
        length_params: Pairs ``[tokens, number of contexts]``: ROME's ``context_template_length_params``.
        seed: Seed of the sampling. The global generators are restored.

    Returns:
        One text per context, without the full stop that joins it to a prompt.

    Raises:
        ValueError: If a pair is malformed.
    """
    tokenizer = language_model.tokenizer
    contexts: list[str] = []
    for pair in length_params:
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(
                f"context_template_length_params: expected pairs [tokens, number], both positive, got {list(pair)}"
            )
        length, number = pair
        for index, opener in enumerate(OPENERS):
            rows = len(range(index, number, len(OPENERS)))
            if not rows:
                continue
            words = tokenizer(opener, add_special_tokens=False)["input_ids"]
            written = write_ids(
                language_model,
                [(*language_model.encoder.opening, *words)] * rows,
                max(1, length - len(words)),
                # Contexts should read like text, as published; plain sampling drifts within ten tokens.
                Sampling(hash_seed(seed, length, opener), top_k=5),
                full_length=True,
            )
            # Ids before a text, such as BOS, are left out: they will come before context and prompt together.
            texts = tokenizer.batch_decode([words + more for more in written.rows], skip_special_tokens=True)
            contexts += [" ".join(text.split()) for text in texts]
    return contexts


def join_contexts(contexts: Sequence[str]) -> tuple[str, ...]:
    """Return the texts to put directly before a prompt: the empty one, then every context with a full stop."""
    return ("", *(context if context[-1:].isspace() else context + ". " for context in contexts))
