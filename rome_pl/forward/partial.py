"""Parts of a forward: starting at a layer, ending at a module, caches and masks."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from rome_pl.model.architecture import decoder_layers
from rome_pl.model.supported import first_position

__all__ = [
    "PassThrough",
    "StandIn",
    "cache_of",
    "forward_masks",
    "layer_answer",
    "run_from_layer",
    "stopped_after",
    "stopped_before",
]


class StandIn(nn.Module):
    """Replaces a decoder layer. What it has not itself, such as the kind of the layer, is read from the layer.

    Args:
        layer: The layer, which is no part of this module.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        vars(self)["replaced"] = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["replaced"], name)


class PassThrough(StandIn):
    """Replaces a decoder layer that need not run. Returns hidden states in the form of the family's layers."""

    def __init__(self, layer: nn.Module, answer: Callable[[Tensor], Any]) -> None:
        super().__init__(layer)
        self.answer = answer

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        """Return the hidden states unchanged."""
        return self.answer(hidden_states)


@contextmanager
def run_from_layer(
    model: nn.Module,
    layer: int,
    hidden: Tensor,
    answer: Callable[[Tensor], Any],
    stand_ins: Mapping[int, nn.Module] | None = None,
) -> Iterator[None]:
    """Skip the decoder layers below ``layer`` and feed it ``hidden``.

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
            layers[index] = PassThrough(originals[index], answer)
        for index, module in (stand_ins or {}).items():
            layers[index] = module
        yield
    finally:
        for index, module in enumerate(originals):
            layers[index] = module
        handle.remove()


def layer_answer(output: Any) -> Callable[[Tensor], Any]:
    """Return a function that wraps hidden states like ``output``, the return value of a decoder layer."""
    if isinstance(output, tuple):
        padding = (None,) * (len(output) - 1)
        return lambda hidden: (hidden, *padding)
    return lambda hidden: hidden


class _ReachedError(Exception):
    """Ends a forward before layers that are not needed."""


@contextmanager
def stopped_after(module: nn.Module) -> Iterator[None]:
    """End the forward inside once ``module`` has run; the rest of the block is skipped."""
    with _stopped(module.register_forward_hook):
        yield


@contextmanager
def stopped_before(module: nn.Module) -> Iterator[None]:
    """End the forward inside right before ``module`` runs; hooks registered earlier on its input still run."""
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


def cache_of(kept: Sequence[tuple[Tensor, Tensor]], first: int) -> DynamicCache:
    """Build a cache with the given keys and values for the layers from ``first`` on."""
    # Without the model's config every layer keeps all columns, even with sliding attention, which the mask handles.
    cache = DynamicCache()
    if not kept or kept[0][0].shape[2] == 0:
        return cache
    # The model reads the length of the prefix from the skipped layers.
    keys = kept[0][0]
    length = keys.new_zeros(keys.shape[0], 1, keys.shape[2], 1)
    for layer in range(first):
        cache.update(length, length, layer)
    for layer, (keys, values) in enumerate(kept, start=first):
        cache.update(keys, values, layer)
    return cache


def forward_masks(model: Any, attention_mask: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
    """Return mask and positions in the form that the model takes. BLOOM derives positions from the mask.

    Args:
        model: The language model.
        attention_mask: Its attention mask.
        position_ids: Positions, counted from 0.
    """
    masks = {"attention_mask": attention_mask}
    # A PEFT model passes on arguments that its own forward does not name.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    first = first_position(model)
    if "position_ids" in inspect.signature(inner.forward).parameters and first is not None:
        masks["position_ids"] = position_ids + first if first else position_ids
    return masks
