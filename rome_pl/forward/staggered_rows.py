"""Rows that join a forward at different layers, so that known hidden states below cost nothing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rome_pl.forward.partial import PassThrough, StandIn
from rome_pl.model.architecture import decoder_layers

__all__ = ["join_layers"]


@contextmanager
def join_layers(
    model: nn.Module, hidden: Tensor, running: Sequence[int], answer: Callable[[Tensor], Any]
) -> Iterator[None]:
    """Let each decoder layer run the first rows of a batch only, and leave the others as they are.

    Args:
        model: The language model. Its masks and positions are made for all rows.
        hidden: For each row the hidden states that enter the first layer that it runs through,
            ``[rows, length, d]``; rows in the order in which they join.
        running: How many rows run through each layer, never fewer than through the one below.
        answer: Wraps hidden states the way this family's layers return them, see
            :func:`rome_pl.forward.partial.layer_answer`.
    """
    layers = decoder_layers(model)[1]
    originals = list(layers)
    first = next((index for index, number in enumerate(running) if number), len(originals))
    try:
        for index, layer in enumerate(originals):
            if index < first:
                layers[index] = PassThrough(layer, answer)
            else:
                layers[index] = _Joined(layer, running[index], answer, hidden if index == first else None)
        yield
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


class _Joined(StandIn):
    """Replaces a decoder layer and runs it on the first rows only."""

    def __init__(self, layer: nn.Module, rows: int, answer: Callable[[Tensor], Any], start: Tensor | None) -> None:
        super().__init__(layer)
        self.layer, self.rows, self.answer, self.start = layer, rows, answer, start

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_states if self.start is None else self.start
        every, rows = len(hidden), self.rows
        output = self.layer(
            hidden[:rows],
            *(_first_rows(argument, rows, every) for argument in args),
            **{name: _first_rows(argument, rows, every) for name, argument in kwargs.items()},
        )
        ran = output[0] if isinstance(output, tuple) else output
        return self.answer(ran if rows == every else torch.cat([ran, hidden[rows:]]))


def _first_rows(argument: Any, rows: int, every: int) -> Any:
    """Cut a mask, positions or their embeddings to the first rows.

    Rows are the first dimension of all of these, in ALiBi's biases multiplied by the heads. It is 1 for a tensor shared
    by all rows.
    """
    if isinstance(argument, tuple):
        return tuple(_first_rows(part, rows, every) for part in argument)
    if not isinstance(argument, Tensor) or argument.ndim < 2 or argument.shape[0] % every:
        return argument
    return argument[: argument.shape[0] // every * rows]
