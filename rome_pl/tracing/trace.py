"""What is traced, and what a trace holds."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["KINDS", "Fact", "Kind", "Trace"]


Kind = Literal["hidden", "mlp", "attention"]
"""What is put back: the state that leaves a layer; the MLP's output or attention's, over a window of layers."""


KINDS: tuple[Kind, ...] = ("hidden", "mlp", "attention")


@dataclass(frozen=True)
class Fact:
    """A prompt whose answer the model gives.

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
        restored: By kind with noise and a clean state at each token and layer, ``[tokens, layers]`` in float64 on the
            CPU; for windows the layer is their centre.
    """

    clean: float
    corrupted: float
    restored: dict[Kind, Tensor]

    @property
    def total_effect(self) -> float:
        """What the noise costs."""
        return self.clean - self.corrupted

    def effect(self, kind: Kind) -> Tensor:
        """The indirect effect of each token and layer, ``[tokens, layers]``."""
        return self.restored[kind] - self.corrupted
