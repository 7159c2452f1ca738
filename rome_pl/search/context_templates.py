"""Contexts: short texts put before the prompt, so that an edit holds wherever the subject stands.

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
"""Words that generated contexts open with; each is continued equally often."""


def generate_contexts(language_model: LanguageModel, length_params: Sequence[Sequence[int]], seed: int) -> list[str]:
    """Let the model write contexts.

    Args:
        language_model: The model.
        length_params: Pairs ``[tokens, number of contexts]``: ROME's ``context_template_length_params``.
        seed: Seed of the sampling; the global generators are left as they were.

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
            # What stands before a text is left out: it will stand before the context and the prompt together.
            texts = tokenizer.batch_decode([words + more for more in written.rows], skip_special_tokens=True)
            contexts += [" ".join(text.split()) for text in texts]
    return contexts


def join_contexts(contexts: Sequence[str]) -> tuple[str, ...]:
    """Texts to put directly before a prompt: the empty one first, then every context ended by a full stop."""
    return ("", *(context if context[-1:].isspace() else context + ". " for context in contexts))
