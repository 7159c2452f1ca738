"""One edit: the search for its value, and what became of it.

An :class:`EditBatch` is the batch that callbacks see before the optimisation; its :class:`Edit` objects are the result
they see after it. Neither knows Lightning.
"""

from copy import copy
from dataclasses import asdict, astuple, dataclass, field, replace
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

__all__ = ["Edit", "EditBatch", "EditError", "EditSearch", "edits_of"]


class EditError(RuntimeError):
    """An edit that failed while ``on_error`` is ``stop``."""


@dataclass
class EditSearch:
    """The search for the value of one edit: what it runs on, and what it has found.

    Args:
        encoded: The request's rows as tokens.
        layers: The layers that the edit is to be written into, the lowest first; it searches at the last.
        position: Number of the edit among those that were prepared together.
        keys: The edit's keys at the last layer.
        specificity: How specific its key is at each layer, see :meth:`EditedLayers.specificity`; empty where the metric
            is the identity.
        shares: How the offset is shared among several layers. ``None``: there is one layer, or the edit is written.
        attempt: Which search this is: 0 for the first, then the number of the retry.
        delta: The offset that was found, ``[d_value]``. ``None``: none yet, or the search broke down.
        value: The offset on top of the bare prompt's output, ``[d_value]``: the value that published presets assert.
    """

    encoded: EncodedEdit
    layers: tuple[int, ...]
    position: int
    keys: EditKeys
    specificity: tuple[float, ...] = ()
    shares: LayerShares | None = None
    attempt: int = 0
    delta: Tensor | None = None
    value: Tensor | None = None

    def to(self, device: torch.device) -> "EditSearch":
        """The same on a device, without the prefix pass behind the shares."""
        delta, value = (None if tensor is None else tensor.to(device) for tensor in (self.delta, self.value))
        return replace(self, keys=self.keys.to(device), shares=None, delta=delta, value=value)


@dataclass
class Edit:
    """One edit of a run: what was asked for, and what became of it.

    Args:
        index: Position in the stream of requests, from 0.
        request: What is asked for.
        status: Where it stands.
        failed: Whether it could not be tried, which ``on_error`` decides about.
        reason: Why it was rejected, skipped or rolled back.
        notes: Remarks that changed nothing.
        layers: The layers that it is to be written into, the lowest first.
        steps: Losses, one per evaluation.
        written: Its write, once done; in single mode the write that was measured.
        specificity: How specific its keys are, summed over its layers. ``None``: not known, or the metric is the
            identity.
        value_norm: Norm of the offset that was found.
        update_norm: Frobenius norm of the change of all its layers together.
        realised: Share of the wanted change at its key that survives the rounding to the model's dtype.
        before: Probability of the target before the edit: geometric mean over its tokens, on the bare prompt.
        after: The same after the write.
        greedy_before: Whether greedy decoding after the bare prompt gives the target before the edit: whether it holds
            already.
        greedy_after: Whether it does after the write.
        scores: Probe measurements by stage (``base``, ``immediate``, ``final``).
        seconds: Wall time by stage of the work (``prefix``, ``optimise``, ``write``, ``verify``, ``evaluate``); what a
            batch does at once is shared evenly among its edits.
        resumed: Whether an earlier run has made it, and its ledger tells all this.
    """

    index: int
    request: EditRequest
    status: EditStatus = EditStatus.PENDING
    failed: bool = False
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    layers: tuple[int, ...] = ()
    steps: list[Evaluation] = field(default_factory=list)
    written: EditWrite | None = None
    specificity: float | None = None
    value_norm: float | None = None
    update_norm: float | None = None
    realised: float | None = None
    before: float | None = None
    after: float | None = None
    greedy_before: bool | None = None
    greedy_after: bool | None = None
    scores: dict[str, ProbeScores] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    resumed: bool = False
    _search: EditSearch | None = field(default=None, init=False, repr=False)

    @property
    def prepared(self) -> bool:
        """Whether its value is being searched, or was: not if it could not be encoded, or was resumed."""
        return self._search is not None

    @property
    def search(self) -> EditSearch:
        """The search for its value.

        Raises:
            RuntimeError: If there is none, see :attr:`prepared`.
        """
        if self._search is None:
            raise RuntimeError(f"record {self.name}: nothing was searched for it in this run")
        return self._search

    def begin_search(self, search: EditSearch) -> None:
        """Search its value anew; what an earlier search has found is given up."""
        self._search, self.layers = search, search.layers
        self.specificity = sum(search.specificity) if search.specificity else None
        self.value_norm = None

    def record(self) -> dict[str, object]:
        """What the ledger and results.json say of this edit, in plain values."""
        return {
            "index": self.index,
            "case_id": self.request.case_id,
            "status": str(self.status),
            "reason": self.reason,
            "notes": self.notes,
            "request": self.request.content(),
            "probability": {"before": self.before, "after": self.after},
            "greedy": {"before": self.greedy_before, "after": self.greedy_after},
            "layers": list(self.layers),
            "specificity": self.specificity,
            "num_steps": len(self.steps),
            "loss": self.steps[-1].loss if self.steps else None,
            "value_norm": self.value_norm,
            "update_norm": self.update_norm,
            "realised": self.realised,
        }

    def line(self) -> dict[str, object]:
        """What the ledger says of this edit: the record, and what a resumed run needs besides."""
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
        moved._search = None if self._search is None else self._search.to(cpu)
        moved.written = None if self.written is None else self.written.to(cpu)
        return moved

    def decide(self, status: EditStatus, reason: str) -> None:
        """Record a verdict other than success."""
        self.status, self.reason = status, reason

    def take_write(self, written: EditWrite) -> None:
        """Have a write, in place of an earlier one."""
        self.written, self.update_norm, self.realised = written, written.norm, written.realised[0]

    def drop_write(self) -> None:
        """Have no write, and nothing that was measured with it."""
        self.written = self.update_norm = self.realised = self.after = self.greedy_after = None

    def free(self) -> None:
        """Give up the prefix pass, which no further write of this edit needs."""
        if self._search is not None:
            self._search.shares = None

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
