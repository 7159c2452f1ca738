"""What the edits of a run share, and what callbacks may look at besides them. It does not know Lightning."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from rome_pl.editing.assertions import PART, Asking
from rome_pl.editing.edit import Edit
from rome_pl.editing.outcome import Requirement
from rome_pl.encoding.encoded_rows import EncodedEdit
from rome_pl.encoding.text_encoder import FactToken
from rome_pl.ledger.edit_log import Ledger
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics.probes import Changes, ProbeScores, TargetMeasure, measure_targets, probe_scores
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest
from rome_pl.utils.flops import count_flops
from rome_pl.write.closed_form import Assertion, DisablingEditError, NotFiniteError, Update
from rome_pl.write.edited_layers import Ask, EditedLayers, EditWrite
from rome_pl.write.presets import Preset

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
        layers: The rewrite layers' weights with their edits.
        preset: The variant of the closed form.
        sequential: Whether edits accumulate.
        fact_token: Which token is looked up.
        contexts: Texts put before prompts, the empty one first.
        requests: Every valid request of the run, in order; on several devices every rank has them all.
        num_refused: Number of requests that could not be encoded.
        edits: The edits begun so far, those of other devices once their batch is done.
        base_scores: Every valid request's probes before the stream, by name of the edit.
        final_scores: The same after a sequential stream.
        touched: By name, which neighbourhood prompts are about a subject that another one edits, where edits add up.
        perplexity: Held-out perplexity, by stage (``base``, ``final``).
        divergence: ``KL(unedited ‖ final)`` of the next token on the same text, in nats; nothing in single mode.
        retention: What the edits so far are worth at points of a sequential stream; see :class:`Retention`.
        continuations: How the model goes on with prompts, by stage and name of the edit; see
            :mod:`rome_pl.reports.continuations`.
        changes: Norm of the weight's change, relative to the original, by number of edits begun; the reports note it.
        state_checks: What the checks of the model's state found.
        ledger: Where edits are recorded, if anywhere.
        largest_update: Largest Frobenius norm of an edit's change of a layer, relative to the original weight.
        anchor_norm: Norm of every asserted value, see :meth:`rome_pl.write.edited_layers.EditedLayers.anchored`.
        least_realised: Share of the wanted change at the key that has to survive the rounding to the model's dtype.
        requirement: What an edit has to reach to have taken; :class:`rome_pl.callbacks.Verification` sets it.
        search_again: Searches the value of an edit again for a reason, if there is a retry left; says whether.
        earlier: What applied edits of earlier fits asked for, by name.
        flops_per_edit: Floating-point operations of the first batch's prefix pass and optimisation, by edit.
        counted: Those of the batch that is being counted.
    """

    language_model: LanguageModel
    layers: EditedLayers
    preset: Preset
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
    largest_update: float | None = None
    anchor_norm: float | None = None
    least_realised: float = 0.0
    requirement: Requirement = field(default_factory=Requirement)
    search_again: Callable[[Edit, str], bool] = lambda edit, reason: False
    earlier: dict[str, EditRequest] = field(default_factory=dict)
    flops_per_edit: float | None = None
    counted: float = 0.0

    @contextmanager
    def counting(self, skip: bool) -> Iterator[None]:
        """Count operations, on the first batch only: counting slows a step.

        Args:
            skip: Whether steps are compiled, which counting cannot look into.
        """
        # It also takes other kernels, and so other last bits: in a run that is gone on with, the first was counted.
        known = self.flops_per_edit is not None or skip
        if known or any(edit.recorded is not None and edit.steps for edit in self.edits):
            yield
            return
        with count_flops() as counted:
            yield
        self.counted += counted.total

    def anew(self, last: "EditSession | None") -> "EditSession":
        """What was prepared, and the weights with their edits, for another fit; the rest is each fit's own.

        Args:
            last: The session of the fit before, if there was one.
        """
        return EditSession(
            language_model=self.language_model,
            layers=self.layers,
            preset=self.preset,
            sequential=self.sequential,
            fact_token=self.fact_token,
            contexts=self.contexts,
            largest_update=self.largest_update,
            anchor_norm=self.anchor_norm,
            earlier=last.applied() if last is not None else {},
            flops_per_edit=last.flops_per_edit if last is not None else None,
        )

    def write(self, edits: Sequence[Edit]) -> None:
        """Write the pending edits of a batch, jointly; those that cannot be written are refused.

        In single mode each is only solved for, on the original weights, and nothing is written.
        """
        if not self.sequential:
            for edit in edits:
                while edit.status is EditStatus.PENDING and edit.written is None:
                    self._propose(edit)
            return
        for edit in edits:
            if edit.status is EditStatus.PENDING and edit.name in self.layers.names:
                edit.decide(EditStatus.REJECTED, f"edit {edit.name} is in the weight already; give it another case_id")
        while pending := [edit for edit in edits if edit.status is EditStatus.PENDING]:
            try:
                written = self.layers.write([edit.name for edit in pending], self._ask(pending))
            except DisablingEditError as error:
                self._refuse(_culprit(pending, error.row), str(error))
            except NotFiniteError as error:  # no saying whose fault it is
                for edit in [edit for edit in pending if edit.written is None] or pending:
                    self._refuse(edit, str(error))
            else:
                lost = [
                    edit for edit, share in zip(pending, written.realised, strict=True) if share < self.least_realised
                ]
                if not lost:
                    for edit in pending:
                        edit.written = written.part(edit.name)
                        edit.spread = None  # frees the prefix pass
                    return
                self.layers.revert()
                for edit in lost:
                    edit.written = written.part(edit.name)
                    self._refuse(edit, self._loss(edit.written))

    def _propose(self, edit: Edit) -> None:
        try:
            edit.written = self.layers.propose(edit.name, self._ask([edit]))
        except (DisablingEditError, NotFiniteError) as error:
            self._refuse(edit, str(error))
            return
        edit.spread = None
        if edit.written.realised[0] < self.least_realised:
            self._refuse(edit, self._loss(edit.written))

    def _loss(self, written: EditWrite) -> str:
        dtype = self.layers.last.site.weight.dtype
        return f"only {written.realised[0]:.0%} of the change survives rounding to {dtype}; load the model in float32"

    def _refuse(self, edit: Edit, reason: str, comfort: str = "") -> None:
        """Search for another value, or reject the edit."""
        edit.notes = [note for note in edit.notes if not note.startswith(PART)]
        if not self.search_again(edit, reason):
            edit.decide(EditStatus.REJECTED, reason + comfort)

    def write_again(self, edit: Edit, strength: float = 1.0) -> EditWrite:
        """Write an edit that was taken back; what it asserts is what it asserted then. It stays pending.

        Args:
            edit: The edit.
            strength: How much of the change that takes is made.

        Raises:
            ValueError: If it cannot be written.
        """
        ask = self._ask([edit])
        if strength == 1:
            return self.layers.write([edit.name], ask)

        def weaker(layer: int, below: Mapping[int, Update]) -> tuple[Sequence[str], Assertion] | None:
            asked = ask(layer, below)
            return asked and (asked[0], self.layers.at(layer).weaker(asked[1], strength))

        return self.layers.write([edit.name], weaker)

    @contextmanager
    def unedited(self) -> Iterator[LanguageModel]:
        """The model without its edits inside; with them after, whatever happens."""
        with self.layers.unedited():
            yield self.language_model

    def _ask(self, edits: Sequence[Edit]) -> Ask:
        """What edits assert at each layer; of those written before, the same as then."""
        asking = Asking(self.layers, self.preset, not self.sequential, self.anchor_norm, self.largest_update)
        return asking.ask(edits)

    def in_the_weights(self) -> list[EditRequest]:
        """What the edits in the weights asked for, in order; nothing in single mode."""
        applied = self.applied()
        return [applied[name] for name in self.layers.names if name in applied]

    def applied(self) -> dict[str, EditRequest]:
        """What applied edits of earlier fits and of this one asked for, by name."""
        return self.earlier | {edit.name: edit.request for edit in self.edits if edit.status is EditStatus.APPLIED}

    def withdraw(self, objections: Mapping[str, str], batch: Sequence[Edit]) -> None:
        """Take back edits of a batch that were just written; the others of the batch are written anew.

        Those that were taken back are rejected, or pending with another value if there was a retry left.

        Args:
            objections: Why, by name of the edit.
            batch: The batch.
        """
        if not objections:
            return
        if self.sequential:
            self.layers.revert()
        for edit in batch:
            if edit.name in objections:
                self._refuse(edit, objections[edit.name], "; the weights are as before this edit")
        self.write(batch)

    def measure_targets(self, edits: Sequence[Edit], *, written: bool) -> list[TargetMeasure]:
        """The targets' probabilities after the bare prompts.

        Args:
            edits: Which; all can be encoded.
            written: Whether each is measured with its own write, or with the weights as they are.
        """
        rows = [(edit.encoded or self._bare(edit)).rows[0] for edit in edits]
        return measure_targets(self.language_model, rows, self._changes(edits) if written else None)

    def objection(self, edit: Edit, after: TargetMeasure) -> str | None:
        """Why an edit that was just written has not taken, if so.

        Args:
            edit: The edit.
            after: Its target with the write.
        """
        decode = self.language_model.tokenizer.decode
        return self.requirement.objection(edit.before, after, edit.offset_norm > 0, decode)

    def _bare(self, edit: Edit) -> EncodedEdit:
        """The bare prompt of an edit that was taken over from an earlier run, and not encoded for that."""
        return self.language_model.encoder.edit(edit.request, fact_token=self.fact_token)

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
        numbers, updates = self.layers.numbers, list[Sequence[Update | None] | None]()
        for edit in edits:
            layers = edit.written.layers if self.in_force(edit) and edit.written else {}
            changed = [layers[number].update if number in layers else None for number in numbers]
            updates.append(changed if layers else None)
        return Changes([weight.site.projection for weight in self.layers.weights], updates)


def _culprit(edits: Sequence[Edit], row: int) -> Edit:
    """Whom to refuse where an edit's key depends on those before it in a joint solve.

    Edits that were written before stood together then: what does not stand now is one that was searched since.
    """
    blamed = edits[row]
    since = [edit for edit in edits[:row] if edit.written is None and set(edit.layers) & set(blamed.layers)]
    return since[-1] if since and blamed.written is not None else blamed


def session_of(module: object) -> EditSession:
    """The session of a module that edits.

    Raises:
        TypeError: If the module is not one that edits.
    """
    session = getattr(module, "session", None)
    if not isinstance(session, EditSession):
        raise TypeError(f"this callback works with RomeModule during fit, not with {type(module).__name__}")
    return session
