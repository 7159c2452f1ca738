"""Context managers that read a model's activations or change a forward, and remove their hooks afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rome_pl.model.architecture import RewriteSite, decoder_layers

__all__ = [
    "add_at_column",
    "add_rank_one",
    "capture_columns",
    "capture_input",
    "capture_output",
    "clean_padding",
    "head_on",
    "put_at_column",
]


@contextmanager
def capture_columns(place: nn.Module | RewriteSite, rows: int, columns: slice) -> Iterator[dict[str, Tensor]]:
    """Keep a projection's input and output at some columns of the sequence.

    Args:
        place: The module, or a rewrite site, whose keys and values are kept. Inputs may be ``[rows, length, d]`` or
            flattened to ``[rows · length, d]``.
        rows: Number of rows of the batch.
        columns: Columns to keep.

    Yields:
        A mapping that holds ``input`` and ``output``, ``[rows, columns, d]``, once the model has run.
    """
    kept: dict[str, Tensor] = {}

    def part(tensor: Tensor) -> Tensor:
        return tensor.reshape(rows, -1, tensor.shape[-1])[:, columns]

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if isinstance(place, RewriteSite):
            key, value = place.lookup(args, kwargs, output, part)
        else:
            key, value = part(args[0]), part(output)
        kept["input"], kept["output"] = key.detach().clone(), value.detach().clone()

    handle = _projection(place).register_forward_hook(hook, with_kwargs=True)
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def capture_input(module: nn.Module, columns: slice) -> Iterator[dict[str, Tensor]]:
    """Keep the hidden states ``[rows, columns, d]`` that enter a decoder layer, under ``hidden``."""
    kept: dict[str, Tensor] = {}

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        kept["hidden"] = hidden[:, columns].detach().clone()

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def capture_output(layer: nn.Module, columns: slice) -> Iterator[dict[str, Tensor]]:
    """Keep the hidden states ``[rows, columns, d]`` that leave a decoder layer, under ``hidden``."""
    kept: dict[str, Tensor] = {}

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        kept["hidden"] = hidden[:, columns].detach().clone()

    handle = layer.register_forward_hook(hook)
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def clean_padding(model: nn.Module, attention_mask: Tensor) -> Iterator[None]:
    """Zero the hidden states of padding as they enter each decoder layer.

    A padding column on the left attends to nothing, for which some attention kernels return NaN. Zero weight times NaN
    is NaN for every later token.

    Args:
        model: The language model.
        attention_mask: ``[rows, length]``, 1 for tokens and 0 for padding.
    """
    padding = ~attention_mask.bool().unsqueeze(-1)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] != padding.shape[1]:
            return args, kwargs  # a later step of generation has no padding
        # Some models carry several streams of hidden states, [rows, length, streams, d].
        hidden = hidden.masked_fill(padding.reshape(*padding.shape[:2], *(1 for _ in hidden.shape[2:])), 0.0)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in decoder_layers(model)[1]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def add_at_column(projection: nn.Module, delta: Tensor, column: int = 0) -> Iterator[None]:
    """Add ``delta``, ``[rows, d_value]``, to a projection's output at one column."""

    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows = output.reshape(delta.shape[0], -1, output.shape[-1])
        moved = rows[:, column : column + 1] + delta.to(output.dtype).unsqueeze(1)
        return torch.cat([rows[:, :column], moved, rows[:, column + 1 :]], dim=1).reshape(output.shape)

    handle = projection.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def put_at_column(module: nn.Module, value: Tensor, rows: int, chosen: Sequence[int], column: int) -> Iterator[None]:
    """Replace a module's output at one column of some rows by ``value``, ``[d]``.

    Args:
        module: The module; its output may be ``[rows, length, d]`` or flattened to ``[rows · length, d]``.
        value: The new output there, ``[d]``.
        rows: Number of rows of the batch.
        chosen: The rows that change.
        column: The column.
    """

    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        states = output.reshape(rows, -1, output.shape[-1]).clone()
        states[chosen, column] = value.to(states.dtype)
        return states.reshape(output.shape)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def add_rank_one(place: nn.Module | RewriteSite, left: Tensor, right: Tensor) -> Iterator[None]:
    """Apply a rank-one change of the projection's weight to each row, without writing it.

    Args:
        place: The module or the rewrite site; its input may be ``[rows, length, d_key]`` or flattened.
        left: ``[rows, d_value]``.
        right: ``[rows, d_key]``; the change of a row's weight is ``left rightᵀ``.
    """

    def part(tensor: Tensor) -> Tensor:
        return tensor.reshape(right.shape[0], -1, tensor.shape[-1])

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        keys = place.keys(args, kwargs, part) if isinstance(place, RewriteSite) else part(args[0])
        shares = (keys @ right.to(keys.dtype).unsqueeze(2)).to(output.dtype)
        return output + (shares * left.to(output.dtype).unsqueeze(1)).reshape(output.shape)

    handle = _projection(place).register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def head_on(model: Any, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Run the head on chosen positions only; the model then returns logits ``[1, positions, vocabulary]``.

    The hook on the head keeps later changes of logits in some families (scaling, soft-capping).
    """

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][rows, columns].unsqueeze(0), *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _projection(place: nn.Module | RewriteSite) -> nn.Module:
    return place.projection if isinstance(place, RewriteSite) else place
