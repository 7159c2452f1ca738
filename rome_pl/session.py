"""What the edits of a run share, and what callbacks may look at besides them. It does not know Lightning."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rome_pl.edit import Edit, EditStatus
from rome_pl.encoding import FactToken
from rome_pl.language_model import LanguageModel
from rome_pl.ledger import Ledger
from rome_pl.metrics.probes import Changes, ProbeScores, TargetMeasure, measure_targets, probe_scores
from rome_pl.rank_one import Assertion, DisablingEditError, Preset, balance
from rome_pl.requests import EditRequest
from rome_pl.second_moment import SecondMoment
from rome_pl.weights import EditedWeight

__all__ = ["EditSession", "Retention", "session_of"]


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
        edit.key_bare, edit.key_mean, edit.output_mean = keys[0].clone(), keys.mean(0), outputs.mean(0)
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


def session_of(module: object) -> EditSession:
    """The session of a module that edits.

    Raises:
        TypeError: If the module is not one that edits.
    """
    session = getattr(module, "session", None)
    if not isinstance(session, EditSession):
        raise TypeError(f"this callback works with RomeModule during fit, not with {type(module).__name__}")
    return session
