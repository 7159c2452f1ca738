"""One edit on its way through a run.

An :class:`EditBatch` is the batch that callbacks see before the optimisation; its :class:`Edit` objects are the result
they see after it. Neither knows Lightning.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rome_pl.editing.outcome import HELD_ALREADY
from rome_pl.encoding.encoded_rows import EncodedEdit
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics.probes import ProbeScores, TargetMeasure
from rome_pl.requests.edit_request import EditRequest
from rome_pl.search.objective import ValueObjective
from rome_pl.search.value_search import Evaluation
from rome_pl.write.edit_keys import EditKeys
from rome_pl.write.edited_layers import EditWrite
from rome_pl.write.layer_shares import LayerShares

__all__ = ["Edit", "EditBatch", "EditError", "edits_of"]


MEASURED_ONCE = ("specificity", "value_norm", "update_norm", "realised")
"""What of an edit's record is measured on what a run that goes on with it does not have any more."""


class EditError(RuntimeError):
    """An edit that failed while ``on_error`` is ``stop``."""


@dataclass
class Edit:
    """One request on its way.

    Args:
        index: Position in the stream of requests, from 0.
        request: What is asked for.
        encoded: Its rows as tokens; ``None`` if they could not be made.
        status: Where it stands.
        failed: Whether it could not be tried, which ``on_error`` decides about.
        reason: Why it was rejected, skipped or rolled back.
        notes: Remarks that changed nothing.
        layers: The layers it is to be written into, the lowest first; its value is searched at the last.
        keys: Its keys there.
        specificity: How specific its key is at each of them, see :meth:`EditedLayers.specificity`.
        attempt: Which search has found its value: 0 for the first, then the number of the retry.
        place: Its number among the edits that were prepared together with it.
        spread: How their offsets are shared, where they are written into several layers; freed after use.
        delta: The optimised value offset, ``[d_value]``.
        value: The offset on top of the bare prompt's output, ``[d_value]``: the value that published presets assert.
        steps: Losses, one per evaluation.
        written: Its write, once done; in single mode the write that was measured.
        before: Probability of the target before the edit: geometric mean over its tokens, on the bare prompt.
        after: The same after the write.
        greedy_before: Whether greedy decoding after the bare prompt gives the target before the edit: whether it holds
            already.
        greedy_after: Whether it does after the write.
        scores: Probe measurements by stage (``base``, ``immediate``, ``final``).
        seconds: Wall time by stage; what a batch does at once is shared evenly among its edits.
        recorded: What an earlier run's ledger says of it, if it was taken over from there.
    """

    index: int
    request: EditRequest
    encoded: EncodedEdit | None = None
    status: EditStatus = EditStatus.PENDING
    failed: bool = False
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    layers: tuple[int, ...] = ()
    keys: EditKeys | None = None
    specificity: tuple[float, ...] = ()
    attempt: int = 0
    place: int = 0
    spread: LayerShares | None = None
    delta: Tensor | None = None
    value: Tensor | None = None
    steps: list[Evaluation] = field(default_factory=list)
    written: EditWrite | None = None
    before: float | None = None
    after: float | None = None
    greedy_before: bool | None = None
    greedy_after: bool | None = None
    scores: dict[str, ProbeScores] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    recorded: Mapping[str, Any] | None = None

    def record(self) -> dict[str, object]:
        """What the ledger and results.json say of this edit, in plain values."""
        written, recorded = self.written, self.recorded
        now: dict[str, object] = {
            "index": self.index,
            "case_id": self.request.case_id,
            "status": str(self.status),
            "reason": self.reason,
            "notes": self.notes,
            "request": self.request.content(),
            "probability": {"before": self.before, "after": self.after},
            "greedy": {"before": self.greedy_before, "after": self.greedy_after},
            "layers": list(self.layers),
            "specificity": sum(self.specificity) if self.specificity else None,
            "num_steps": len(self.steps),
            "loss": self.steps[-1].loss if self.steps else None,
            "value_norm": float(self.delta.norm()) if self.delta is not None else None,
            "update_norm": written.norm if written else None,
            "realised": written.realised[0] if written else None,
        }
        # An edit that was taken over has no key and no offset any more: what was measured of them then.
        return now if recorded is None else now | {name: recorded[name] for name in MEASURED_ONCE}

    def line(self) -> dict[str, object]:
        """What the ledger says of this edit: the record, and what a run that goes on with the ledger needs besides."""
        measured = self.scores.get("immediate")
        return self.record() | {
            "failed": self.failed,
            "steps": [astuple(step) for step in self.steps],
            "measured": asdict(measured) if measured is not None else None,
        }

    @property
    def name(self) -> str:
        """Identifier in the edited weight and the ledger."""
        return str(self.request.case_id)

    @property
    def held_already(self) -> bool:
        """Whether it was applied, and the model gave its target before."""
        return self.status is EditStatus.APPLIED and self.greedy_before is True

    @property
    def offset_norm(self) -> float:
        """Norm of the offset that was found, also where an earlier run has found it; 0 without one."""
        if self.recorded is not None:
            return float(self.recorded["value_norm"] or 0.0)
        return 0.0 if self.delta is None else float(self.delta.norm())

    def note_before(self, greedy: bool, probability: float | None = None) -> None:
        """Note what the model makes of the target before anything is written for the edit; the first look counts."""
        if self.before is None:
            self.before = probability
        if self.greedy_before is None:
            self.greedy_before = greedy
            self.notes += [HELD_ALREADY] * greedy

    def note_after(self, measure: TargetMeasure) -> None:
        """Note what the model makes of the target after the write."""
        self.after, self.greedy_after = measure.probability, measure.greedy

    def on_cpu(self) -> "Edit":
        """A copy whose tensors are the CPU's, for other processes."""
        moved, cpu = copy(self), torch.device("cpu")
        moved.spread = None
        moved.keys = None if self.keys is None else self.keys.to(cpu)
        moved.delta = None if self.delta is None else self.delta.cpu()
        moved.value = None if self.value is None else self.value.cpu()
        moved.written = None if self.written is None else self.written.to(cpu)
        return moved

    def decide(self, status: EditStatus, reason: str) -> None:
        """Record a verdict other than success."""
        self.status, self.reason = status, reason

    def replace_write(self, written: EditWrite) -> None:
        """Have another write than the one it was recorded with."""
        self.written = written
        if self.recorded is not None:
            self.recorded = {**self.recorded, "update_norm": written.norm, "realised": written.realised[0]}

    def fail(self, reason: str) -> None:
        """Skip the edit because it could not be tried."""
        self.failed = True
        self.decide(EditStatus.SKIPPED, reason)


@dataclass
class EditBatch:
    """Edits whose values are optimised side by side.

    Args:
        edits: The edits, in the order in which the loader gave them; none where another device has one more batch than
            this one.
        objective: Losses of the offsets of :attr:`optimised`, with the prefix pass behind them; freed after use.
        optimised: The edits that could be encoded.
    """

    edits: list[Edit]
    objective: ValueObjective | None = None
    optimised: list[Edit] = field(default_factory=list)


def edits_of(outputs: Any) -> list[Edit]:
    """The edits in a training step's result."""
    edits: list[Edit] = outputs["edits"]
    return edits
