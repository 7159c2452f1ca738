"""Rewrite layers that are published or were measured, by the shape of the model."""

import logging
from typing import Any

__all__ = ["default_layer"]

log = logging.getLogger(__name__)

# (model_type, number of layers, hidden size) -> layer. GPT-2 XL and GPT-J: Meng et al. 2022; the 7-8B models:
# EasyEdit's published settings; SmolLM2-135M: measured, see docs/smollm2.md.
_KNOWN = {
    ("gpt2", 48, 1600): 17,
    ("gptj", 28, 4096): 5,
    ("llama", 32, 4096): 5,
    ("mistral", 32, 4096): 5,
    ("qwen2", 28, 3584): 5,
    ("llama", 30, 576): 4,
}


def default_layer(config: Any) -> int:
    """The rewrite layer for a model whose user named none.

    Args:
        config: The model's text configuration.

    Returns:
        The published layer of this model where there is one; otherwise a sixth of the depth, with a warning: that is
        where the published layers of 7-8B models lie.
    """
    depth = int(config.num_hidden_layers)
    known = _KNOWN.get((config.model_type, depth, int(config.hidden_size)))
    if known is not None:
        return known
    guess = depth // 6
    log.warning(
        "No published rewrite layer for this %s model of %d layers: taking layer %d, a guess. Set 'layers' to choose",
        config.model_type,
        depth,
        guess,
    )
    return guess
