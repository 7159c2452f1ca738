"""Text generation: the only module that calls ``generate``.

A checkpoint may ship generation settings (beams, penalties, stop strings, an output format, a kind of cache). They are
meant for its use as a product, not for contexts, fluency, samples or a corpus. Of these settings only the ids that end
a text are used here.
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
from rome_pl.forward.left_padding import padded_together
from rome_pl.model.architecture import embedded_tokens
from rome_pl.model.language_model import LanguageModel
from rome_pl.utils.hashing import hash_seed
from rome_pl.utils.restored_state import frozen, seeded

__all__ = ["ROWS", "TOP_K", "Continuation", "Sampling", "end_ids", "generate", "write_ids"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        seed: Seed of the generators. Their own state is restored.
        top_k: Number of likeliest tokens to draw from, by their probabilities. 0: all.
    """

    seed: int
    top_k: int = 0


@dataclass(frozen=True)
class Continuation:
    """The texts that a model wrote after some rows.

    Args:
        rows: For each row the new ids, up to the end of the text and without its end token.
        steps: Tokens generated for each row, including those of ended rows that waited for the others.
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
    """Let the model continue some rows as one batch.

    Args:
        language_model: The model, with its current weights.
        rows: Ids of the texts to continue, of any lengths, including those that the tokenizer puts before a text.
        tokens: Largest number of tokens to write. The rows have to leave room for them in the model's context.
        sampling: How tokens are drawn. ``None`` (default): always the likeliest one.
        full_length: Whether to write exactly ``tokens`` tokens, without ending a text earlier.
    """
    groups = padded_together(language_model, [len(row) for row in rows])
    if len(groups) > 1:
        parts = [
            write_ids(language_model, [rows[number] for number in numbers], tokens, sampling, full_length)
            for numbers in groups
        ]
        found = {
            number: row
            for numbers, part in zip(groups, parts, strict=True)
            for number, row in zip(numbers, part.rows, strict=True)
        }
        return Continuation([found[number] for number in range(len(rows))], max(part.steps for part in parts))
    model: Any = language_model.model
    encoder = language_model.encoder
    ends = end_ids(language_model)
    how: dict[str, Any] = {"do_sample": False}
    if sampling is not None:
        how = {"do_sample": True, "top_k": sampling.top_k, "top_p": 1.0, "temperature": 1.0}
    # The last tokens are in one column.
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
            input_ids=aligned.input_ids,
            attention_mask=aligned.attention_mask,
            generation_config=config,
            # The library counts positions from 0 in every model.
            **({"position_ids": aligned.position_ids + first} if (first := language_model.first_position) else {}),
        )
    written = out[:, aligned.input_ids.shape[1] :]
    return Continuation([_until(row, ends) for row in written.tolist()], written.shape[1])


def end_ids(language_model: LanguageModel) -> list[int]:
    """Ids that end a text, from the model's generation settings, without ids outside its vocabulary."""
    settings = [module.generation_config for module in _with_settings(language_model.model)]
    found = next((one.eos_token_id for one in settings if one is not None), None)
    ids = torch.as_tensor([] if found is None else found).flatten().tolist()
    size = embedded_tokens(language_model.model)
    return [int(token) for token in ids if 0 <= token < size]


def _with_settings(model: nn.Module) -> list[Any]:
    """The modules that can hold generation settings, possibly ``None``, the outermost first.

    A wrapper reads the settings of the wrapped model.
    """
    return [module for module in model.modules() if "generation_config" in vars(module)]


@contextmanager
def _without_own_settings(model: nn.Module) -> Iterator[None]:
    """Use empty generation settings inside: ``generate`` takes missing arguments from the model's own."""
    kept = [(module, module.generation_config) for module in _with_settings(model)]
    try:
        for module, _ in kept:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, settings in kept:
            module.generation_config = settings


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Ids before the first end of text: ``generate`` fills the rest of a finished row."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def generate(language_model: LanguageModel, prompts: Sequence[str], tokens: int, seed: int | None = None) -> list[str]:
    """Generate continuations of prompts.

    Args:
        language_model: The model, with its current weights.
        prompts: Texts, of any lengths.
        tokens: Largest number of tokens of a continuation. It is shorter if the context ends earlier.
        seed: Seed of the sampling. ``None`` (default): always take the likeliest token.

    Returns:
        A text for each prompt, without the prompt.
    """
    encoder = language_model.encoder
    texts = [""] * len(prompts)
    rows = [encoder.prompt(prompt) for prompt in prompts]
    # A long prompt may leave room for fewer tokens, or none. This does not affect the other prompts.
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
"""Number of prompts continued at once."""


TOP_K = 5
"""Continuations are sampled from the likeliest tokens, as in the public evaluation."""
