"""Rebuilding edited weights from the ledger of a run."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from rome_pl.files.checksums import SEAL, is_intact
from rome_pl.files.schemas import checked, parsed, refuse
from rome_pl.files.whole_files import read_regular
from rome_pl.ledger.ledger_lines import LedgerError, check_end, read_lines
from rome_pl.ledger.run_schemas import MANIFEST
from rome_pl.ledger.status import EditStatus
from rome_pl.model.architecture import RewriteSite, find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.model_check import refuse_another_model
from rome_pl.write.closed_form import Assertion, Update
from rome_pl.write.edited_layers import EditedLayers, EditWrite
from rome_pl.write.edited_weight import EditedWeight, LayerWrite

__all__ = ["groups_of", "load_write", "read_edits", "read_manifest", "read_writes", "replay"]

PARTS = ("key_shape", "key_at", "value", "left", "right", "ridge")
"""Names of the tensors of each layer in a shard."""


def replay(language_model: LanguageModel, run: Path) -> EditedLayers:
    """Put the edits of a sequential run into the unedited model that the run began with.

    Args:
        language_model: The unedited model.
        run: The run's folder, with ``manifest.json`` and ``ledger/``.

    Returns:
        The weights with their edits. Undoing edits needs the metric, see :func:`rome_pl.ledger.undo.with_edits`.

    Raises:
        LedgerError: Like :func:`read_writes`.
    """
    numbers, writes = read_writes(language_model, run)
    layers = EditedLayers([EditedWeight(find_site(language_model.model, number), _no_metric) for number in numbers])
    for written in writes:
        layers.restore(written)
    return layers


def read_writes(
    language_model: LanguageModel, run: Path, edits: Sequence[dict[str, Any]] | None = None
) -> tuple[list[int], list[EditWrite]]:
    """Return the edited layers of a sequential run, and its writes in order.

    Args:
        language_model: The unedited model.
        run: The run's folder.
        edits: The result of :func:`read_edits`. ``None`` (default): it is read here.

    Raises:
        LedgerError: If there is no ledger, it is damaged, its edits do not accumulate, or it belongs to another model.
    """
    manifest = read_manifest(run)
    if manifest.get("mode", "sequential") != "sequential":
        raise LedgerError(f"{run}: a ledger of single edits, each made on the original model; none accumulates")
    refuse_another_model(
        manifest["model"], language_model, LedgerError, f"{run}: a ledger", "load the model that the run began with"
    )
    numbers = list(manifest["rewrite"]["layers"])
    writes = [load_write(run, group) for group in groups_of(read_edits(run) if edits is None else edits)]
    sites = {layer: find_site(language_model.model, layer) for layer in numbers}
    for written in writes:
        _check_sizes(run, sites, written)
    return numbers, writes


def _check_sizes(run: Path, sites: Mapping[int, RewriteSite], written: EditWrite) -> None:
    """Refuse a write whose layers or sizes do not fit the model."""
    for layer, part in written.layers.items():
        if layer not in sites:
            raise LedgerError(f"{run}: edit {written.names[0]} is of layer {layer}, the manifest's are {list(sites)}")
        site = sites[layer]
        found = (part.update.left.shape[1], part.update.right.shape[1])
        if found != (site.d_value, site.d_key):
            raise LedgerError(
                f"{run}: the shard of edit {written.names[0]} is of sizes {found}, layer {layer} of the model of "
                f"{(site.d_value, site.d_key)}; it is of another run"
            )


def read_edits(run: Path) -> list[dict[str, Any]]:
    """Read the ledger's edits with their final status, in the order of their writes.

    Raises:
        LedgerError: If there is no ledger, a line is damaged, or lines are missing.
    """
    path = run / "ledger" / "edits.jsonl"
    if not path.exists():
        raise LedgerError(f"{run}: holds no ledger (ledger/edits.jsonl); give the folder of a run")
    lines = read_lines(path)
    check_end(path.parent, lines)
    edits: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        name = str(line.record["case_id"])
        if name not in edits and "request" not in line.record:
            raise LedgerError(f"{path}, line {number}: says what became of edit {name}, which no line before it is of")
        edits[name] = edits.get(name, {}) | line.record  # a later line about an edit overrides the first
    return list(edits.values())


def groups_of(edits: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group applied edits that were solved together."""
    groups: list[list[dict[str, Any]]] = []
    for edit in edits:
        if edit["status"] != EditStatus.APPLIED or "shard" not in edit:
            continue
        if groups and edit.get("joint") is not None and groups[-1][0].get("joint") == edit["joint"]:
            groups[-1].append(edit)
        else:
            groups.append([edit])
    return groups


