"""Published or measured rewrite layers, by the shape of the model."""

import logging
from typing import Any

from rome_pl.errors import OptionError

__all__ = ["default_layer", "parse_layers"]

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

# Published layers are at a third of the depth in GPT-NeoX and all GPT-2s but the smallest, else at a sixth.
_THIRD = ("gpt2", "gpt_neox")


def default_layer(config: Any) -> int:
    """Return the default rewrite layer of a model.

    Args:
        config: The model's text configuration.

    Returns:
        The published layer of this model, if there is one. Otherwise, with a warning, a third of the depth for the
        families of GPT-2 and GPT-NeoX, and a sixth for others, as in published settings.
    """
    depth = int(config.num_hidden_layers)
    known = _KNOWN.get((config.model_type, depth, int(config.hidden_size)))
    if known is not None:
        return known
    guess = depth // (3 if config.model_type in _THIRD else 6)
    log.warning(
        "No published rewrite layer for this %s model of %d layers: taking layer %d, a guess. Set 'layers', or let "
        "rome-pl tune find out",
        config.model_type,
        depth,
        guess,
    )
    return guess


def parse_layers(layers: list[int] | str, depth: int) -> list[int]:
    """Parse layer numbers: a list, ``all``, a range such as ``4-8``, or a comma-separated mix of both.

    Args:
        layers: The layers as given.
        depth: Number of layers of the model.

    Raises:
        OptionError: If ``layers`` has another form, or a layer does not exist.
    """
    if layers == "all":
        return list(range(depth))
    try:
        found = _parse(layers) if isinstance(layers, str) else list(layers)
    except ValueError:
        raise OptionError(f"layers: expected 'all', a list, or a range such as 4-8, got {layers!r}") from None
    if missing := [layer for layer in found if not 0 <= layer < depth]:
        raise OptionError(f"layers: {missing[0]} does not exist; the model has {depth} layers, numbered from 0")
    if not found:
        raise OptionError(f"layers: {layers!r} names no layer")
    return sorted(set(found))


def _parse(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        found += range(int(first), int(last) + 1) if dash else [int(first)]
    return found
