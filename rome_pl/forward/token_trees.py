"""Texts with common beginnings, packed into one row so that the common part runs once.

A pack is a tree of tokens, laid out depth first in one row of the batch. Every token attends to its ancestors and
itself, and its position is its depth, so each path from the root gives the same results as that text alone. Ten prompts
with two targets each then need about as many tokens as the prompts alone, without padding between them.

Whether a model takes such rows is tested, not known by name. Other models get chains instead of trees: a row for each
text, shared only with texts that are its beginning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rome_pl.encoding.aligned_rows import to_device
from rome_pl.forward.hooks import head_on
from rome_pl.forward.partial import forward_masks
from rome_pl.model.architecture import embedded_tokens
from rome_pl.model.language_model import LanguageModel
from rome_pl.utils.restored_state import frozen

__all__ = ["Pack", "StackedPacks", "forwards", "pack_texts", "stack_packs", "takes_branches"]

WIDTH = 256
"""Largest number of tokens of a pack with branches. A longer pack costs more attention, but needs fewer forwards."""

TOKENS = 2048
"""Largest number of tokens of one forward, padding included."""

PADDING = 128
"""Largest padding of one forward, in tokens. More would cost as much as another forward."""

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest difference of a log-probability that counts as rounding in the test of branches. If attention leaks, the
test's texts differ by far more."""

TOLERANCE_HALF = 0.1
"""The same for 16-bit precisions."""


@dataclass
class Pack:
    """A tree of tokens in one row.

    Args:
        ids: The tokens, depth first.
        depths: Depth of each, which is its position.
        ends: The column after each token's last descendant.
        texts: The numbers of the packed texts.
        columns: For each of them the column of each of its tokens.
    """

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    columns: list[list[int]] = field(default_factory=list)

    def add(self, number: int, text: Sequence[int], shared: int) -> None:
        """Add a text that shares its first ``shared`` tokens with the text added before it."""
        path = self.columns[-1][:shared] if shared else []
        for depth, token in enumerate(text[shared:], start=shared):
            path.append(len(self.ids))
            self.ids.append(token)
            self.depths.append(depth)
            self.ends.append(0)
        for column in path:
            self.ends[column] = len(self.ids)
        self.texts.append(number)
        self.columns.append(path)


@dataclass(frozen=True)
class StackedPacks:
    """Packs as a batch.

    Args:
        input_ids: ``[packs, width]``, padded on the right.
        masks: Attention mask and positions, as the model takes them.
    """

    input_ids: Tensor
    masks: dict[str, Tensor]


def pack_texts(texts: Sequence[Sequence[int]], owners: Sequence[int], branches: bool) -> list[Pack]:
    """Pack texts; those of different owners never share a pack.

    Args:
        texts: Token ids of each.
        owners: The owner of each.
        branches: Whether texts that diverge may share a pack. If not, or if a text is longer than a pack, it shares one
            only with a text that it is the beginning of.
    """
    packs: list[Pack] = []
    before: int | None = None
    # In this order a text comes right after the texts that it is the beginning of.
    for number in sorted(range(len(texts)), key=lambda number: (owners[number], texts[number]), reverse=True):
        text = texts[number]
        joins = before is not None and owners[before] == owners[number]
        shared = _shared(texts[before], text) if joins and before is not None else 0
        joins = joins and (shared == len(text) or (branches and len(packs[-1].ids) + len(text) - shared <= WIDTH))
        if not joins:
            packs.append(Pack())
        packs[-1].add(number, text, shared if joins else 0)
        before = number
    return packs


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        length += 1
    return length


def forwards(packs: Sequence[Pack]) -> Iterator[list[Pack]]:
    """Group packs of similar width into forwards."""
    batch: list[Pack] = []
    for pack in sorted(packs, key=lambda pack: len(pack.ids)):
        if batch:
            whole = (len(batch) + 1) * len(pack.ids)
            padding = whole - sum(len(other.ids) for other in (*batch, pack))
            # A text longer than packs with branches keeps the model's own mask, which may have a window.
            longer = len(batch[0].ids) <= WIDTH < len(pack.ids)
            if longer or whole > TOKENS or padding > PADDING:
                yield batch
                batch = []
        batch.append(pack)
    if batch:
        yield batch


def stack_packs(language_model: LanguageModel, packs: Sequence[Pack]) -> StackedPacks:
    """Stack packs into a batch, padded on the right. Without branches, use plain masks."""
    model, device = language_model.model, language_model.device
    width = max(len(pack.ids) for pack in packs)
    columns = torch.arange(width)
    ids = torch.full((len(packs), width), language_model.encoder.pad_id)
    # Padding attends only to itself, so that no row of attention is empty, and repeats a valid position.
    depths, ends = torch.zeros_like(ids), (columns + 1).repeat(len(packs), 1)
    for row, pack in enumerate(packs):
        for whole, part in ((ids, pack.ids), (depths, pack.depths), (ends, pack.ends)):
            whole[row, : len(part)] = torch.tensor(part)
    if any(pack.ends.count(len(pack.ids)) < len(pack.ids) for pack in packs):
        seen = (columns <= columns.unsqueeze(1)) & (columns.unsqueeze(1) < ends.unsqueeze(1))
        dtype = next(model.parameters()).dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
    else:
        mask = torch.ones_like(ids)  # no token looks ahead, so padding on the right needs no mask
    masks = forward_masks(model, to_device(mask, device), to_device(depths, device))
    return StackedPacks(to_device(ids, device), masks)


_TRIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def takes_branches(language_model: LanguageModel) -> bool:
    """Whether packs with branches give the same results as each text alone. Tested once per model.

    The test is as wide and deep as a pack can be, so that it also detects windowed attention.
    """
    model = language_model.model
    if model not in _TRIED:
        _TRIED[model] = _try_branches(language_model)
    return _TRIED[model]


@torch.no_grad()
def _try_branches(language_model: LanguageModel) -> bool:
    model: Any = language_model.model
    size = embedded_tokens(model)
    deepest = min(max(WIDTH - 8, 8), language_model.encoder.max_length)
    trunk, branch, other = ([(start + step * 7) % size for step in range(deepest)] for start in (3, 5, 11))
    stem = min(3, deepest - 1)
    texts = [trunk, trunk[:stem] + branch[:4], trunk[:stem] + other[:3]]
    texts = [text[:deepest] for text in texts]
    tolerance = TOLERANCE.get(next(model.parameters()).dtype, TOLERANCE_HALF)
    with frozen(model):
        alone = dict(_last_log_probs(language_model, pack_texts(texts, [0] * len(texts), branches=False)))
        try:
            together = dict(_last_log_probs(language_model, pack_texts(texts, [0] * len(texts), branches=True)))
        except (TypeError, ValueError, RuntimeError, IndexError):  # the errors with which models refuse such a mask
            return False
    return all(
        torch.allclose(together[number], alone[number], rtol=0.0, atol=tolerance, equal_nan=True) for number in alone
    )


def _last_log_probs(language_model: LanguageModel, packs: Sequence[Pack]) -> Iterator[tuple[int, Tensor]]:
    """Yield for each text its number and the log-probabilities of the next token."""
    model: Any = language_model.model
    for pack in packs:
        stacked = stack_packs(language_model, [pack])
        last = torch.tensor([columns[-1] for columns in pack.columns], device=language_model.device)
        with head_on(model, torch.zeros_like(last), last):
            logits = model(input_ids=stacked.input_ids, use_cache=False, **stacked.masks).logits[0]
        yield from zip(pack.texts, logits.double().log_softmax(-1).cpu(), strict=True)
