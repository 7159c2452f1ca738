"""Checking whether a model can be edited, before anything else is done with it.

No family is recognised by name. Properties that the modules do not show are tested with a forward of a few tokens.
"""

import logging
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rome_pl.errors import first_line
from rome_pl.model.architecture import UnsupportedModelError, decoder_layers
from rome_pl.utils.restored_state import frozen

__all__ = ["check_saves_whole", "check_supported", "first_position"]

log = logging.getLogger(__name__)

TOKENS = 4
"""Length of the rows in the test forward, in tokens."""

_first: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()
"""See :func:`first_position`."""

_tried: WeakSet[nn.Module] = WeakSet()
"""Models that passed the test forward, which takes seconds for a large one."""


def check_supported(model: Any, source: str) -> None:
    """Refuse a model in which no edit can be correct.

    Args:
        model: The object given or loaded as a model.
        source: The source, for messages.

    Raises:
        UnsupportedModelError: If it cannot be edited, with the reason and what to do.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{source}: expected a causal language model of transformers, got {type(model).__name__}; give "
            "AutoModelForCausalLM.from_pretrained(...), and its tokenizer after it"
        )
    _check_wrappers(model, source)
    _check_config(model, source)
    _check_weights(model, source)
    decoder_layers(model)
    if model not in _tried:
        _try(model, source)
        _check_head(model, source)
        _try_positions(model)
        _tried.add(model)
        if _has_adapter(model):
            log.warning(
                "%s: the model has adapters of PEFT. Edits change the weights that the adapters are added to, but "
                "model.save_pretrained() saves the adapters alone: the edits would be lost. To save an edited model, "
                "%s before you edit",
                source,
                _how_to_merge(model),
            )


def check_saves_whole(model: nn.Module) -> None:
    """Refuse to save a model whose ``save_pretrained`` would leave the edits out.

    Raises:
        UnsupportedModelError: If it would, with what to do.
    """
    if _has_adapter(model):
        raise UnsupportedModelError(
            "the model has adapters of PEFT, and its save_pretrained() saves the adapters alone: the edits would be "
            f"lost. To save it with them, {_how_to_merge(model)}, then edit and save"
        )


def _has_adapter(model: nn.Module) -> bool:
    return bool(getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False))


def _how_to_merge(model: nn.Module) -> str:
    if hasattr(model, "merge_and_unload"):
        return "merge the adapters (model = model.merge_and_unload())"
    # Adapters that transformers attaches cannot be merged in place.
    return "merge the adapters (load the model by peft's AutoPeftModelForCausalLM and call merge_and_unload())"


def _check_wrappers(model: nn.Module, source: str) -> None:
    if isinstance(model, nn.DataParallel | DistributedDataParallel):
        raise UnsupportedModelError(
            f"{source} is wrapped in {type(model).__name__}, which runs copies of the weights: give the model inside "
            "(model.module)"
        )
    if any(map(_is_compiled, model.modules())):
        raise UnsupportedModelError(
            f"{source} is compiled (torch.compile), and compiled code does not run the hooks that an edit needs: give "
            "the model as it was before; the option compile makes the search's own steps fast"
        )
    adapters = getattr(model, "peft_config", None)
    if isinstance(adapters, dict) and any(getattr(one, "is_prompt_learning", False) for one in adapters.values()):
        raise UnsupportedModelError(
            f"{source} puts learnt tokens before every text (prompt or prefix tuning of PEFT), which moves every "
            "position: give the model without them (model.get_base_model())"
        )


def _is_compiled(module: nn.Module) -> bool:
    own = vars(module)
    return (
        "_orig_mod" in own.get("_modules", ())  # torch.compile(module)
        or own.get("_compiled_call_impl") is not None  # module.compile()
        or hasattr(own.get("forward"), "_torchdynamo_orig_callable")  # module.forward = torch.compile(module.forward)
    )


def _check_config(model: nn.Module, source: str) -> None:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{source}: {type(model).__name__} has no configuration of transformers, which says how many layers it "
            "has; give a causal language model of transformers"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{source}: {type(model).__name__} is an encoder-decoder; edits are for decoders alone, such as GPT or "
            "Llama models"
        )
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(length, int) and length < 1:
        raise UnsupportedModelError(f"{source}: its configuration says max_position_embeddings: {length}")
    if getattr(model, "is_quantized", False):
        raise UnsupportedModelError(
            f"{source} is loaded with quantised weights, whose steps are larger than an edit; "
            "load it in float32, bfloat16 or float16"
        )


def _check_weights(model: nn.Module, source: str) -> None:
    weights = dict(model.named_parameters())
    if not weights:
        raise UnsupportedModelError(f"{source}: {type(model).__name__} has no weights")
    away = [name for name, weight in weights.items() if weight.is_meta]
    if away:
        raise UnsupportedModelError(
            f"{source}: {len(away)} of {len(weights)} weights are not in memory, such as {away[0]} (offloaded to CPU "
            "or disk, or never loaded): load the model without device_map and offloading; in bfloat16 it takes half "
            "the memory"
        )
    if len(devices := {str(weight.device) for weight in weights.values()}) > 1:
        raise UnsupportedModelError(
            f"{source}: the weights lie on several devices ({', '.join(sorted(devices))}): load the model on one, "
            "without device_map='auto'; in bfloat16 it takes half the memory"
        )
    if any(weight.is_inference() for weight in weights.values()):
        raise UnsupportedModelError(
            f"{source}: the weights were made inside torch.inference_mode(), where nothing can be optimised: load the "
            "model outside of it"
        )


def _check_head(model: nn.Module, source: str) -> None:
    """Refuse a model that does not say which module gives its logits: a forward has to run it on few positions."""
    head: Any = getattr(model, "get_output_embeddings", None)
    if head is not None and head() is None:
        raise UnsupportedModelError(
            f"{source}: {type(model).__name__} names no output embeddings: if it holds a causal language model "
            "(such as model.language_model), give that"
        )


def _try(model: nn.Module, source: str) -> None:
    """Run two texts that differ only in their last token: earlier positions must not depend on it."""
    rows = _rows(model)
    name = type(model).__name__
    try:
        # One row at a time: equal shapes use equal kernels, so rounding is equal too.
        with frozen(model), torch.inference_mode(False), torch.no_grad():
            logits = [model(input_ids=row.unsqueeze(0), use_cache=False).logits for row in rows]
        first, second = (found[0, :-1] for found in logits)
        shape = tuple(logits[0].shape)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # another kind of model may raise anything
        raise UnsupportedModelError(
            f"{source}: {name} cannot read {TOKENS} tokens as a causal language model "
            f"({type(error).__name__}: {first_line(error)}); load it by AutoModelForCausalLM"
        ) from error
    if len(shape) != 3 or shape[:2] != (1, TOKENS):
        raise UnsupportedModelError(
            f"{source}: {name} gives logits of shape {list(shape)} for {TOKENS} tokens, not a row for each: it is no "
            "language model; load it by AutoModelForCausalLM"
        )
    if not bool(first.isfinite().all()):
        raise UnsupportedModelError(
            f"{source}: {name} gives logits that are not finite in {first.dtype}: its weights are damaged, or "
            "too large for this precision; load it in float32"
        )
    if not torch.equal(first, second) and _depends(model, rows[0]):
        raise UnsupportedModelError(
            f"{source}: {name} reads in both directions: a token changes what it predicts at earlier positions, so it "
            "would see the answer that it is asked for. Edits are for causal models; a model of the BERT kind that "
            "was trained as a decoder needs is_decoder: true in its config"
        )


def _try_positions(model: nn.Module) -> None:
    """Find out with which positions a forward is the same as a plain one. RoBERTa's begin behind the pad token's id."""
    row = _rows(model)[:1]
    steps = torch.arange(TOKENS, device=row.device).unsqueeze(0)
    looked_up: list[int] = []

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        ids = inputs[0] if inputs else None
        if isinstance(ids, torch.Tensor) and ids.numel() == TOKENS and torch.equal(ids - ids.min(), steps.view_as(ids)):
            looked_up.append(int(ids.min()))

    with frozen(model), torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_pre_hook(hook).remove)
        plain = model(input_ids=row, use_cache=False).logits.double()
        half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
        largest = (0.1 if half else 1e-3) * float(plain.std())
        for first in (0, *looked_up):
            try:
                given = model(input_ids=row, position_ids=steps + first, use_cache=False).logits.double()
            except torch.OutOfMemoryError:
                raise
            except Exception:  # takes no positions, or of another shape
                continue
            if float((given - plain).abs().max()) <= largest:
                _first[model] = first
                return
    _first[model] = None


def first_position(model: nn.Module) -> int | None:
    """Position of a text's first token in a plain forward. ``None``: the model takes no positions.

    It is 0 for a model that :func:`check_supported` has not seen.
    """
    return _first.get(model, 0)


def _depends(model: nn.Module, row: torch.Tensor) -> bool:
    """Whether earlier logits depend on the last token. Rounding, such as from other batches of experts, does not count.

    A causal mask leaves a gradient of exactly zero, in any precision.
    """
    read: list[torch.Tensor] = []

    def hook(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        read.append(output.detach().requires_grad_())
        return read[-1]

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(hook)
    try:
        with frozen(model), torch.inference_mode(False), torch.enable_grad():
            logits = model(input_ids=row.unsqueeze(0), use_cache=False).logits[0, :-1]
            (gradient,) = torch.autograd.grad(logits.double().square().sum(), read[:1])
    finally:
        handle.remove()
    return bool(gradient[0, -1].count_nonzero())


def _rows(model: nn.Module) -> torch.Tensor:
    """Two rows of tokens that differ only in the last one, ``[2, TOKENS]``."""
    get: Any = getattr(model, "get_input_embeddings", None)
    config: Any = model.config
    embedding: Any = get() if get is not None else None
    size = int(getattr(embedding, "num_embeddings", 0) or getattr(config, "vocab_size", 0))
    special = set()
    for kind in ("pad", "bos", "eos", "mask"):
        ids = getattr(config, f"{kind}_token_id", None)
        special |= set(ids) if isinstance(ids, list | tuple) else {ids}  # a model may have several ends of text
    plain = [token for token in range(min(size, 64)) if token not in special] or [0]
    ids = [plain[-1 - place % len(plain)] for place in range(TOKENS + 1)]
    device = next(model.parameters()).device
    return torch.tensor([ids[:TOKENS], [*ids[: TOKENS - 1], ids[TOKENS]]], device=device)
