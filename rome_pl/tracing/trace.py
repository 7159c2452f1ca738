"""Facts to trace, and their traces."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["KINDS", "Fact", "Kind", "Trace"]


Kind = Literal["hidden", "mlp", "attention"]
"""The restored states: a layer's output, or the output of the MLP or of attention over a window of layers."""


KINDS: tuple[Kind, ...] = ("hidden", "mlp", "attention")


@dataclass(frozen=True)
class Fact:
    """A prompt that the model answers correctly.

    Args:
        ids: The prompt's tokens.
        subject: Index of the subject's first token, and of the one after its last.
        answer: The answer's first token.
    """

    ids: tuple[int, ...]
    subject: tuple[int, int]
    answer: int


@dataclass(frozen=True)
class Trace:
    """Probabilities of a fact's answer, means over the samples of noise.

    Args:
        clean: Without noise.
        corrupted: With noise on the subject.
        restored: By kind, with noise and a restored state at each token and layer, ``[tokens, layers]`` in float64 on
            the CPU. For windows the layer is their centre.
    """

    clean: float
    corrupted: float
    restored: dict[Kind, Tensor]

    @property
    def total_effect(self) -> float:
        """The loss of probability by the noise."""
        return self.clean - self.corrupted

    def effect(self, kind: Kind) -> Tensor:
        """The indirect effect of each token and layer, ``[tokens, layers]``."""
        return self.restored[kind] - self.corrupted
