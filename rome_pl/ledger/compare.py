"""Comparing the edits and weights of two runs."""

import math
from dataclasses import dataclass
from pathlib import Path

from rome_pl.ledger.ledger_lines import LedgerError
from rome_pl.ledger.replay import groups_of, load_write, read_edits, read_manifest
from rome_pl.write.closed_form import Update

__all__ = ["Differences", "differences"]


@dataclass(frozen=True)
class Differences:
    """The differences of two runs.

    Args:
        names: Records that only one of them has, or whose new target or outcome differs.
        norm: Frobenius norm of the difference of the edited weights.
        norms: Frobenius norms of the change of each run.
    """

    names: tuple[str, ...]
    norm: float
    norms: tuple[float, float]


def differences(one: Path, two: Path) -> Differences:
    """Compare the ledgers of two sequential runs of one model.

    Raises:
        LedgerError: If they belong to different models, or one cannot be read.
    """
    models = [read_manifest(run)["model"] for run in (one, two)]
    if any(len({model.get(name, "") for model in models} - {""}) > 1 for name in ("fingerprint", "config")):
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
    """The changes of a run, by layer."""
    changes: dict[int, list[Update]] = {}
    for group in groups_of(read_edits(run)):
        for layer, written in load_write(run, group).layers.items():
            changes.setdefault(layer, []).append(written.update)
    return changes
