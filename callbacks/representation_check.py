"""Looks at the model's representation of a request before the edit is optimised."""

from collections.abc import Callable
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from rome_pl.edit import Edit, EditSession, EditStatus, session_of

__all__ = ["RepresentationCheck"]


class RepresentationCheck(Callback):
    """Is the fact known already; is the key finite, of ordinary norm, and far from the keys of facts already edited?

    A key that is not finite rejects the edit. The other findings are notes on the edit, or reject it if so configured.

    Args:
        on_known: What to do with a fact whose target the model already gives greedily: ``edit`` it, with a note, or
            ``skip`` it.
        largest_norm_ratio: Largest ratio, either way, between the key's norm and the root mean square over text.
        largest_overlap: Largest cosine, under the metric of the write, to the key of an earlier edit of the stream;
            above it, the new edit disturbs the older one.
        on_odd_key: What to do with a key beyond these bounds: ``note`` it, or ``reject`` the edit.

    Raises:
        ValueError: If a bound is out of range.
    """

    def __init__(
        self,
        on_known: Literal["edit", "skip"] = "edit",
        largest_norm_ratio: float = 10.0,
        largest_overlap: float = 0.9,
        on_odd_key: Literal["note", "reject"] = "note",
    ) -> None:
        if not largest_norm_ratio > 1:
            raise ValueError(f"largest_norm_ratio: expected a number above 1, got {largest_norm_ratio}")
        if not 0 < largest_overlap <= 1:
            raise ValueError(f"largest_overlap: expected a number in (0, 1], got {largest_overlap}")
        self.on_known, self.on_odd_key = on_known, on_odd_key
        self.largest_norm_ratio, self.largest_overlap = largest_norm_ratio, largest_overlap
        self._directions: dict[str, Tensor] = {}

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._directions = {}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Edit, batch_idx: int) -> None:
        if batch.status is not EditStatus.PENDING:
            return
        session = session_of(pl_module)
        assert batch.key_mean is not None
        assert batch.key_bare is not None
        assert batch.encoded is not None
        if not bool(batch.key_mean.isfinite().all()):
            batch.decide(EditStatus.REJECTED, "the key is not finite: load the model in float32 or bfloat16")
            return
        before = session.measure_target(batch.encoded.rows[0])
        batch.before = before.probability
        if before.greedy:
            if self.on_known == "skip":
                batch.decide(EditStatus.SKIPPED, "the model gives this target already (on_known: skip)")
                return
            batch.notes.append("the model gave this target already")
        for finding in self._odd(session, batch.key_mean):
            if self.on_odd_key == "reject":
                batch.decide(EditStatus.REJECTED, finding)
                return
            batch.notes.append(finding)

    def _odd(self, session: EditSession, key: Tensor) -> list[str]:
        findings = []
        if session.moment is not None:
            ratio = float(key.norm()) / session.moment.typical_norm
            if not 1 / self.largest_norm_ratio <= ratio <= self.largest_norm_ratio:
                findings.append(f"the key's norm is {ratio:.2g} times the usual one")
        for name, overlap in self._overlaps(session, key).items():
            if abs(overlap) > self.largest_overlap:
                findings.append(
                    f"the key all but equals that of record {name} (cosine {overlap:.2f}): one fact may undo the other"
                )
        return findings

    def _overlaps(self, session: EditSession, key: Tensor) -> dict[str, float]:
        """Cosine, under the metric, between a key and that of every edit in the weight."""
        written = session.weight.written
        if not written:
            return {}
        metric = session.weight.metric
        for edit in written:
            if edit.name not in self._directions:  # one solve per edit, however long the stream
                self._directions[edit.name] = _unit(metric, edit.assertion.shape)
        directions = torch.stack([self._directions[edit.name] for edit in written])
        row = key.double().unsqueeze(0)
        cosines = directions @ row[0] / (metric(row) * row).sum().sqrt()
        return dict(zip((edit.name for edit in written), cosines.tolist(), strict=True))


def _unit(metric: Callable[[Tensor], Tensor], key: Tensor) -> Tensor:
    """``M k / √(kᵀ M k)`` of one key ``[1, d_key]``: its inner product with another key is their overlap."""
    direction = metric(key.double())
    return (direction / (direction * key.double()).sum().sqrt())[0]
