"""One edit on its way through a run, and what the edits of a run share.

An :class:`EditBatch` is the batch that callbacks see before the optimisation; its :class:`Edit` objects are the result
they see after it; an :class:`EditSession` is what they may look at besides. None of them knows Lightning.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from rome_pl.encoding import EncodedEdit, FactToken
from rome_pl.language_model import LanguageModel
from rome_pl.ledger import Ledger
from rome_pl.metrics.probes import Changes, ProbeScores, TargetMeasure, measure_targets, probe_scores
from rome_pl.objective import ValueObjective
from rome_pl.rank_one import Assertion, DisablingEditError, KeyChoice, Preset, Update, balance
from rome_pl.requests import EditRequest
from rome_pl.second_moment import SecondMoment
from rome_pl.value_search import Step
from rome_pl.weights import EditedWeight, Written

__all__ = ["Edit", "EditBatch", "EditError", "EditSession", "EditStatus", "Retention", "edits_of", "session_of"]


class EditError(RuntimeError):
    """An edit that failed while ``on_error`` is ``stop``."""


class EditStatus(StrEnum):
    """Where an edit stands."""

    PENDING = "pending"
    """Not decided yet."""
    APPLIED = "applied"
    """Written and kept (in single mode: kept until it was evaluated)."""
    REJECTED = "rejected"
    """A check refused it; the weights are as they were before it."""
    SKIPPED = "skipped"
    """It could not be tried: bad input, or a numerical failure."""
    ROLLED_BACK = "rolled_back"
    """Applied, and undone later because the model's state had become bad."""


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
        key_mean: Mean key over contexts, ``[d_key]``.
        key_bare: Key of the bare prompt, ``[d_key]``.
        key_balanced: Key between the two on which an update acts in full at both, for presets that ask for it.
        output_balanced: The projection's output there, ``[d_value]``.
        delta: The optimised value offset, ``[d_value]``.
        value: The offset on top of the bare prompt's output, ``[d_value]``: the value that most presets assert.
        steps: Losses, one per evaluation.
        written: Its write, once done; in single mode the write that was measured.
        before: Probability of the target before the edit: geometric mean over its tokens, on the bare prompt.
        after: The same after the write.
        scores: Probe measurements by moment (``base``, ``immediate``, ``final``).
        seconds: Wall time by stage; what a batch does at once is shared evenly among its edits.
    """

    index: int
    request: EditRequest
    encoded: EncodedEdit | None = None
    status: EditStatus = EditStatus.PENDING
    failed: bool = False
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    key_mean: Tensor | None = None
    key_bare: Tensor | None = None
    key_balanced: Tensor | None = None
    output_balanced: Tensor | None = None
    delta: Tensor | None = None
    value: Tensor | None = None
    steps: list[Step] = field(default_factory=list)
    written: Written | None = None
    before: float | None = None
    after: float | None = None
    scores: dict[str, ProbeScores] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """What the ledger and results.json say of this edit, in plain values."""
        written = self.written
        return {
            "index": self.index,
            "case_id": self.request.case_id,
            "status": str(self.status),
            "reason": self.reason,
            "notes": self.notes,
            "request": self.request.content(),
            "probability": {"before": self.before, "after": self.after},
            "num_steps": len(self.steps),
            "loss": self.steps[-1].loss if self.steps else None,
            "value_norm": float(self.delta.norm()) if self.delta is not None else None,
            "update_norm": written.update.norm if written else None,
            "realised": written.realised[0] if written else None,
        }

    @property
    def name(self) -> str:
        """Identifier in the edited weight and the ledger."""
        return str(self.request.case_id)

    def on_cpu(self) -> "Edit":
        """A copy whose tensors are the CPU's, for other processes."""
        moved = copy(self)
        for name in ("key_mean", "key_bare", "key_balanced", "output_balanced", "delta", "value"):
            tensor = getattr(self, name)
            setattr(moved, name, None if tensor is None else tensor.cpu())
        written = self.written
        if written is not None:
            update = Update(written.update.left.cpu(), written.update.right.cpu())
            moved.written = replace(written, assertion=written.assertion.to(update.left.device), update=update)
        return moved

    def decide(self, status: EditStatus, reason: str) -> None:
        """Record a verdict other than success."""
        self.status, self.reason = status, reason

    def fail(self, reason: str) -> None:
        """Skip the edit because it could not be tried."""
        self.failed = True
        self.decide(EditStatus.SKIPPED, reason)

    def assertion(self, preset: Preset) -> Assertion:
        """The write this edit asks for: which key shapes it and at which key its value holds is the preset's choice."""
        value = self.value
        if preset.value == "own":
            assert self.output_balanced is not None
            assert self.delta is not None
            value = self.output_balanced + self.delta.double()
        assert value is not None
        return Assertion(
            shape=self.key(preset.shape).double().unsqueeze(0),
            at=self.key(preset.at).double().unsqueeze(0),
            value=value.double().unsqueeze(0),
        )

    def key(self, which: KeyChoice) -> Tensor:
        """One of its keys, ``[d_key]``."""
        key = {"mean": self.key_mean, "bare": self.key_bare, "balanced": self.key_balanced}[which]
        assert key is not None
        return key


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


