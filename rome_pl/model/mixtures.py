r"""Mixtures of experts as rewrite sites.

For one token the experts give :math:`y = \sum_e g_e (W_e k_e + b_e)`. The sum runs over the experts that the router
picks, :math:`g_e` are the router's weights, and :math:`k_e` is what enters the last product of expert :math:`e`.
This is one projection :math:`W k` with

.. math:: W = [W_1 \dots W_E], \qquad k = [g_1 k_1; \dots; g_E k_E]

where the part of an expert that is not picked is zero. So a mixture is edited like any dense layer: its key is the
parts of all experts one behind the other, and the closed form shares a write among the picked experts by itself. The
router is not touched. Biases :math:`g_e b_e`, and a shared expert that runs for every token, stay outside.

No family is recognised by name. The experts are the module that holds a 3-d parameter for each projection. It is called
with hidden states, the picked experts and their weights. Its own code is run with made-up tokens, to see which
parameter it multiplies last, and that the sum above is what it gives.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from rome_pl.errors import first_line
from rome_pl.model.rewrite_site import RewriteSite, UnsupportedModelError

__all__ = ["MixtureSite", "find_mixture"]

LARGEST_ERROR = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative error of the sum over experts; 0.05 in half precision."""

TOKENS = 6
"""Made-up tokens that the experts are tried with."""


