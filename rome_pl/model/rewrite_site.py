"""The projection that an edit rewrites: where it is, how it keeps its weight, and how its keys are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rome_pl.errors import RomeError

__all__ = ["RewriteSite", "UnsupportedModelError"]


class UnsupportedModelError(RomeError):
    """A model or layer that cannot be edited. The message gives the reason."""


@dataclass(frozen=True)
class RewriteSite:
    """The projection that an edit rewrites.

    Args:
        layer: Index of the decoder layer, from 0.
        name: Dotted name of the weight in the model's ``state_dict``.
        projection: The module; its input is the key, its output (bias included) the value.
        transposed: Whether the weight is stored as ``[d_key, d_value]`` (GPT-2's ``Conv1D``).
    """

    layer: int
    name: str
    projection: nn.Module
    transposed: bool

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that an edit changes, in the model's own orientation."""
        weight = self.projection.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The projection's bias, shape ``[d_value]``, if it has one."""
        bias = self.projection.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def d_key(self) -> int:
        """Length of a key."""
        return int(self.weight.shape[0 if self.transposed else 1])

    @property
    def d_value(self) -> int:
        """Length of a value."""
        return int(self.weight.shape[1 if self.transposed else 0])

    @property
    def experts(self) -> int:
        """Number of experts. A key is their keys one behind the other."""
        return 1

    @property
    def least_text(self) -> int:
        """Tokens of text that give as many keys as a key has dimensions; of a mixture, to every expert on average."""
        return self.d_key

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight, or a tensor like it, as ``[d_value, d_key]``."""
        return weight.T if self.transposed else weight

    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix ``[d_value, d_key]`` in the weight's own orientation."""
        return matrix.T if self.transposed else matrix

    def keys(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], part: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the keys of a call of the projection.

        Args:
            args: Its positional arguments.
            kwargs: Its arguments by name.
            part: Picks tokens of a tensor with one row for each token, ``[..., d]``.
        """
        return part(args[0] if args else next(iter(kwargs.values())))

    def lookup(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor, part: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values of a call of the projection. See :meth:`keys`; ``output`` is what it returned."""
        return self.keys(args, kwargs, part), part(output)
