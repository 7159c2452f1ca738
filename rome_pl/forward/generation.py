"""What a model writes after a text: the one place that asks it to generate.

A checkpoint may ship generation settings (beams, penalties, stop strings, an output format, a kind of cache). They suit
its use as a product, and say nothing about how contexts, fluency, samples or a corpus are to be written. None of them
has a part in it here; of a model's own settings only the ids that end a text are asked for.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from rome_pl.encoding.aligned_rows import align
from rome_pl.encoding.encoded_rows import EncodedRow
from rome_pl.forward.hooks import clean_padding
from rome_pl.model.architecture import embedded_tokens
from rome_pl.model.language_model import LanguageModel
from rome_pl.utils.hashing import hash_seed
from rome_pl.utils.restored_state import frozen, seeded

__all__ = ["ROWS", "TOP_K", "Continuation", "Sampling", "end_ids", "generate", "write_ids"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        seed: Seed of the generators, whose own state is left as it was.
        top_k: Number of likeliest tokens to draw from, by their probabilities. 0: all.
    """

    seed: int
    top_k: int = 0


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after some rows.

    Args:
        rows: For each row the ids written, up to the end of the text and without the token that ends it.
        steps: Tokens asked of the model for each row; rows that had ended waited for the others.
    """

    rows: list[list[int]]
    steps: int


@torch.no_grad()
def write_ids(
    language_model: LanguageModel,
    rows: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling | None = None,
    full_length: bool = False,
) -> Continuation:
    """Let the model go on with some rows, side by side.

    Args:
        language_model: The model, with its current weights.
        rows: Ids of what stands before, of any lengths, what the tokenizer puts before a text included.
        tokens: Most tokens to write; the caller leaves room for them within what the model reads.
        sampling: How tokens are drawn. ``None``: the likeliest each time.
        full_length: Whether to write all of them, with no end of the text before.
    """
    model: Any = language_model.model
    encoder = language_model.encoder
    ends = end_ids(language_model)
    how: dict[str, Any] = {"do_sample": False}
    if sampling is not None:
        how = {"do_sample": True, "top_k": sampling.top_k, "top_p": 1.0, "temperature": 1.0}
    # The last tokens stand in one column.
    encoded = [EncodedRow(tuple(row), len(row) - 1, (), len(row) - 1) for row in rows]
    aligned = align(encoded, encoder.pad_id, language_model.device)
    config = GenerationConfig(
        max_new_tokens=tokens,
        min_new_tokens=tokens if full_length else None,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        use_cache=True,
        return_dict_in_generate=False,
        eos_token_id=ends or None,
        pad_token_id=encoder.pad_id,
        **how,
    )
    with (
        seeded(0 if sampling is None else sampling.seed, language_model.device),
        frozen(model),
        clean_padding(model, aligned.attention_mask),
        _without_own_settings(model),
    ):
        out = model.generate(
            input_ids=aligned.input_ids, attention_mask=aligned.attention_mask, generation_config=config
        )
    written = out[:, aligned.input_ids.shape[1] :]
    return Continuation([_until(row, ends) for row in written.tolist()], written.shape[1])


def end_ids(language_model: LanguageModel) -> list[int]:
    """Ids that end a text, by the model's own generation settings; those that its vocabulary lacks never come up."""
    settings = [module.generation_config for module in _with_settings(language_model.model)]
    found = next((one.eos_token_id for one in settings if one is not None), None)
    ids = torch.as_tensor([] if found is None else found).flatten().tolist()
    size = embedded_tokens(language_model.model)
    return [int(token) for token in ids if 0 <= token < size]


def _with_settings(model: nn.Module) -> list[Any]:
    """The modules that keep generation settings, or ``None`` in their place, the outermost first.

    A wrapper reads those of what it wraps.
    """
    return [module for module in model.modules() if "generation_config" in vars(module)]


@contextmanager
def _without_own_settings(model: nn.Module) -> Iterator[None]:
    """Bare generation settings inside, since ``generate`` fills what it is not told from the model's own."""
    kept = [(module, module.generation_config) for module in _with_settings(model)]
    try:
        for module, _ in kept:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, settings in kept:
            module.generation_config = settings


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Ids before the first that ends the text: what ``generate`` fills a finished row with is no text."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def generate(language_model: LanguageModel, prompts: Sequence[str], tokens: int, seed: int | None = None) -> list[str]:
    """Continuations of prompts, without them.

    Args:
        language_model: The model, with its current weights.
        prompts: Texts, of any lengths.
        tokens: Most tokens of a continuation; where the context ends earlier, so does it.
        seed: Seed of the sampling; ``None`` takes the likeliest token each time.
    """
    encoder = language_model.encoder
    texts = [""] * len(prompts)
    rows = [encoder.prompt(prompt) for prompt in prompts]
    # Where the context ends early there is room for fewer tokens, or none: that is no matter of the other prompts.
    rooms: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        rooms.setdefault(min(tokens, encoder.max_length - len(row.ids)), []).append(place)
    batches = [
        (room, places[start : start + ROWS])
        for room, places in rooms.items()
        for start in range(0, len(places), ROWS)
        if room > 0
    ]
    for room, places in batches:
        how = None if seed is None else Sampling(hash_seed(seed, places[0]), TOP_K)
        ids = write_ids(language_model, [rows[place].ids for place in places], room, how)
        written = language_model.tokenizer.batch_decode(ids.rows, skip_special_tokens=True)
        for place, text in zip(places, written, strict=True):
            texts[place] = text
    return texts


ROWS = 32
"""Prompts continued at once."""


TOP_K = 5
"""Continuations are sampled from the likeliest tokens, as in the public evaluation."""
