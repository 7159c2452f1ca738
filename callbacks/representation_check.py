"""Looks at the model's representation of a request before the edit is optimised."""

import logging
from collections.abc import Callable
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from rome_pl.editing.edit import Edit, EditBatch
from rome_pl.editing.outcome import HELD_ALREADY
from rome_pl.editing.probing import measure_targets
from rome_pl.editing.session import EditSession, session_of
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics.probes import TargetMeasure
from rome_pl.requests.conflicts import conflicts

__all__ = ["RepresentationCheck"]

log = logging.getLogger(__name__)


class RepresentationCheck(Callback):
    """Is the fact known already, or edited before; is the key finite, of ordinary norm, and far from earlier ones?

    A key that is not finite rejects the edit. The other findings are notes on the edit, or reject it if so configured.
    Where edits accumulate, a warning before the first edit lists requests that contradict or repeat an earlier
    one of the stream.

    Args:
        on_known: What to do with a fact whose target the model already gives greedily: ``edit`` it, with a note, or
            ``skip`` it.
        largest_norm_ratio: Largest ratio, either way, between the key's norm and the root mean square over text.
        largest_overlap: Largest cosine, under the metric of the write, to the key of an earlier edit of the stream;
            above it, the new edit disturbs the older one.
        least_specificity: Least specificity of the key, summed over the rewrite layers; a token of ordinary text has 1
            a layer. Below it, the edit disturbs a lot of other text.
        on_odd_key: What to do with a key beyond these bounds: ``note`` it, or ``reject`` the edit.
        on_conflict: What to do with a request that contradicts or repeats an earlier one: the same.

    Raises:
        ValueError: If a bound is out of range.
    """

    def __init__(
        self,
        on_known: Literal["edit", "skip"] = "edit",
        largest_norm_ratio: float = 10.0,
        largest_overlap: float = 0.9,
        least_specificity: float = 0.2,
        on_odd_key: Literal["note", "reject"] = "note",
        on_conflict: Literal["note", "reject"] = "note",
    ) -> None:
        if not largest_norm_ratio > 1:
            raise ValueError(f"largest_norm_ratio: expected a number above 1, got {largest_norm_ratio}")
        if not 0 < largest_overlap <= 1:
            raise ValueError(f"largest_overlap: expected a number in (0, 1], got {largest_overlap}")
        if not least_specificity >= 0:
            raise ValueError(f"least_specificity: expected a number from 0 on, got {least_specificity}")
        self.least_specificity = least_specificity
        self.on_known, self.on_odd_key, self.on_conflict = on_known, on_odd_key, on_conflict
        self.largest_norm_ratio, self.largest_overlap = largest_norm_ratio, largest_overlap
        self._directions = _Directions()
        self._seen = 0
        self._conflicts: dict[str, str] = {}

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._directions, self._seen = _Directions(), 0
        session = session_of(pl_module)
        self._conflicts = conflicts(session.requests) if session.sequential else {}
        if self._conflicts:
            name, finding = next(iter(self._conflicts.items()))
            log.warning("%d records are about facts of earlier ones: record %s %s", len(self._conflicts), name, finding)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: EditBatch, batch_idx: int
    ) -> None:
        session = session_of(pl_module)
        pending = [edit for edit in batch.edits if edit.status is EditStatus.PENDING]
        if pending:
            for edit, before in zip(pending, measure_targets(session, pending, written=False), strict=True):
                self._check(session, edit, before)

    def _check(self, session: EditSession, edit: Edit, before: TargetMeasure) -> None:
        key = edit.search.keys.key(session.preset.shape)
        if not bool(key.isfinite().all()):
            edit.decide(EditStatus.REJECTED, "the key is not finite: load the model in float32 or bfloat16")
            return
        edit.note_before(before.greedy, before.probability)
        if before.greedy and self.on_known == "skip":
            edit.decide(EditStatus.SKIPPED, f"{HELD_ALREADY} (on_known: skip)")
            return
        if (conflict := self._conflicts.get(edit.name)) is not None:
            if self.on_conflict == "reject":
                edit.decide(EditStatus.REJECTED, conflict)
                return
            edit.notes.append(conflict)
        for finding in self._odd(session, edit, key):
            if self.on_odd_key == "reject":
                edit.decide(EditStatus.REJECTED, finding)
                return
            edit.notes.append(finding)

    def _odd(self, session: EditSession, edit: Edit, key: Tensor) -> list[str]:
        findings = []
        if edit.specificity is not None and edit.specificity < self.least_specificity:
            findings.append(
                f"the key stands for much else too (specificity {edit.specificity:.2g}, a token of ordinary text "
                "has 1 a layer): the edit changes other text; give lower or more layers, or preset r_rome"
            )
        if session.layers.moments:
            ratio = float(key.norm()) / session.layers.last_moment.typical_norm
            if not 1 / self.largest_norm_ratio <= ratio <= self.largest_norm_ratio:
                findings.append(f"the key's norm is {ratio:.2g} times the usual one")
        overlaps = self._overlaps(session, key)
        if overlaps and edit.search.encoded.kept:  # the search weighs those of its own subject
            applied, subject = session.applied(), edit.request.subject
            overlaps = {name: cosine for name, cosine in overlaps.items() if applied[name].subject != subject}
        for name, overlap in overlaps.items():
            findings.append(
                f"the key all but equals that of record {name} (cosine {overlap:.2f}): one fact may undo the other"
            )
        return findings

    def _overlaps(self, session: EditSession, key: Tensor) -> dict[str, float]:
        """Cosines, under the metric, to the keys of edits in the weight, where they are too large."""
        weight = session.layers.last
        metric = weight.metric.fixed  # the one with earlier edits in it would hide what it is asked for
        if len(weight.written) < self._seen:  # edits were rolled back
            self._directions, self._seen = _Directions(), 0
        for written in weight.written[self._seen :]:
            for name in written.names:
                self._directions.add(name, _unit(metric, written.part(name).assertion.shape))
        self._seen = len(weight.written)
        if not self._seen:
            return {}
        row = key.double().unsqueeze(0)
        cosines = self._directions.products(row[0]) / (metric(row) * row).sum().sqrt()
        above = (cosines.abs() > self.largest_overlap).nonzero()[:, 0].tolist()
        inside = set(weight.names) if above else set()  # edits may have been rolled back
        return {
            self._directions.names[index]: float(cosines[index])
            for index in above
            if self._directions.names[index] in inside
        }


class _Directions:
    """Directions of earlier keys in one growing matrix, so that an edit costs the same however long the stream is."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._matrix: Tensor | None = None

    def add(self, name: str, direction: Tensor) -> None:
        if self._matrix is None:
            self._matrix = direction.new_zeros(64, len(direction))
        elif len(self.names) == len(self._matrix):
            self._matrix = torch.cat([self._matrix, torch.zeros_like(self._matrix)])
        self._matrix[len(self.names)] = direction
        self.names.append(name)

    def products(self, key: Tensor) -> Tensor:
        assert self._matrix is not None
        return self._matrix[: len(self.names)] @ key


def _unit(metric: Callable[[Tensor], Tensor], key: Tensor) -> Tensor:
    """``M k / √(kᵀ M k)`` of one key ``[1, d_key]``: its inner product with another key is their overlap."""
    direction = metric(key.double())
    return (direction / (direction * key.double()).sum().sqrt())[0]