@dataclass(frozen=True)
class Retention:
    """What the edits of a sequential stream are worth after some of it.

    Args:
        edits: Edits begun so far.
        perplexity: Held-out perplexity then, if it was measured.
        weight_change: Norm of the weight's change, relative to the original.
        scores: The probe scores of a sample of them, by name.
    """

    edits: int
    perplexity: float | None
    weight_change: float
    scores: dict[str, ProbeScores]


@dataclass
class EditSession:
    """What the edits of a run share.

    Args:
        language_model: The model being edited.
        weight: The rewrite site's weight with its edits.
        preset: The variant of the closed form.
        moment: Second moment of the keys; ``None`` where the preset's metric is the identity.
        sequential: Whether edits accumulate.
        fact_token: Which token is looked up.
        contexts: Texts put before prompts, the empty one first.
        requests: Every valid request of the run, in order; on several devices every rank has them all.
        num_refused: Number of requests that could not be encoded.
        edits: The edits begun so far, those of other devices once their batch is done.
        base_scores: Every valid request's probes before the stream, by name of the edit.
        final_scores: The same after a sequential stream.
        touched: By name, which neighbourhood prompts are about a subject that another one edits, where edits add up.
        perplexity: Held-out perplexity, by moment (``base``, ``final``).
        divergence: ``KL(unedited ‖ final)`` of the next token on the same text, in nats; nothing in single mode.
        retention: What the edits so far are worth at points of a sequential stream; see :class:`Retention`.
        continuations: How the model goes on with prompts, by moment and name of the edit; see :mod:`rome_pl.samples`.
        changes: Norm of the weight's change, relative to the original, by number of edits begun; the reports note it.
        state_checks: What the checks of the model's state found.
        ledger: Where edits are recorded, if anywhere.
        flops_per_edit: Floating-point operations of the first batch's prefix pass and optimisation, by edit.
    """

    language_model: LanguageModel
    weight: EditedWeight
    preset: Preset
    moment: SecondMoment | None
    sequential: bool
    fact_token: FactToken
    contexts: tuple[str, ...]
    requests: tuple[EditRequest, ...] = ()
    num_refused: int = 0
    edits: list[Edit] = field(default_factory=list)
    base_scores: dict[str, ProbeScores] = field(default_factory=dict)
    final_scores: dict[str, ProbeScores] = field(default_factory=dict)
    touched: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    divergence: float | None = None
    retention: list[Retention] = field(default_factory=list)
    continuations: dict[str, dict[str, str]] = field(default_factory=dict)
    changes: dict[int, float] = field(default_factory=dict)
    state_checks: list[dict[str, object]] = field(default_factory=list)
    ledger: Ledger | None = None
    flops_per_edit: float | None = None

    def take_keys(self, edit: Edit, keys: Tensor, outputs: Tensor) -> None:
        """Give an edit the keys that the preset needs.

        Args:
            edit: The edit.
            keys: Its keys under all contexts, the bare prompt's first, ``[contexts, d_key]``, float64.
            outputs: The projection's outputs there, ``[contexts, d_value]``, float64.
        """
        edit.key_bare, edit.key_mean = keys[0].clone(), keys.mean(0)
        if "balanced" in (self.preset.shape, self.preset.at):
            share = 1.0
            if len(keys) > 1 and bool(keys.isfinite().all()):
                share = balance(keys[0], keys[1:].mean(0), self.weight.metric)
            weights = torch.full((len(keys), 1), (1 - share) / max(1, len(keys) - 1), dtype=keys.dtype)
            weights[0] = share
            weights = weights.to(keys.device)
            edit.key_balanced, edit.output_balanced = (weights * keys).sum(0), (weights * outputs).sum(0)

    def write(self, edits: Sequence[Edit]) -> None:
        """Write the pending edits of a batch, jointly; those that cannot be written are rejected.

        In single mode each is only solved for, on the original weight, and nothing is written.
        """
        pending = [edit for edit in edits if edit.status is EditStatus.PENDING]
        if not self.sequential:
            for edit in pending:
                try:
                    edit.written = self.weight.propose(edit.name, edit.assertion(self.preset))
                except ValueError as error:  # exploding or not finite
                    edit.decide(EditStatus.REJECTED, str(error))
            return
        for edit in [edit for edit in pending if edit.name in self.weight.names]:
            pending.remove(edit)
            edit.decide(EditStatus.REJECTED, f"edit {edit.name} is in the weight already; give it another case_id")
        while pending:
            assertion = Assertion.joint([edit.assertion(self.preset) for edit in pending])
            try:
                written = self.weight.write([edit.name for edit in pending], assertion)
            except DisablingEditError as error:
                pending.pop(error.row).decide(EditStatus.REJECTED, str(error))
            except ValueError as error:  # not finite, and no saying whose fault it is
                while pending:
                    pending.pop().decide(EditStatus.REJECTED, str(error))
            else:
                for edit in pending:
                    edit.written = written.part(edit.name)
                return

    def withdraw(self, edits: Sequence[Edit], batch: Sequence[Edit]) -> None:
        """Take edits of a batch, which were just decided against, back; the others of the batch are written anew."""
        if self.sequential and edits:
            self.weight.revert()
            self.write(batch)

    def measure_targets(self, edits: Sequence[Edit], *, written: bool) -> list[TargetMeasure]:
        """The targets' probabilities after the bare prompts.

        Args:
            edits: Which; all could be encoded.
            written: Whether each is measured with its own write, or with the weights as they are.
        """
        rows = [edit.encoded.rows[0] for edit in edits if edit.encoded is not None]
        assert len(rows) == len(edits)
        return measure_targets(self.language_model, rows, self._changes(edits) if written else None)

    def measure_probes(self, edits: Sequence[Edit]) -> list[ProbeScores]:
        """The probe scores of edits, each with its own write."""
        return self.probe([edit.request for edit in edits], self._changes(edits))

    def probe(self, requests: Sequence[EditRequest], changes: Changes | None = None) -> list[ProbeScores]:
        """The probe scores of requests under the weights as they are, or under a change of them for each."""
        return self.mark(requests, probe_scores(self.language_model, requests, changes))

    def mark(self, requests: Sequence[EditRequest], measured: Sequence[ProbeScores]) -> list[ProbeScores]:
        """Scores that know which of their prompts are about subjects that other requests edit."""
        return [
            replace(scores, touched=self.touched.get(str(request.case_id), ()))
            for request, scores in zip(requests, measured, strict=True)
        ]

    def in_force(self, edit: Edit) -> bool:
        """Whether the edit's own write is in what is measured now."""
        return edit.status is EditStatus.PENDING and edit.written is not None

    def _changes(self, edits: Sequence[Edit]) -> Changes | None:
        if self.sequential:  # it is in the weights
            return None
        updates = [edit.written.update if self.in_force(edit) and edit.written else None for edit in edits]
        return Changes(self.weight.site.projection, updates)


def edits_of(outputs: Any) -> list[Edit]:
    """The edits in a training step's result."""
    edits: list[Edit] = outputs["edits"]
    return edits


def session_of(module: object) -> EditSession:
    """The session of a module that edits.

    Raises:
        TypeError: If the module is not one that edits.
    """
    session = getattr(module, "session", None)
    if not isinstance(session, EditSession):
        raise TypeError(f"this callback works with RomeModule during fit, not with {type(module).__name__}")
    return session
