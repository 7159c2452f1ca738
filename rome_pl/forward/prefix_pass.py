"""The prefix pass and the suffix forward: run only the part that a value offset can change.

Nothing before the rewrite layer or before the lookup token depends on the offset. The columns before the lookup column
run once, and attention's keys and values are kept. The other columns run once up to the rewrite layer, and the hidden
states that enter it are kept. Each later forward starts from these two.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rome_pl.encoding.aligned_rows import AlignedRows, align, to_device
from rome_pl.encoding.encoded_rows import EncodedRow
from rome_pl.forward.hooks import (
    add_at_column,
    add_rank_one,
    capture_columns,
    capture_input,
    capture_output,
    clean_padding,
    head_on,
)
from rome_pl.forward.partial import cache_of, forward_masks, layer_answer, run_from_layer, stopped_after
from rome_pl.model.architecture import RewriteSite, decoder_layers
from rome_pl.utils.restored_state import frozen

__all__ = ["Lookup", "PrefixPass", "run_prefix"]

GROUP_TOKENS = 256
"""Smallest number of tokens in a forward of rows with similar prefix lengths, which need little padding."""


@dataclass(frozen=True)
class Lookup:
    """Activations at the lookup column of a rewrite layer, for each row.

    Args:
        keys: The projection's input, ``[rows, d_key]``.
        outputs: Its output, bias included, ``[rows, d_value]``.
        hidden: Hidden states leaving the decoder layer, ``[rows, hidden]``.
    """

    keys: Tensor
    outputs: Tensor
    hidden: Tensor


@dataclass
class PrefixPass:
    """The results of a prefix pass, from which suffix forwards start.

    Args:
        model: The language model.
        site: The projection at which an offset enters.
        rows: The aligned rows.
        pad_id: Id that fills the padding.
        keys: The projection's input at the lookup column, ``[rows, d_key]``.
        outputs: Its output there, bias included, ``[rows, d_value]``.
        hidden: Hidden states entering the rewrite layer from column ``start`` on, ``[rows, length, hidden]``.
        cache: For each layer from the site's on, attention's keys and values of the columns before ``start``, each
            ``[rows, heads, start, d_head]``.
        answer: Wraps hidden states as the family's decoder layers return them.
        start: First column that suffix forwards run: the lookup column, or 0 if whole rows have to run.
        stand_ins: Modules that run instead of decoder layers above the site, by index.
        below: The same pass as seen from lower rewrite layers, the lowest first.
    """

    model: Any
    site: RewriteSite
    rows: AlignedRows
    pad_id: int
    keys: Tensor
    outputs: Tensor
    hidden: Tensor
    cache: list[tuple[Tensor, Tensor]]
    answer: Any
    start: int
    stand_ins: Mapping[int, nn.Module] = field(default_factory=dict)
    below: tuple["PrefixPass", ...] = ()

    def logits(self, delta: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """Logits at chosen positions with ``delta`` added at the lookup column; differentiable in ``delta``.

        Args:
            delta: Value offsets, ``[rows, d_value]``.
            positions: Row and column indices; columns count whole rows and lie at or after the lookup column.

        Returns:
            Shape ``[positions, vocabulary]``.
        """
        rows, start = self.rows, self.start
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            stack.enter_context(run_from_layer(self.model, self.site.layer, self.hidden, self.answer, self.stand_ins))
            stack.enter_context(add_at_column(self.site.projection, delta, rows.prefix - start))
            stack.enter_context(head_on(self.model, positions[0], positions[1] - start))
            if start < rows.prefix:
                stack.enter_context(clean_padding(self.model, rows.attention_mask))
            output = self.model(
                input_ids=rows.input_ids[:, start:],
                **self._fresh_cache(),
                **forward_masks(self.model, rows.attention_mask, rows.position_ids[:, start:]),
            )
        logits: Tensor = output.logits[0]
        return logits

    def select(self, rows: Sequence[int]) -> "PrefixPass":
        """Return the pass for some of the rows, in the order given, without padding that only other rows needed."""
        if list(rows) == list(range(len(self.rows.source))):
            return self
        index = to_device(torch.tensor(list(rows)), self.hidden.device)
        aligned = align([self.rows.source[row] for row in rows], self.pad_id, self.hidden.device)
        cut = self.rows.prefix - aligned.prefix
        first = 0 if self.start else cut
        return replace(
            self,
            rows=aligned,
            keys=self.keys[index],
            outputs=self.outputs[index],
            hidden=self.hidden[index, first : self.hidden.shape[1] - self.rows.suffix + aligned.suffix],
            cache=[(keys[index, :, cut:], values[index, :, cut:]) for keys, values in self.cache],
            start=aligned.prefix if self.start else 0,
            below=(),
        )

    @torch.no_grad()
    def through(self, sites: Sequence[RewriteSite], changes: Sequence[tuple[Tensor, Tensor]] = ()) -> list[Lookup]:
        """Run the lookup column from this pass's layer on, with the present weights.

        The effect of these weights on earlier columns is left out, as it is for an offset, unless whole rows have to
        run.

        Args:
            sites: The rewrite layers from this pass's own on, the lowest first; nothing above the last one runs.
            changes: For each of the first sites a change of its weight, per row, as factors ``[rows, d_value]`` and
                ``[rows, d_key]``.

        Returns:
            For each site its activations at the lookup column.
        """
        rows, start = self.rows, self.start
        last = rows.prefix + 1  # later columns have no effect on it
        column = slice(rows.prefix - start, rows.prefix - start + 1)
        layers = decoder_layers(self.model)[1]
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            stack.enter_context(
                run_from_layer(self.model, self.site.layer, self.hidden[:, : last - start], self.answer)
            )
            for site, (left, right) in zip(sites, changes, strict=False):
                stack.enter_context(add_rank_one(site, left, right))
            seen = [stack.enter_context(capture_columns(site, len(rows.source), column)) for site in sites]
            leaving = [stack.enter_context(capture_output(layers[site.layer], column)) for site in sites]
            stack.enter_context(clean_padding(self.model, rows.attention_mask[:, :last]))
            with stopped_after(layers[sites[-1].layer]):
                self.model(
                    input_ids=rows.input_ids[:, start:last],
                    **self._fresh_cache(),
                    **forward_masks(self.model, rows.attention_mask[:, :last], rows.position_ids[:, start:last]),
                )
        return [
            Lookup(at["input"][:, 0], at["output"][:, 0], hidden["hidden"][:, 0])
            for at, hidden in zip(seen, leaving, strict=True)
        ]

    def _fresh_cache(self) -> dict[str, Any]:
        """Build a new cache of the prefix that a forward may extend, so that no graph outlives its step."""
        if not self.cache:
            return {"use_cache": False}
        return {"past_key_values": cache_of(self.cache, self.site.layer), "use_cache": True}


@torch.no_grad()
def run_prefix(
    model: Any,
    site: RewriteSite,
    rows: Sequence[EncodedRow],
    pad_id: int,
    whole_rows: bool = False,
    below: Sequence[RewriteSite] = (),
) -> PrefixPass:
    """Run rows once, as far as an offset cannot change them, and keep the results that later forwards need.

    Args:
        model: The language model.
        site: The projection at which offsets will enter.
        rows: Rows of one or more edits.
        pad_id: Id that fills the padding.
        whole_rows: Whether later forwards have to run all columns, because the model's cache cannot replace some.
        below: Lower rewrite layers, the lowest first, from which forwards will start too.
    """
    device, sites = site.weight.device, (*below, site)
    aligned = align(rows, pad_id, device)
    start, (_, layers) = 0 if whole_rows else aligned.prefix, decoder_layers(model)
    answers: list[Any] = []
    lookup = slice(aligned.prefix - start, aligned.prefix - start + 1)
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        cache = [] if whole_rows else _run_columns_before_lookup(model, rows, start, pad_id, device)
        seen = [stack.enter_context(capture_columns(one, len(rows), lookup)) for one in sites]
        entering = [stack.enter_context(capture_input(layers[one.layer], slice(None))) for one in sites]
        handle = layers[site.layer].register_forward_hook(lambda _, __, output: answers.append(layer_answer(output)))
        stack.callback(handle.remove)
        if whole_rows:
            stack.enter_context(clean_padding(model, aligned.attention_mask))
            options: dict[str, Any] = {"use_cache": False}
        else:
            options = {"past_key_values": cache_of(cache[: site.layer + 1], 0), "use_cache": True}
        with stopped_after(layers[site.layer]):
            model(
                input_ids=aligned.input_ids[:, start:],
                **options,
                **forward_masks(model, aligned.attention_mask, aligned.position_ids[:, start:]),
            )
    passes = [
        PrefixPass(
            model=model,
            site=one,
            rows=aligned,
            pad_id=pad_id,
            keys=at_lookup["input"][:, 0],
            outputs=at_lookup["output"][:, 0],
            hidden=hidden["hidden"],
            cache=cache[one.layer :],
            answer=answers[0],
            start=start,
        )
        for one, at_lookup, hidden in zip(sites, seen, entering, strict=True)
    ]
    return replace(passes[-1], below=tuple(passes[:-1]))


def _run_columns_before_lookup(
    model: Any, rows: Sequence[EncodedRow], prefix: int, pad_id: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Attention's keys and values before the lookup column, one pair per layer, ``[rows, heads, prefix, d_head]``."""
    joined: list[tuple[Tensor, Tensor]] = []
    for group in _groups([row.lookup for row in rows]):
        # Rows are cut before their lookup tokens and aligned at their last tokens, so all end in the same column.
        heads = [EncodedRow(rows[i].ids[: rows[i].lookup], rows[i].lookup - 1, (), 0) for i in group]
        aligned = align(heads, pad_id, device)
        cache = DynamicCache()
        nowhere = aligned.predict_row
        with clean_padding(model, aligned.attention_mask), head_on(model, nowhere, nowhere):
            model(
                input_ids=aligned.input_ids,
                past_key_values=cache,
                use_cache=True,
                **forward_masks(model, aligned.attention_mask, aligned.position_ids),
            )
        index, width = torch.tensor(group, device=device), aligned.input_ids.shape[1]
        for layer, made in enumerate(cache.layers):
            if layer == len(joined):
                joined.append((_room(made.keys, len(rows), prefix), _room(made.values, len(rows), prefix)))
            for whole, part in zip(joined[layer], (made.keys, made.values), strict=True):
                whole[index, :, prefix - width :] = part
    return joined


def _room(part: Tensor, rows: int, prefix: int) -> Tensor:
    return part.new_zeros(rows, part.shape[1], prefix, part.shape[3])


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield indices of rows with a prefix, grouped by similar length."""
    group: list[int] = []
    for index in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        if group and lengths[index] < lengths[group[0]] and len(group) * lengths[group[0]] >= GROUP_TOKENS:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