def load_write(run: Path, group: Sequence[dict[str, Any]]) -> EditWrite:
    """Load the write of edits that were solved together.

    Raises:
        LedgerError: If a shard or a line of the group is missing or damaged.
    """
    if len(group) != len(group[0].get("joint") or group[:1]):
        raise LedgerError(
            f"{run}: edit {group[0]['case_id']} was solved together with others, whose lines the ledger lacks"
        )
    parts = [_shard(run / "ledger" / "shards", edit) for edit in group]
    numbers = sorted({layer for edit in group for layer in edit["layers"]})
    names = tuple(str(edit["case_id"]) for edit in group)
    return EditWrite(names, {layer: _layer_write(group, parts, layer) for layer in numbers})


def _shard(folder: Path, edit: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an edit's write, as they were written."""
    path = folder / edit["shard"]
    try:
        content = read_regular(path)
        # Ledgers of earlier versions lack it; reading their lines warns.
        if edit.get("shard_sha256", found := hashlib.sha256(content).hexdigest()) != found:
            raise ValueError("its checksum is not the one in the ledger")
        tensors = {name: tensor.clone() for name, tensor in load(content).items()}
        if edit.get("realised") is None or not edit["layers"]:
            raise ValueError("the ledger does not say its layers and what it has realised")
        for place in range(len(edit["layers"])):
            _check_shapes({name: tensors[f"layers.{place}.{name}"] for name in PARTS})
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise LedgerError(
            f"{path}: missing or damaged ({error}); edit {edit['case_id']} cannot be rebuilt. Take the file from a "
            "copy, or make the run again"
        ) from error
    return tensors


def _check_shapes(part: Mapping[str, Tensor]) -> None:
    """Refuse tensors that cannot be the write of one edit into one layer."""
    rows = {name: tensor for name, tensor in part.items() if name != "ridge"}
    if part["ridge"].shape != () or any(tensor.ndim != 2 or len(tensor) != 1 for tensor in rows.values()):
        raise ValueError(f"tensors of shapes {[tuple(tensor.shape) for tensor in part.values()]}")
    for of in (("key_shape", "key_at", "right"), ("value", "left")):
        if len({rows[name].shape for name in of}) > 1:
            raise ValueError(f"{', '.join(of)} of different lengths")
    for name, tensor in part.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds what is no finite number")


def _layer_write(group: Sequence[dict[str, Any]], parts: Sequence[dict[str, Tensor]], layer: int) -> LayerWrite:
    """One layer's part of a write, from the lines and shards of its edits."""
    here = [(edit, part) for edit, part in zip(group, parts, strict=True) if layer in edit["layers"]]
    names = tuple(str(edit["case_id"]) for edit, _ in here)
    realised = tuple(float(edit["realised"]) for edit, _ in here)

    def read(name: str) -> list[Tensor]:
        return [part[f"layers.{edit['layers'].index(layer)}.{name}"] for edit, part in here]

    columns = zip(read("key_shape"), read("key_at"), read("value"), map(float, read("ridge")), strict=True)
    assertion = Assertion.joint([Assertion(*column) for column in columns])
    updates = [Update(left, right) for left, right in zip(read("left"), read("right"), strict=True)]
    return LayerWrite(names, assertion, Update.joint(updates), realised)


def read_manifest(run: Path) -> dict[str, Any]:
    """Read the manifest of a run.

    Raises:
        LedgerError: If it is missing or damaged.
    """
    path = run / "manifest.json"
    try:
        manifest: dict[str, Any] = parsed(read_regular(path))
        checked(MANIFEST, manifest)
        if SEAL in manifest and not is_intact(manifest):
            raise ValueError("its checksum does not fit")
        if SEAL not in manifest and "config" in manifest["model"]:
            raise ValueError("its checksum is missing")  # earlier versions had neither
    except (OSError, ValueError) as error:
        refuse(LedgerError, str(path), error, "give the folder of a run of rome-pl edit")
    return {name: value for name, value in manifest.items() if name != SEAL}


def _no_metric(keys: Tensor) -> Tensor:
    raise LedgerError("edits rebuilt from a ledger cannot be solved anew without the run's second moment")
