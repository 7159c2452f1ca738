"""Whether a model takes rows that are padded on the left, and grouping rows by length where it does not."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rome_pl.encoding.aligned_rows import align
from rome_pl.encoding.encoded_rows import EncodedRow
from rome_pl.forward.hooks import clean_padding
from rome_pl.forward.partial import forward_masks
from rome_pl.model.architecture import embedded_tokens
from rome_pl.model.language_model import LanguageModel
from rome_pl.utils.restored_state import frozen

__all__ = ["padded_together"]

_LARGEST = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Largest difference of logits that counts as rounding, in their standard deviations; 0.2 in half precision."""

_TRIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def padded_together(language_model: LanguageModel, lengths: Sequence[int]) -> list[list[int]]:
    """Group rows that may be padded to one length: all of them, or those of equal length.

    Args:
        language_model: The model. It is tested once, with the first rows of several lengths.
        lengths: The rows' lengths, in tokens.

    Returns:
        The numbers of the rows of each group.
    """
    groups: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(length, []).append(number)
    if len(groups) <= 1 or _takes_padding(language_model):
        return [list(range(len(lengths)))]
    return list(groups.values())


@torch.no_grad()
def _takes_padding(language_model: LanguageModel) -> bool:
    """Compare a row alone with the same row beside a longer one."""
    model: Any = language_model.model
    if model not in _TRIED:
        size, pad = embedded_tokens(model), language_model.encoder.pad_id
        ids = [token for token in range(min(size, 64)) if token != pad] or [0]
        rows = [EncodedRow(tuple(ids[-1 - place % len(ids)] for place in range(n)), n - 1, (), n - 1) for n in (4, 7)]
        with frozen(model):
            alone, beside = (_last_logits(model, chosen, pad) for chosen in (rows[:1], rows))
        largest = _LARGEST.get(next(model.parameters()).dtype, 0.2)
        _TRIED[model] = not float((beside - alone).abs().max()) > largest * float(alone.std())
    return _TRIED[model]


def _last_logits(model: Any, rows: Sequence[EncodedRow], pad_id: int) -> Tensor:
    """The first row's logits after its last token, without tokens that the model never writes."""
    aligned = align(rows, pad_id, model.device)
    with clean_padding(model, aligned.attention_mask):
        logits: Tensor = model(
            input_ids=aligned.input_ids,
            use_cache=False,
            **forward_masks(model, aligned.attention_mask, aligned.position_ids),
        ).logits[0, -1]
    return logits[logits > torch.finfo(logits.dtype).min / 2].double()
