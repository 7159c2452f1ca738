"""Rewrite layers that are published or were measured, by the shape of the model."""

import logging
from typing import Any

__all__ = ["default_layer"]

log = logging.getLogger(__name__)

# (model_type, number of layers, hidden size) -> layer. GPT-2 small: a tutorial of EasyEdit's users; its larger sizes,
# GPT-J and GPT-NeoX: the hparams of kmeng01/rome and kmeng01/memit; Llama, Mistral and Qwen: those of EasyEdit;
# SmolLM2-135M: measured, see docs/smollm2.md. The shipped configs name the files.
_KNOWN = {
    ("gpt2", 12, 768): 9,
    ("gpt2", 24, 1024): 8,
    ("gpt2", 36, 1280): 12,
    ("gpt2", 48, 1600): 17,
    ("gptj", 28, 4096): 5,
    ("gpt_neox", 44, 6144): 15,
    ("llama", 32, 4096): 5,
    ("llama", 28, 3072): 5,
    ("mistral", 32, 4096): 5,
    ("qwen2", 28, 3584): 5,
    ("llama", 30, 576): 4,
}

# Where the published layers lie: a third of the depth up in GPT-NeoX and all GPT-2s but the smallest, else a sixth.
_THIRD = ("gpt2", "gpt_neox")


def default_layer(config: Any) -> int:
    """The rewrite layer for a model whose user named none.

    Args:
        config: The model's text configuration.

    Returns:
        The published layer of this model where there is one; otherwise, with a warning, a third of the depth for the
        families of GPT-2 and GPT-NeoX, and a sixth for others: that is where published layers lie.
    """
    depth = int(config.num_hidden_layers)
    known = _KNOWN.get((config.model_type, depth, int(config.hidden_size)))
    if known is not None:
        return known
    guess = depth // (3 if config.model_type in _THIRD else 6)
    log.warning(
        "No published rewrite layer for this %s model of %d layers: taking layer %d, a guess. Set 'layers' to choose",
        config.model_type,
        depth,
        guess,
    )
    return guess
