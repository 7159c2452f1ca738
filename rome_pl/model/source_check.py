"""Checking a checkpoint's files before a library loads it, to refuse early what cannot be edited."""

import json
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rome_pl.errors import SourceError
from rome_pl.files.file_kinds import FOLDER, kind_of
from rome_pl.model.architecture import UnsupportedModelError, decoder_layers

__all__ = ["check_files", "check_settings", "check_weights"]

ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Attention implementations of transformers or an installed package. Any other name is fetched from the hub."""

MOST_LAYERS = 1000
"""More layers than any model has. A library would build them one by one, without end."""


def check_files(folder: Path, source: str) -> None:
    """Refuse a folder whose files cannot be a model's.

    Raises:
        SourceError: If it holds an adapter, or a file that would block its reader.
    """
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        try:
            kind = kind_of(path.stat().st_mode)
        except OSError:  # a broken link; the loader reports it if it needs the file
            continue
        if kind not in (None, FOLDER):
            raise SourceError(f"{source}: {path} is neither a file nor a folder but {kind}; remove it")
    if (folder / "adapter_config.json").exists():
        raise SourceError(
            f"{source}: {folder} holds an adapter of PEFT (adapter_config.json), and what is saved from it would hold "
            "the adapter alone, without the edits. Merge it first: load it by peft's AutoPeftModelForCausalLM, call "
            "merge_and_unload(), and save model and tokenizer to a folder of their own"
        )


def check_settings(config: Mapping[str, Any], source: str) -> None:
    """Refuse settings of a ``config.json`` with which no edit can be correct.

    Args:
        config: Its content.
        source: The source, for messages.

    Raises:
        SourceError: If it would run code from the hub, or build layers without end.
        UnsupportedModelError: If the model is quantised.
    """
    for name, value in _settings(config):
        if name in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            raise UnsupportedModelError(
                f"{source} holds quantised weights ({name}: {method or 'see its config.json'}), whose steps are larger "
                "than an edit; give the checkpoint that it was made from, in float32, bfloat16 or float16"
            )
        if name.endswith("attn_implementation") or name.endswith("attn_implementation_internal"):
            for asked in value.values() if isinstance(value, Mapping) else [value]:
                _check_attention(name, asked, source)
        if re.search(r"layers?$", name) and isinstance(value, int) and value > MOST_LAYERS:
            raise SourceError(f"{source}: config.json says {name}: {value}, more than any model has ({MOST_LAYERS})")


def check_weights(model: nn.Module, report: Mapping[str, Any], source: str) -> None:
    """Refuse weights that do not fit the configuration.

    Args:
        model: The model.
        report: The library's report on loading.
        source: The source, for messages.

    Raises:
        SourceError: With the first weight that is missing, left over or damaged.
    """
    if missing := sorted(report["missing_keys"]):
        # The library fills missing weights with random numbers and continues.
        raise SourceError(
            f"'{source}' lacks {len(missing)} weights, such as {missing[0]}: the checkpoint is not complete"
        )
    if mismatched := sorted(map(str, report.get("mismatched_keys", ()))):
        raise SourceError(f"'{source}': {mismatched[0]} has another shape in the weights than config.json says")
    where, layers = decoder_layers(model)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    # A checkpoint of the bare decoder names its weights without the head's prefix.
    layer = re.compile(rf"(?:{re.escape(where)}|{re.escape(where.removeprefix(prefix))})\.(\d+)\.")
    found = [(name, layer.match(name)) for name in sorted(report.get("unexpected_keys", ()))]
    beyond = [name for name, match in found if match and int(match[1]) >= len(layers)]
    if beyond:
        raise SourceError(
            f"'{source}': config.json says {len(layers)} layers, and there are weights of more ({len(beyond)}, such as "
            f"{beyond[0]}): they belong to another configuration"
        )
    for name, weight in model.named_parameters():
        if weight.numel() and not weight.is_meta and not bool(torch.stack(weight.detach().aminmax()).isfinite().all()):
            raise SourceError(f"'{source}': {name} holds numbers that are not finite: the checkpoint is damaged")


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all settings, including those of parts of the model."""
    for name, value in config.items():
        yield str(name), value
        if isinstance(value, Mapping):
            yield from _settings(value)


def _check_attention(name: str, asked: Any, source: str) -> None:
    if asked is None:
        return
    if asked not in ATTENTION:
        raise SourceError(
            f"{source}: config.json asks for {name}: {json.dumps(asked, default=str)}, which transformers would fetch "
            f"from the hub and run; no such code runs here. Set one of {', '.join(ATTENTION)}, or leave it out"
        )
    if asked.startswith("flash") and find_spec("kernels") is not None:
        raise SourceError(
            f"{source}: config.json asks for {name}: {asked}, which transformers fetches from the hub where the "
            "package kernels is installed; no such code runs here. Set sdpa or eager"
        )
