"""Context managers that look into a model or change one forward of it, and leave nothing behind."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rome_pl.architecture import decoder_layers

__all__ = [
    "PassThrough",
    "add_at_column",
    "add_rank_one",
    "capture_columns",
    "capture_input",
    "capture_output",
    "clean_padding",
    "frozen",
    "hash_seed",
    "head_on",
    "layer_answer",
    "put_at_column",
    "run_from_layer",
    "seeded",
    "stopped_after",
    "stopped_before",
]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; every module's own mode and every flag restored after."""
    # Only what has to change is touched: inside another such block this one costs next to nothing.
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators seeded inside; the CPU's and the device's own state restored after."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def hash_seed(*parts: object) -> int:
    """A seed that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


@contextmanager
def capture_columns(projection: nn.Module, rows: int, columns: slice) -> Iterator[dict[str, Tensor]]:
    """Keep a projection's input and output at some columns of the sequence.

    Args:
        projection: The module; its input may be ``[rows, length, d]`` or flattened to ``[rows · length, d]``.
        rows: Number of rows of the batch.
        columns: Columns to keep.

    Yields:
        A mapping that holds ``input`` and ``output``, ``[rows, columns, d]``, once the model has run.
    """
    kept: dict[str, Tensor] = {}

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept["input"] = inputs[0].reshape(rows, -1, inputs[0].shape[-1])[:, columns].detach().clone()
        kept["output"] = output.reshape(rows, -1, output.shape[-1])[:, columns].detach().clone()

    handle = projection.register_forward_hook(hook)
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

    A padding column on the left attends to nothing, which some attention kernels answer with NaN; and zero weight
    times NaN is NaN for every token that comes later.

    Args:
        model: The language model.
        attention_mask: ``[rows, length]``, 1 for tokens and 0 for padding.
    """
    padding = ~attention_mask.bool().unsqueeze(-1)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] != padding.shape[1]:
            return args, kwargs  # a later step of generation, which has no padding of its own
        hidden = hidden.masked_fill(padding, 0.0)
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
        value: What stands there instead.
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
def add_rank_one(projection: nn.Module, left: Tensor, right: Tensor) -> Iterator[None]:
    """Let each row see a rank-one change of the projection's weight of its own, which nobody writes.

    Args:
        projection: The module; its input may be ``[rows, length, d_key]`` or flattened.
        left: ``[rows, d_value]``.
        right: ``[rows, d_key]``; the change of a row's weight is ``left rightᵀ``.
    """

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        keys = inputs[0].reshape(right.shape[0], -1, right.shape[1])
        shares = keys @ right.to(keys.dtype).unsqueeze(2)
        return output + (shares * left.to(output.dtype).unsqueeze(1)).reshape(output.shape)

    handle = projection.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def head_on(model: Any, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Run the head on chosen positions only; the model then returns logits ``[1, positions, vocabulary]``.

    Hooking the head keeps what some families do to logits afterwards (scaling, soft-capping).
    """

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][rows, columns].unsqueeze(0), *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class PassThrough(nn.Module):
    """Stands in for a decoder layer that need not run; answers in the form the family's layers answer in."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        """The hidden states as they came."""
        return self.answer(hidden_states)


@contextmanager
def run_from_layer(
    model: nn.Module,
    layer: int,
    hidden: Tensor,
    answer: Callable[[Tensor], Any],
    stand_ins: Mapping[int, nn.Module] | None = None,
) -> Iterator[None]:
    """Skip the decoder layers below ``layer`` and feed it ``hidden`` instead of what the embedding gave.

    Args:
        model: The language model.
        layer: First decoder layer that runs.
        hidden: Hidden states that enter it, ``[rows, length, d]``.
        answer: Wraps hidden states the way this family's layers return them, see :func:`layer_answer`.
        stand_ins: Modules that run instead of other decoder layers, by index.
    """
    _, layers = decoder_layers(model)

    def feed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    originals = list(layers)
    handle = layers[layer].register_forward_pre_hook(feed, with_kwargs=True)
    try:
        for index in range(layer):
            layers[index] = PassThrough(answer)
        for index, module in (stand_ins or {}).items():
            layers[index] = module
        yield
    finally:
        for index, module in enumerate(originals):
            layers[index] = module
        handle.remove()


def layer_answer(output: Any) -> Callable[[Tensor], Any]:
    """How to wrap hidden states like ``output``, one decoder layer's own return value."""
    if isinstance(output, tuple):
        padding = (None,) * (len(output) - 1)
        return lambda hidden: (hidden, *padding)
    return lambda hidden: hidden


class _ReachedError(Exception):
    """Ends a forward whose later layers nobody needs."""


@contextmanager
def stopped_after(module: nn.Module) -> Iterator[None]:
    """End the forward inside once ``module`` has run; the rest of the block is skipped."""
    with _stopped(module.register_forward_hook):
        yield


@contextmanager
def stopped_before(module: nn.Module) -> Iterator[None]:
    """End the forward inside when ``module`` is about to run; hooks registered on its input earlier still do."""
    with _stopped(module.register_forward_pre_hook):
        yield


@contextmanager
def _stopped(register: Callable[..., Any]) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _ReachedError

    handle = register(stop)
    try:
        yield
    except _ReachedError:
        pass
    finally:
        handle.remove()
