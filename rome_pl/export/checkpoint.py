"""Saving a model as a Hugging Face checkpoint, and comparing the files with the model in memory.

A model may save only a part of itself: a model with an adapter saves only the adapter. So every checkpoint is compared
with the model before it gets its final name.
"""

import errno
import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rome_pl.errors import RomeError, first_line
from rome_pl.files.whole_files import check_room, whole_folder
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.supported import check_saves_whole

__all__ = ["SavedModelError", "difference", "model_bytes", "save_checkpoint", "save_model"]

_OWN = re.compile(
    r"(model|pytorch_model|adapter_model)([.-].*)?\.(safetensors|bin|json)"
    r"|(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|chat_template|rome_pl)\.json"
    r"|tokenizer\.model|spiece\.model|sentencepiece\.bpe\.model|vocab\.txt|merges\.txt|chat_template\.jinja"
)
"""Names of the files of a checkpoint. A new checkpoint replaces all of them."""


class SavedModelError(RomeError):
    """A checkpoint that differs from the saved model."""


def model_bytes(language_model: LanguageModel) -> int:
    """Smallest size of a checkpoint in bytes: its weights, tied ones once."""
    weights = {_storage(tensor): tensor for tensor in language_model.model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def save_model(language_model: LanguageModel, folder: Path, option: str = "save_model", replace: bool = False) -> None:
    """Save a checkpoint to its own folder, completely or not at all.

    Args:
        language_model: The model.
        folder: Where to.
        option: The option that names it.
        replace: Whether to replace a checkpoint in it; other files are kept. Otherwise the folder has to be empty or
            not exist.

    Raises:
        OptionError: If the disk has not enough room.
        OSError: If the folder cannot be written.
        SavedModelError: If the files would differ from the model.
    """
    check_room(folder, model_bytes(language_model), option)
    with whole_folder(folder, _is_own if replace else None) as work:
        save_checkpoint(language_model, work)


def save_checkpoint(language_model: LanguageModel, folder: Path, max_shard_size: str | None = None) -> None:
    """Write a Hugging Face checkpoint (safetensors in the model's dtype, configurations, tokenizer), and verify it.

    Args:
        language_model: The model.
        folder: Where to; meant to be a temporary folder, see :func:`rome_pl.files.whole_files.whole_folder`.
        max_shard_size: Largest size of a file, such as ``5GB``. ``None`` (default): that of transformers.

    Raises:
        OSError: If the folder cannot be written.
        SafetensorError: The same, for the weights.
        SavedModelError: If the files differ from the model.
    """
    check_saves_whole(language_model.model)
    try:
        language_model.tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises Exception itself for a full disk
        if type(error) is not Exception:
            raise
        raise OSError(errno.EIO, str(error)) from error
    sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size.upper()}
    language_model.model.save_pretrained(folder, **sizes)
    if found := difference(language_model, folder):
        raise SavedModelError(
            f"what was written of {language_model.source} is not the model in memory: {found}. Nothing was saved. A "
            "model with an adapter has to be merged with it first, and saved as a model of its own; then edit that"
        )


def difference(language_model: LanguageModel, folder: Path) -> str | None:
    """Describe how a checkpoint differs from a model in memory. ``None``: every weight has the same bits.

    Args:
        language_model: The model.
        folder: The checkpoint. One that cannot be read differs.
    """
    model = language_model.model
    if not (folder / "config.json").is_file():
        return "there is no config.json" + (", but an adapter" if (folder / "adapter_config.json").exists() else "")
    if (folder / "adapter_config.json").exists():
        return "there is an adapter beside the model (adapter_config.json)"
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    try:
        with ExitStack() as stack:
            found, missing = _compared(weights, _Files(folder, stack))
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        return f"it cannot be read ({first_line(error)})"
    if found or not missing:
        return found
    return _loaded_difference(model, folder, weights, missing)


class _Files:
    """The tensors of a checkpoint's files, read one by one.

    Args:
        folder: The checkpoint.
        stack: Keeps the files open.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            places = {}
        files = {
            name: stack.enter_context(safe_open(folder / name, framework="pt"))
            for name in sorted(set(places.values()) or {"model.safetensors"})
        }
        inside = {tensor: name for name, file in files.items() for tensor in file.keys()}  # noqa: SIM118
        if places and inside != places:
            raise ValueError("its index names other weights than its files hold")
        self._places = {tensor: files[name] for tensor, name in inside.items()}

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._places)

    def read(self, name: str) -> Tensor:
        """A tensor."""
        tensor: Tensor = self._places[name].get_tensor(name)
        return tensor


def _compared(weights: Mapping[str, Tensor], files: _Files) -> tuple[str | None, list[str]]:
    """Return the first weight that differs, and the names of weights that the files lack."""
    names = files.names()
    held = {_storage(tensor) for name, tensor in weights.items() if name in names}
    for name in sorted(names & weights.keys()):
        if not _same_bits(files.read(name), weights[name]):
            return f"{name} differs", []
    return None, [name for name, tensor in weights.items() if name not in names and _storage(tensor) not in held]


def _loaded_difference(model: Any, folder: Path, weights: Mapping[str, Tensor], missing: list[str]) -> str | None:
    """Describe how the model differs from a checkpoint loaded by its own class, if names of weights differ."""
    lacks = f"it lacks {len(missing)} weights, such as {missing[0]}"
    try:
        loaded, report = type(model).from_pretrained(
            folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True
        )
        again = loaded.state_dict()
    except Exception as error:  # a foreign class may raise anything: it cannot be loaded
        return f"{lacks} ({first_line(error)})"
    if report["missing_keys"] or again.keys() != model.state_dict().keys():
        return lacks
    differing = next((name for name, tensor in weights.items() if not _same_bits(again[name], tensor)), None)
    return None if differing is None else f"{differing} differs"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or other.is_meta:
        return False
    pair = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*pair)


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    """The storage of a tensor: tied weights share one."""
    if tensor.is_meta:  # no storage
        return (id(tensor),)
    return (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _is_own(name: str) -> bool:
    return _OWN.fullmatch(name) is not None
