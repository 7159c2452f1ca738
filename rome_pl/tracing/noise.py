"""The noise that causal tracing puts on a subject's embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rome_pl.utils.hashing import hash_seed

__all__ = ["default_window", "draw_noise", "embedding_deviation"]


def default_window(depth: int) -> int:
    """Default number of layers of a window: the same share of the depth as 10 of GPT-2 XL's 48 layers (App. B.2)."""
    return max(1, round(depth * 10 / 48))


@torch.no_grad()
def embedding_deviation(model: Any, subjects: Sequence[Sequence[int]]) -> float:
    """Standard deviation of the embeddings of all subjects' tokens, over tokens and dimensions together.

    Args:
        model: The model.
        subjects: Token ids of each subject, as they stand in the prompts.
    """
    ids = torch.tensor([token for subject in subjects for token in subject], device=model.device)
    return float(model.get_input_embeddings()(ids).double().std())


def draw_noise(samples: int, tokens: int, width: int, deviation: float, *seed: object) -> Tensor:
    """Draw Gaussian noise, ``[samples, tokens, width]`` in float64. It depends only on the arguments."""
    generator = torch.Generator().manual_seed(hash_seed("noise", *seed))
    return torch.randn(samples, tokens, width, generator=generator, dtype=torch.float64) * deviation
