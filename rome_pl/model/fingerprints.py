"""Telling one model from another: hashes of weights, of a config, of a tokenizer's rules."""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["combined", "config_fingerprint", "quick_sum", "tokenizer_fingerprint", "weight_digest"]

_NOT_FORWARD = frozenset(
    {
        *("_name_or_path", "name_or_path", "_model_name_or_path", "_commit_hash"),
        *("transformers_version", "architectures", "auto_map"),
        *("dtype", "torch_dtype", "quantization_config", "tokenizer_class"),
        *("attn_implementation", "_attn_implementation"),
        *("_attn_implementation_internal", "_attn_implementation_autoset"),
        *("return_dict", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
        *("id2label", "label2id", "problem_type", "task_specific_params", "finetuning_task"),
        *("initializer_range", "initializer_factor", "init_std", "gradient_checkpointing", "pretraining_tp"),
    }
)
"""Settings without effect on a forward pass: names, versions, and how the model is loaded, trained and used. Precision
and device are recorded separately where they matter."""

_TOKENIZER_SETTINGS = ("add_bos_token", "add_eos_token", "split_special_tokens", "bos_token", "eos_token")
"""Attributes of a transformers tokenizer, besides its rules, that affect ids. Padding and truncation are set by us."""


def config_fingerprint(config: Any) -> str:
    """Hash of all settings that affect the forward pass."""
    return _hash(_stated(config.to_dict(), _NOT_FORWARD))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of the rules from text to ids: normaliser, pre-tokeniser, vocabulary, merges, post-processor, new tokens."""
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    for ours in ("truncation", "padding"):
        rules.pop(ours, None)
    # These are long, and every entry counts.
    tables = {name: rules["model"].pop(name, None) for name in ("vocab", "merges")}
    settings = {name: getattr(tokenizer, name, None) for name in _TOKENIZER_SETTINGS}
    return _hash([_stated({"rules": rules, "settings": settings}), tables])


def quick_sum(tensor: Tensor) -> float:
    """A fast sum that nearly any change alters. Hashing a large model instead takes half a minute."""
    return float(tensor.detach().sum(dtype=torch.float64))


def weight_digest(tensor: Tensor) -> str:
    """Hash of a weight rounded to bfloat16, so that a model has the same fingerprint in float32 and bfloat16."""
    rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    digest.update(rounded.view(torch.int16).numpy().data)
    return digest.hexdigest()


def combined(digests: Mapping[str, str]) -> str:
    """Combine hashes, with their names, into one."""
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def _stated(value: Any, without: Collection[str] = ()) -> Any:
    """Keep the settings that are set. Later library releases add settings that are off for older checkpoints."""
    if isinstance(value, Mapping):
        kept = {str(name): _stated(item, without) for name, item in value.items() if name not in without}
        return {name: item for name, item in kept.items() if item is not None and item is not False and item != {}}
    if isinstance(value, list | tuple):
        return [_stated(item, without) for item in value]
    return value


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
