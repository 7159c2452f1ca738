"""A run's edits as a LoRA adapter for the peft library.

The adapter is ``base(x) + B A x`` in each edited projection, ``B A`` being the exact change of its float64 master. A
float32 model holds that change almost exactly. A bfloat16 or float16 model rounds it: the adapter is then closer to the
asserted values than the edited weights are.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from rome_pl.errors import OptionError
from rome_pl.export.low_rank import low_rank
from rome_pl.ledger.edit_log import LedgerError
from rome_pl.write.closed_form import Update
from rome_pl.write.edited_layers import EditedLayers

__all__ = ["AdapterPart", "save_adapter"]


@dataclass(frozen=True)
class AdapterPart:
    """The part of an adapter for one layer.

    Args:
        weight: Name of the edited weight.
        rank: Number of factors.
        full_rank: Rank of the layer's whole change.
        error: Frobenius norm of the difference of adapter and change, relative to the change's.
    """

    weight: str
    rank: int
    full_rank: int
    error: float


def save_adapter(folder: Path, layers: EditedLayers, source: str, rank: int | None = None) -> list[AdapterPart]:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, its factors in float32.

    Layers without edits are left out.

    Args:
        folder: Where to.
        layers: The weights with their edits.
        source: The unedited model, as loaders know it.
        rank: Largest number of factors per layer. ``None`` (default): as many as the change's rank.

    Raises:
        LedgerError: If the edits have changed no weight.
        OptionError: If they have changed experts of a mixture.
    """
    for weight in layers.weights:
        if weight.written and weight.site.experts > 1:
            raise OptionError(
                f"format: layer {weight.site.layer} is a mixture of experts, whose weights lie in one parameter: an "
                "adapter of this form does not reach it; export as delta, or as hf"
            )
    tensors, parts, ranks = {}, list[AdapterPart](), dict[str, int]()
    for weight in layers.weights:
        if not weight.written:
            continue
        found = low_rank(Update.joint([written.update for written in weight.written]), rank)
        if found.rank == 0:
            continue
        module = weight.site.name.removesuffix(".weight")
        ranks[module] = found.rank
        tensors[f"base_model.model.{module}.lora_A.weight"] = found.down.cpu()
        tensors[f"base_model.model.{module}.lora_B.weight"] = found.up.cpu()
        parts.append(AdapterPart(weight.site.name, found.rank, found.full_rank, found.error))
    if not parts:
        raise LedgerError("the edits have changed no weight: an adapter would be empty")
    largest = max(ranks.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "inference_mode": True,
        # Full names, so that modules of the same name in other layers or parts of the model are not changed.
        "target_modules": list(ranks),
        "r": largest,
        "rank_pattern": ranks,
        # peft scales by alpha / r, layer by layer.
        "lora_alpha": largest,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(weight.site.transposed for weight in layers.weights),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    return parts
