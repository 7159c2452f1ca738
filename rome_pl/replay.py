"""Rebuilding edited weights from the ledger of a run."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rome_pl.architecture import find_site
from rome_pl.edit import EditStatus
from rome_pl.edited_layers import EditedLayers, Written
from rome_pl.language_model import LanguageModel
from rome_pl.ledger import LedgerError, read_lines
from rome_pl.rank_one import Assertion, Update
from rome_pl.weights import EditedWeight, LayerWrite

__all__ = [
    "Differences",
    "differences",
    "groups_of",
    "load_write",
    "read_edits",
    "read_manifest",
    "read_writes",
    "replay",
]


def replay(language_model: LanguageModel, run: Path) -> EditedLayers:
    """Put the edits of a sequential run into the unedited model that the run began with, as that run left them.

    Args:
        language_model: The unedited model.
        run: The run's folder, with ``manifest.json`` and ``ledger/``.

    Returns:
        The weights with their edits. Edits can be taken out of them only by a run, which has the metric.

    Raises:
        LedgerError: As :func:`read_writes`.
    """
    numbers, writes = read_writes(language_model, run)
    layers = EditedLayers([EditedWeight(find_site(language_model.model, number), _no_metric) for number in numbers])
    for written in writes:
        layers.restore(written)
    return layers


def read_writes(language_model: LanguageModel, run: Path) -> tuple[list[int], list[Written]]:
    """The layers that a sequential run has edited, and its writes in their order; arguments as those of :func:`replay`.

    Raises:
        LedgerError: If there is no ledger, it is damaged, its edits do not accumulate, or it is of another model.
    """
    manifest = read_manifest(run)
    if manifest.get("mode", "sequential") != "sequential":
        raise LedgerError(f"{run}: a ledger of single edits, each made on the original model; none accumulates")
    theirs, ours = manifest["model"]["fingerprint"], language_model.fingerprint
    if theirs != ours:
        raise LedgerError(
            f"{run}: a ledger of another model ({manifest['model']['source']}, {theirs[:12]}) than the one loaded "
            f"({language_model.source}, {ours[:12]}); load the model that the run began with"
        )
    return list(manifest["rewrite"]["layers"]), [load_write(run, group) for group in groups_of(read_edits(run))]


def read_edits(run: Path) -> list[dict[str, Any]]:
    """The ledger's edits, one each, with the status they ended in, in the order of their writes.

    Raises:
        LedgerError: If there is no ledger, or a line is damaged.
    """
    path = run / "ledger" / "edits.jsonl"
    if not path.is_file():
        raise LedgerError(f"{run}: holds no ledger (ledger/edits.jsonl); give the folder of a run")
    edits: dict[str, dict[str, Any]] = {}
    for line in read_lines(path):
        name = str(line.record["case_id"])
        edits[name] = edits.get(name, {}) | line.record  # a later line about an edit changes what the first said
    return list(edits.values())


def groups_of(edits: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Applied edits in groups that were solved together."""
    groups: list[list[dict[str, Any]]] = []
    for edit in edits:
        if edit["status"] != EditStatus.APPLIED or "shard" not in edit:
            continue
        if groups and edit.get("joint") is not None and groups[-1][0].get("joint") == edit["joint"]:
            groups[-1].append(edit)
        else:
            groups.append([edit])
    return groups


def load_write(run: Path, group: Sequence[dict[str, Any]]) -> Written:
    """The write of edits that were solved together, as the run made it.

    Raises:
        LedgerError: If a shard is missing or damaged, or an edit of the group is.
    """
    if len(group) != len(group[0].get("joint") or group[:1]):
        raise LedgerError(
            f"{run}: edit {group[0]['case_id']} was solved together with others, whose lines the ledger lacks"
        )
    parts: list[dict[str, Tensor]] = []
    for edit in group:
        path = run / "ledger" / "shards" / edit["shard"]
        try:
            parts.append(load_file(path))
        except (OSError, SafetensorError) as error:
            raise LedgerError(
                f"{path}: missing or damaged ({error}); edit {edit['case_id']} cannot be rebuilt"
            ) from error
    numbers = sorted({layer for edit in group for layer in edit["layers"]})
    names = tuple(str(edit["case_id"]) for edit in group)
    return Written(names, {layer: _layer_write(group, parts, layer) for layer in numbers})


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


@dataclass(frozen=True)
class Differences:
    """How two runs differ.

    Args:
        names: Records that only one of them has, or whose new target or outcome is another.
        norm: Frobenius norm of the difference of the edited weights.
        norms: Frobenius norms of what either has changed.
    """

    names: tuple[str, ...]
    norm: float
    norms: tuple[float, float]


def differences(one: Path, two: Path) -> Differences:
    """Compare the ledgers of two sequential runs of one model.

    Raises:
        LedgerError: If they are of different models, or one cannot be read.
    """
    models = [read_manifest(run)["model"] for run in (one, two)]
    if models[0]["fingerprint"] != models[1]["fingerprint"]:
        raise LedgerError(
            f"{two}: a ledger of another model ({models[1]['source']}) than {one} ({models[0]['source']}); their "
            "weights cannot be compared"
        )
    edits = [{str(edit["case_id"]): edit for edit in read_edits(run)} for run in (one, two)]
    said = [{name: (edit["status"], edit["request"]["target_new"]) for name, edit in one.items()} for one in edits]
    names = tuple(name for name in {**said[0], **said[1]} if said[0].get(name) != said[1].get(name))
    changes = [_changes(run) for run in (one, two)]
    apart = [
        Update.joint(
            [*changes[0].get(layer, []), *(Update(-update.left, update.right) for update in changes[1].get(layer, []))]
        )
        for layer in changes[0].keys() | changes[1].keys()
    ]
    norms = [math.hypot(*(Update.joint(updates).norm for updates in change.values())) for change in changes]
    return Differences(names, math.hypot(*(update.norm for update in apart)), (norms[0], norms[1]))


def _changes(run: Path) -> dict[int, list[Update]]:
    """The changes a run has made, by layer."""
    changes: dict[int, list[Update]] = {}
    for group in groups_of(read_edits(run)):
        for layer, written in load_write(run, group).layers.items():
            changes.setdefault(layer, []).append(written.update)
    return changes


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
        LedgerError: If it is missing or damaged.
    """
    path = run / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        manifest["model"]["fingerprint"], manifest["rewrite"]["layers"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise LedgerError(f"{path}: missing or damaged ({error}); give the folder of a run of rome-pl edit") from error
    return manifest


def _no_metric(keys: Tensor) -> Tensor:
    raise LedgerError("edits rebuilt from a ledger cannot be solved anew without the run's second moment")
