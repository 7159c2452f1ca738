"""Finding a decoder's layers and the second projections of their MLPs by inspecting the modules.

No family is recognised by name. The MLP of a decoder layer is everything outside attention or another mixer of tokens.
The projection that ROME rewrites is its widest dense map back to the hidden size, the last of these. Narrower ones are
adapters, gates of a norm, or embeddings of a layer's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rome_pl.model.mixtures import find_mixture
from rome_pl.model.rewrite_site import RewriteSite, UnsupportedModelError

__all__ = [
    "RewriteSite",
    "UnsupportedModelError",
    "decoder_layers",
    "dtype_of_delta",
    "embedded_tokens",
    "find_attention_output",
    "find_site",
    "hidden_size",
]


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream."""
    return int(_text_config(model).hidden_size)


def embedded_tokens(model: Any) -> int:
    """Number of tokens with an embedding. The embedding may be wrapped, for example by a PEFT adapter."""
    return int(model.get_input_embeddings().weight.shape[0])


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its dotted name.

    Raises:
        UnsupportedModelError: If the config does not give the number of layers, or the model has no such list.
    """
    expected = getattr(_text_config(model), "num_hidden_layers", None)
    if not isinstance(expected, int) or expected < 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} is no decoder with a list of layers: its configuration has "
            f"num_hidden_layers {expected!r}"
        )
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == expected]
    if not lists:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of {expected} decoder layers")
    # named_modules lists outer modules first. A vision tower may be as deep as the text model and stand before it.
    text = _text_config(model)
    return next((found for found in lists if _config_around(model, found[0]) is text), lists[0])


def find_site(model: nn.Module, layer: int) -> RewriteSite:
    """Find the MLP's second projection of a decoder layer.

    Args:
        model: A causal language model of the transformers library.
        layer: Index of the decoder layer, from 0.

    Raises:
        UnsupportedModelError: If the layer does not exist, is a mixture of a form that cannot be edited, is quantised,
            has no dense MLP, or shares it with other layers, or if an adapter of PEFT is on the projection.
    """
    list_name, layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise UnsupportedModelError(
            f"layers: {layer} is out of range; {type(model).__name__} has {len(layers)} layers, numbered from 0"
        )
    block = layers[layer]
    where = f"layer {layer} of {type(model).__name__}"
    outside = [(name, module) for name, module in block.named_modules() if not _inside_mixer(block, name)]
    if any(_is_expert_part(name, module) for name, module in outside):
        return find_mixture(model, layer, f"{list_name}.{layer}", outside)
    width = hidden_size(model)
    found, adapted = None, None
    for name, module in outside:
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        if not module.weight.is_floating_point():
            raise UnsupportedModelError(
                f"{where} holds quantised weights ({module.weight.dtype} in '{name}'): an edit far smaller than their "
                "steps would be lost; load the model in float32, bfloat16 or float16"
            )
        transposed = isinstance(module, Conv1D)
        if module.weight.shape[1 if transposed else 0] == width:
            site = RewriteSite(layer, f"{list_name}.{layer}.{name}.weight", module, transposed)
            if found is None or site.d_key >= found.d_key:
                found, adapted = site, _adapted(block, name, ("base_layer", "original_module"))
    if found is None:
        raise UnsupportedModelError(f"{where} has no dense MLP projection back to the hidden size {width}")
    if adapted is not None:  # an adapter's own maps come after the projection and would be taken for it
        raise UnsupportedModelError(
            f"{where} has an adapter of PEFT on '{adapted}', the projection that an edit writes into: merge it first "
            "(model = model.merge_and_unload())"
        )
    users = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is found.weight]
    if len(users) > 1:
        raise UnsupportedModelError(
            f"{where} shares its MLP with other layers ('{users[0]}' is '{users[1]}'): an edit would change what all "
            "of them do; choose a layer with an MLP of its own"
        )
    return found


def find_attention_output(model: nn.Module, layer: int) -> nn.Module:
    """Find attention's output projection in a decoder layer: its last dense map back to the hidden size.

    Args:
        model: A causal language model of the transformers library.
        layer: Index of a decoder layer, from 0.

    Raises:
        UnsupportedModelError: If there is none, as in a layer that mixes tokens by convolution.
    """
    block, width = decoder_layers(model)[1][layer], hidden_size(model)
    mixers = [name for name, module in block.named_modules() if name and _is_attention(module)]
    dense = [
        (name, module)
        for name, module in block.named_modules()
        if name.startswith(tuple(f"{mixer}." for mixer in mixers)) and isinstance(module, nn.Linear | Conv1D)
    ]
    ends = [name for name, m in dense if m.weight.shape[1 if isinstance(m, Conv1D) else 0] == width]
    if not ends:
        raise UnsupportedModelError(
            f"layer {layer} of {type(model).__name__} has no attention that ends in a dense map"
        )
    last = ends[-1]  # keys, values and queries are registered earlier
    return block.get_submodule(_adapted(block, last) or last)


def _config_around(model: nn.Module, name: str) -> Any:
    """The configuration of the innermost module around a module that has one."""
    config, module = getattr(model, "config", None), model
    for part in name.split(".")[:-1]:
        module = module.get_submodule(part)
        config = getattr(module, "config", config)
    return config


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config(decoder=True)


def _inside_mixer(block: nn.Module, name: str) -> bool:
    """Whether a module belongs to a mixer of tokens: attention, or a recurrence with its short convolution."""
    parts = name.split(".")
    return any(_is_mixer(block.get_submodule(".".join(parts[: depth + 1]))) for depth in range(len(parts)) if name)


def _is_mixer(module: nn.Module) -> bool:
    convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
    return convolves or _is_attention(module)


def _adapted(block: nn.Module, name: str, marks: Sequence[str] = ("base_layer",)) -> str | None:
    """Name of the module, or of one around it, that has a PEFT adapter. ``None``: there is none.

    Args:
        block: The decoder layer.
        name: The module's name in it.
        marks: Names under which PEFT keeps wrapped modules: ``base_layer`` below an adapter's own maps,
            ``original_module`` beside a copy that is trained whole (``modules_to_save``).
    """
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        around = block.get_submodule(".".join(parts[:depth]))
        if any(isinstance(getattr(around, mark, None), nn.Module) for mark in marks):
            return ".".join(parts[:depth])
    return None


def _is_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return "attention" in kind and "decoderlayer" not in kind  # a whole layer around attention holds an MLP too


def _is_expert_part(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    # Fused experts keep one 3-d parameter per projection, [experts, out, in].
    fused = any(parameter.ndim == 3 and len(parameter) > 1 for parameter in module.parameters(recurse=False))
    return fused or "expert" in kind or "router" in kind or "experts" in name.split(".")


def dtype_of_delta(weight: Tensor) -> torch.dtype:
    """Dtype in which a value offset is optimised: the weight's own, but never below float32."""
    return torch.promote_types(weight.dtype, torch.float32)