@dataclass(frozen=True)
class MixtureSite(RewriteSite):
    """The last projections of a layer's experts, as one projection.

    Args:
        layer: Index of the decoder layer, from 0.
        name: Dotted name of the weight in the model's ``state_dict``.
        projection: The module of all experts. Its output is the value, together with biases.
        transposed: Whether the weight is stored as ``[experts, d_expert, d_value]``.
        parameter: Name of the weight in the module.
        picked: Number of experts that the router picks for a token.
    """

    parameter: str
    picked: int

    @property
    @override
    def weight(self) -> nn.Parameter:
        return self.projection.get_parameter(self.parameter)

    @property
    @override
    def bias(self) -> Tensor | None:
        return None  # the experts' own biases depend on the router and are left out of values

    @property
    @override
    def experts(self) -> int:
        return len(self.weight)

    @property
    @override
    def d_key(self) -> int:
        return self.experts * int(self.weight.shape[1 if self.transposed else 2])

    @property
    @override
    def d_value(self) -> int:
        return int(self.weight.shape[2 if self.transposed else 1])

    @property
    @override
    def least_text(self) -> int:
        return -(-self.d_key // self.picked)

    @override
    def matrix(self, weight: Tensor) -> Tensor:
        by_input = weight if self.transposed else weight.mT
        return by_input.reshape(self.d_key, self.d_value).T

    @override
    def stored(self, matrix: Tensor) -> Tensor:
        by_input = matrix.T.reshape(self.experts, -1, self.d_value)
        return by_input if self.transposed else by_input.mT

    @override
    def keys(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], part: Callable[[Tensor], Tensor]) -> Tensor:
        return self._read(args, kwargs, part)[0]

    @override
    def lookup(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor, part: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        keys, rest = self._read(args, kwargs, part)
        return keys, part(output) - rest

    def _read(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], part: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The keys of some tokens, and what the experts give for them besides the weight's products."""
        hidden, index, gates = (part(tensor) for tensor in _routing(args, kwargs))
        picks, around = index.shape[-1], index.shape[:-1]
        # Every pair of a token and a picked expert as a token of its own, which that expert alone gets.
        hidden = hidden.reshape(-1, hidden.shape[-1]).repeat_interleave(picks, 0)
        index, gates = index.reshape(-1, 1), gates.reshape(-1, 1)
        if not bool(((index >= 0) & (index < self.experts)).all()):
            raise UnsupportedModelError(
                f"layer {self.layer}: the router picks experts beyond the {self.experts} that are here; run the model "
                "without expert parallelism"
            )
        products = _LastProducts(self.weight, self.d_value)
        with products:
            rest = _own_code(self.projection)(self.projection, hidden, index, gates)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        keys = hidden.new_zeros(len(hidden), self.d_key // self.experts, dtype=wide)
        for expert, found in products.inputs.items():
            keys[index[:, 0] == expert] = found.to(wide)
        places = index.reshape(-1, picks, 1).expand(-1, -1, keys.shape[1])
        whole = keys.new_zeros(len(places), self.experts, keys.shape[1])
        whole.scatter_add_(1, places, (keys * gates.to(wide)).reshape(places.shape))
        rest = rest.reshape(-1, picks, self.d_value).sum(1)
        return whole.reshape(*around, self.d_key), rest.reshape(*around, self.d_value)


class _LastProducts(TorchFunctionMode):
    """Keeps what is multiplied with each expert's matrix, and gives zeros as the product.

    Args:
        weight: The parameter of all experts.
        size: Length of a product.
    """

    def __init__(self, weight: Tensor, size: int) -> None:
        super().__init__()
        self._weight, self._size = weight, size
        self.inputs: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        expert = _expert_of(self._weight, args[1]) if len(args) > 1 and _is_product(func) else None
        if expert is None:
            return func(*args, **(kwargs or {}))
        if expert in self.inputs:
            raise _OtherFormError("they use a matrix more than once")
        self.inputs[expert] = args[0]
        return args[0].new_zeros(*args[0].shape[:-1], self._size)


class _Uses(TorchFunctionMode):
    """Notes which parameter is multiplied last, and how."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._parameters = parameters
        self.last: tuple[str, bool] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(args) > 1 and _is_product(func):
            for name, parameter in self._parameters.items():
                if _expert_of(parameter, args[1]) is not None:
                    linear = func is nn.functional.linear
                    straight = args[1].stride() == parameter.stride()[1:]
                    self.last = name, straight is not linear
        return func(*args, **(kwargs or {}))


class _OtherFormError(Exception):
    """Experts of a form that cannot be read. The message completes a sentence about them."""


def _is_product(func: Any) -> bool:
    return getattr(func, "__name__", "") in ("linear", "matmul", "mm", "__matmul__")


def _expert_of(weight: Tensor, operand: Any) -> int | None:
    """Whose matrix an operand is, a view of a parameter of all experts."""
    if not isinstance(operand, Tensor) or operand.ndim != 2 or operand.numel() != weight[0].numel():
        return None
    if operand.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        return None
    return (operand.storage_offset() - weight.storage_offset()) // weight.stride(0)


def _own_code(module: nn.Module) -> Callable[..., Tensor]:
    """The code of the experts themselves, below other implementations of it that transformers may put in its place."""
    code: Callable[..., Tensor] = inspect.unwrap(type(module).forward)
    return code


def _routing(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, picked experts and their weights, each with a row for every token."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    picks = [tensor for tensor in tensors if not tensor.is_floating_point() and tensor.dtype is not torch.bool]
    if tensors and len(picks) == 1:
        gates = [t for t in tensors[1:] if t.is_floating_point() and t.shape == picks[0].shape]
        if len(gates) == 1 and tensors[0].is_floating_point():
            return tensors[0], picks[0], gates[0]
    raise UnsupportedModelError(
        "a mixture of experts that calls its experts with other things than hidden states, the picked experts and "
        f"their weights (tensors of {[tuple(tensor.shape) for tensor in tensors]}) cannot be edited; choose a layer "
        "with a dense MLP"
    )


def find_mixture(model: Any, layer: int, prefix: str, outside: Sequence[tuple[str, nn.Module]]) -> MixtureSite:
    """Find the experts of a layer that is a mixture.

    Args:
        model: The language model.
        layer: Index of the decoder layer.
        prefix: Dotted name of the layer.
        outside: Modules of the layer that are not part of attention, with their names in it.

    Raises:
        UnsupportedModelError: If they have a form that cannot be edited, with the reason.
    """
    where = f"layer {layer} of {type(model).__name__}"
    held = [(name, module) for name, module in outside if _stacked(module)]
    try:
        if not held:
            raise _OtherFormError(
                "they are no module with one 3-d parameter of floating-point numbers for each projection"
            )
        if len(held) > 1:
            raise _OtherFormError(f"they are spread over {', '.join(repr(name) for name, _ in held)}")
        name, module = held[0]
        parameter, transposed, width = _last_parameter(module)
        site = MixtureSite(
            layer, f"{prefix}.{name}.{parameter}", module, transposed, parameter, _number_picked(model, outside)
        )
        _check_sum(site, width)
    except _OtherFormError as error:
        raise UnsupportedModelError(
            f"{where} is a mixture of experts that cannot be edited: {error}; choose a layer with a dense MLP"
        ) from error
    return site


def _stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that hold one matrix for each of several experts."""
    found = {name: one for name, one in module.named_parameters(recurse=False) if one.ndim == 3 and len(one) > 1}
    return {} if isinstance(module, nn.Conv1d) else found


def _made_up(weight: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of some tokens, two experts for each, and weights."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, width, generator=generator).to(weight)
    index = torch.stack([torch.randperm(min(len(weight), 3), generator=generator)[:2] for _ in range(TOKENS)])
    gates = torch.rand(TOKENS, 2, generator=generator).to(weight)
    return hidden, index.to(weight.device), gates


@torch.no_grad()
def _last_parameter(module: nn.Module) -> tuple[str, bool, int]:
    """Which parameter is multiplied last, whether its matrices are stored as ``[in, out]``, and the width of tokens."""
    parameters, reason = _stacked(module), ""
    if not all(one.is_floating_point() for one in parameters.values()):
        raise _OtherFormError("they hold quantised weights: load the model in float32, bfloat16 or float16")
    weight = next(iter(parameters.values()))
    for width in sorted(set(weight.shape[1:])):  # one of them is that of the hidden states
        uses = _Uses(parameters)
        try:
            with uses:
                _own_code(module)(module, *_made_up(weight, width))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # code of any family
            reason = first_line(error)
            continue
        if uses.last is not None:
            return *uses.last, width
        reason = "none of its parameters is multiplied expert by expert"
    raise _OtherFormError(
        f"{type(module).__name__} does not run with hidden states, picked experts and their weights ({reason})"
    )


def _number_picked(model: Any, outside: Sequence[tuple[str, nn.Module]]) -> int:
    config = model.config.get_text_config(decoder=True)
    said = [getattr(module, "top_k", None) for _, module in outside] + [getattr(config, "num_experts_per_tok", None)]
    return next((number for number in said if isinstance(number, int) and number > 0), 1)


@torch.no_grad()
def _check_sum(site: MixtureSite, width: int) -> None:
    """Refuse experts that do not give the sum of their products, weighted by the router's weights."""
    routed = _made_up(site.weight, width)
    given = _own_code(site.projection)(site.projection, *routed)
    try:
        keys, values = site.lookup(routed, {}, given, lambda tensor: tensor)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code of any family
        raise _OtherFormError(f"their keys cannot be read ({first_line(error)})") from error
    off = (keys.double() @ site.matrix(site.weight).double().T - values.double()).norm() / given.double().norm()
    if not bool(off <= LARGEST_ERROR.get(site.weight.dtype, 0.05)):
        raise _OtherFormError(
            f"what they give is not the sum of their last products by the router's weights ({float(off):.0%} off)"
        )
