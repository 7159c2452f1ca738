"""The prefix pass and the suffix forward: run only what a value offset can change.

Nothing before the rewrite layer and nothing before the lookup token depends on the offset. One forward over whole rows
keeps the keys and values (attention's) of every column before the lookup column, and the hidden states that enter the
rewrite layer from the lookup column on. Each later forward starts there.
"""

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rome_pl.architecture import RewriteSite, decoder_layers
from rome_pl.encoding import AlignedRows, EncodedRow, align
from rome_pl.hooks import (
    add_at_column,
    capture_columns,
    capture_input,
    clean_padding,
    frozen,
    head_on,
    layer_answer,
    run_from_layer,
)

__all__ = ["PrefixPass", "run_prefix"]


@dataclass
class PrefixPass:
    """What one forward over whole rows leaves for the suffix forwards.

    Args:
        model: The language model.
        site: The projection at which an offset enters.
        rows: The aligned rows.
        keys: The projection's input at the lookup column, ``[rows, d_key]``.
        outputs: Its output there, bias included, ``[rows, d_value]``.
        hidden: Hidden states entering the rewrite layer from the lookup column on, ``[rows, suffix, hidden]``.
        cache: Attention keys and values of the columns before the lookup column, for the layers from the site's on.
        answer: Wraps hidden states as the family's decoder layers return them.
    """

    model: Any
    site: RewriteSite
    rows: AlignedRows
    keys: Tensor
    outputs: Tensor
    hidden: Tensor
    cache: list[tuple[Tensor, Tensor]]
    answer: Any

    def logits(self, delta: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """Logits at chosen positions with ``delta`` added at the lookup column; differentiable in ``delta``.

        Args:
            delta: Value offsets, ``[rows, d_value]``.
            positions: Row and column indices; columns count whole rows and lie at or after the lookup column.

        Returns:
            Shape ``[positions, vocabulary]``.
        """
        rows = self.rows
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            stack.enter_context(run_from_layer(self.model, self.site.layer, self.hidden, self.answer))
            stack.enter_context(add_at_column(self.site.projection, delta))
            stack.enter_context(head_on(self.model, positions[0], positions[1] - rows.prefix))
            output = self.model(
                input_ids=rows.input_ids[:, rows.prefix :],
                past_key_values=self._fresh_cache(),
                use_cache=True,
                **forward_masks(self.model, rows.attention_mask, rows.position_ids[:, rows.prefix :]),
            )
        logits: Tensor = output.logits[0]
        return logits

    def _fresh_cache(self) -> DynamicCache:
        """A cache of the prefix that a forward may extend. Built anew each time, so no graph outlives its step."""
        # Without the model's config every layer keeps all columns, also where attention slides: the mask does that.
        cache = DynamicCache()
        if self.rows.prefix == 0:
            return cache
        # The layers that are skipped still tell the model how long the prefix is.
        length = self.keys.new_zeros(len(self.keys), 1, self.rows.prefix, 1)
        for layer in range(self.site.layer):
            cache.update(length, length, layer)
        for layer, (keys, values) in enumerate(self.cache, start=self.site.layer):
            cache.update(keys, values, layer)
        return cache


@torch.no_grad()
def run_prefix(model: Any, site: RewriteSite, rows: Sequence[EncodedRow], pad_id: int) -> PrefixPass:
    """Run whole rows once and keep what later forwards need.

    Args:
        model: The language model.
        site: The projection at which offsets will enter.
        rows: Rows of one or more edits.
        pad_id: Id that fills the padding.
    """
    aligned = align(rows, pad_id, site.weight.device)
    count, prefix = len(rows), aligned.prefix
    _, layers = decoder_layers(model)
    cache = DynamicCache()
    answers: list[Any] = []
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        at_lookup = stack.enter_context(capture_columns(site.projection, count, slice(prefix, prefix + 1)))
        entering = stack.enter_context(capture_input(layers[site.layer], slice(prefix, None)))
        handle = layers[site.layer].register_forward_hook(lambda _, __, output: answers.append(layer_answer(output)))
        stack.callback(handle.remove)
        stack.enter_context(clean_padding(model, aligned.attention_mask))
        nowhere = aligned.predict_row[:0]
        stack.enter_context(head_on(model, nowhere, nowhere))
        model(
            input_ids=aligned.input_ids,
            past_key_values=cache,
            use_cache=True,
            **forward_masks(model, aligned.attention_mask, aligned.position_ids),
        )
    kept = [(layer.keys[:, :, :prefix], layer.values[:, :, :prefix]) for layer in cache.layers[site.layer :]]
    return PrefixPass(
        model=model,
        site=site,
        rows=aligned,
        keys=at_lookup["input"][:, 0],
        outputs=at_lookup["output"][:, 0],
        hidden=entering["hidden"],
        cache=[(keys.clone(), values.clone()) for keys, values in kept],
        answer=answers[0],
    )


def forward_masks(model: Any, attention_mask: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
    """Mask and positions in the form the model takes; BLOOM reads its positions off the mask."""
    masks = {"attention_mask": attention_mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        masks["position_ids"] = position_ids
    return masks
