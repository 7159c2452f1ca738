"""The change of a run: a few kilobytes per edit that turn the base model into the run's model, bit for bit.

The file holds each edit's factors in float64, in the ledger's order. They are added to a float64 master one write after
the other, as in the run, and cast once: a sum computed beforehand would be rounded differently.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from rome_pl.errors import RomeError
from rome_pl.files.checksums import is_intact
from rome_pl.files.schemas import checked, parsed, refuse
from rome_pl.files.whole_files import read_regular
from rome_pl.ledger.run_schemas import DELTA
from rome_pl.model.architecture import RewriteSite, find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.model_check import refuse_another_model
from rome_pl.write.closed_form import Update
from rome_pl.write.edited_layers import EditedLayers

__all__ = ["ABOUT", "Delta", "DeltaError", "apply_delta", "read_delta", "save_delta"]

ABOUT = "rome_pl.json"
"""File with the description of an export: base model, layers, edits."""

TENSORS = "delta.safetensors"

OTHER_FORMS = ("hf", "peft")
"""Other forms of an export, which cannot be read as a delta."""

VERSION = 3
"""Version of the format. Others are refused. Version 2 had no checksums."""


class DeltaError(RomeError):
    """A delta that is missing, damaged, or belongs to another base model."""


@dataclass(frozen=True)
class Delta:
    """A delta as read from its folder.

    Args:
        about: The content of :data:`ABOUT`.
        updates: For each rewrite layer its changes, in the order of the writes.
    """

    about: dict[str, Any]
    updates: tuple[tuple[Update, ...], ...]

    @property
    def num_edits(self) -> int:
        """Number of edits."""
        number: int = self.about["num_edits"]
        return number


def save_delta(folder: Path, layers: EditedLayers) -> dict[str, Any]:
    """Write the factors of every edit, ``layers.<place>.left`` ``[n, d_value]`` and ``….right`` ``[n, d_key]``.

    Layers without edits are left out.

    Args:
        folder: Where to.
        layers: The weights with their edits.

    Returns:
        Further information for a reader: ``num_edits``; ``writes``, for each layer the number of edits of each write;
        ``digests`` of the edited weights; and ``tensors``, the SHA-256 of the file.
    """
    tensors = {}
    edited = [weight for weight in layers.weights if weight.written]
    for place, weight in enumerate(edited):
        update = Update.joint([written.update for written in weight.written])
        tensors[f"layers.{place}.left"], tensors[f"layers.{place}.right"] = update.left.cpu(), update.right.cpu()
    save_file(tensors, folder / TENSORS)
    return {
        "num_edits": len(layers.names),
        "writes": [[len(written.names) for written in weight.written] for weight in edited],
        "digests": [_digest(weight.site.weight) for weight in edited],
        "tensors": hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest(),
    }


def read_delta(folder: Path) -> Delta:
    """Read a delta.

    Raises:
        DeltaError: If it is missing, damaged, of another version, or another form of export.
    """
    path = folder / ABOUT
    advice = "give the folder of an export as delta"
    try:
        about: dict[str, Any] = parsed(read_regular(path))
        kind, version = about["format"], about["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(DeltaError, str(path), error, advice)
    if kind in OTHER_FORMS:
        raise DeltaError(f"{folder}: an export as {kind}, not as delta; export again with --format delta")
    if version != VERSION:
        raise DeltaError(
            f"{path}: version {version!r} of the form; this release reads version {VERSION}. Export again from the run"
        )
    try:
        checked(DELTA, about)
        if not is_intact(about):
            raise ValueError("its checksum does not fit")
        layers = {len(about["rewrite"]["layers"]), len(about["writes"]), len(about["digests"])}
        if len(layers) > 1 or any(sum(writes) > about["num_edits"] for writes in about["writes"]):
            raise ValueError("its numbers of layers or edits do not fit each other")
    except ValueError as error:
        refuse(DeltaError, str(path), error, advice)
    path = folder / TENSORS
    try:
        content = read_regular(path)
        if hashlib.sha256(content).hexdigest() != about["tensors"]:
            raise ValueError(f"its checksum is not the one in {ABOUT}")
        tensors = load(content)
        updates = tuple(
            _updates(tensors[f"layers.{place}.left"], tensors[f"layers.{place}.right"], writes)
            for place, writes in enumerate(about["writes"])
        )
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        refuse(DeltaError, str(path), error, "export again")
    return Delta(about, updates)


def _updates(left: Tensor, right: Tensor, writes: Sequence[int]) -> tuple[Update, ...]:
    # Copies are aligned in memory as the run's factors were: kernels may round unaligned data differently.
    if any(tensor.ndim != 2 or not bool(tensor.isfinite().all()) for tensor in (left, right)):
        raise ValueError("it holds factors that are no finite numbers in rows")
    rows = zip(torch.split(left, list(writes)), torch.split(right, list(writes)), strict=True)
    return tuple(Update(some.clone(), others.clone()) for some, others in rows)


@torch.no_grad()
def apply_delta(language_model: LanguageModel, delta: Delta) -> bool:
    """Put a delta's edits into the unedited model that its run began with.

    Args:
        language_model: The model. It is unchanged after an error.
        delta: The delta.

    Returns:
        Whether the weights are bit for bit those of the run. They are not if the model was loaded from a copy in
        another precision, or if the machine or the number of threads rounds matrix products differently.

    Raises:
        DeltaError: If the delta belongs to another model.
    """
    base = delta.about["base"]
    refuse_another_model(base, language_model, DeltaError, "a delta", "give the model that the run began with")
    sites = [find_site(language_model.model, number) for number in delta.about["rewrite"]["layers"]]
    edited = [_edited(site, updates) for site, updates in zip(sites, delta.updates, strict=True)]
    for site, weight in zip(sites, edited, strict=True):
        site.weight.copy_(weight)
    wanted: list[str] = delta.about["digests"]
    return [_digest(site.weight) for site in sites] == wanted


def _edited(site: RewriteSite, updates: Sequence[Update]) -> Tensor:
    master = site.matrix(site.weight.detach()).double()
    for update in updates:
        if (update.left.shape[1], update.right.shape[1]) != (site.d_value, site.d_key):
            raise DeltaError(
                f"the delta's factors for {site.name} are of sizes {update.left.shape[1]} and {update.right.shape[1]}, "
                f"those of the weight {site.d_value} and {site.d_key}: it is damaged; export again"
            )
        master = update.to(master.device).added_to(master)
    return site.stored(master).to(site.weight.dtype)


def _digest(weight: Tensor) -> str:
    """Hash of a weight's bits."""
    values = weight.detach().cpu().contiguous()
    return hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()
