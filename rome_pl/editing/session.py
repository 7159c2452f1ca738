"""The run of a stream of edits, as callbacks see it. It does not know Lightning."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rome_pl.editing.batch_writer import BatchWriter
from rome_pl.editing.edit import Edit
from rome_pl.editing.outcome import Requirement
from rome_pl.editing.run_setup import RunSetup
from rome_pl.encoding.text_encoder import FactToken
from rome_pl.ledger.edit_log import Ledger
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics.probes import ProbeScores
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest
from rome_pl.utils.flops import FirstBatchFlops
from rome_pl.write.edited_layers import EditedLayers
from rome_pl.write.presets import Preset

__all__ = ["EditSession", "Measurements", "Retention", "session_of"]


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
class Measurements:
    """What callbacks have measured of a run.

    Args:
        base_scores: Every valid request's probes before the stream, by name of the edit.
        final_scores: The same after a sequential stream.
        perplexity: Held-out perplexity, by stage (``base``, ``final``).
        divergence: ``KL(unedited ‖ final)`` of the next token on the same text, in nats. ``None``: single mode.
        retention: What the edits so far are worth at points of a sequential stream; see :class:`Retention`.
        continuations: How the model continues prompts, by stage and name of the edit; see
            :mod:`rome_pl.reports.continuations`.
        weight_changes: Norm of the weight's change, relative to the original, by number of edits begun.
        state_checks: What the checks of the model's state found.
        damage: What edits cost other facts and ordinary text, each time it was looked at.
    """

    base_scores: dict[str, ProbeScores] = field(default_factory=dict)
    final_scores: dict[str, ProbeScores] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    divergence: float | None = None
    retention: list[Retention] = field(default_factory=list)
    continuations: dict[str, dict[str, str]] = field(default_factory=dict)
    weight_changes: dict[int, float] = field(default_factory=dict)
    state_checks: list[dict[str, object]] = field(default_factory=list)
    damage: list[dict[str, object]] = field(default_factory=list)


@dataclass
class EditSession:
    """A run of edits.

    Args:
        setup: What its edits share.
        writer: Writes them.
        earlier: What applied edits of earlier fits asked for, by name.
        requests: Every valid request of the run, in order; on several devices every rank has them all.
        num_refused: Number of requests that could not be encoded.
        touched: By name, which neighbourhood prompts are about a subject that another one edits, where edits add up.
        edits: The edits begun so far, those of other devices once their batch is done.
        ledger: Where edits are recorded, if anywhere.
        requirement: What an edit has to reach to have taken; :class:`rome_pl.callbacks.Verification` sets it.
        measured: What callbacks have measured.
        flops: Counts the operations of an edit.
    """

    setup: RunSetup
    writer: BatchWriter
    earlier: dict[str, EditRequest] = field(default_factory=dict)
    requests: tuple[EditRequest, ...] = ()
    num_refused: int = 0
    touched: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    ledger: Ledger | None = None
    requirement: Requirement = field(default_factory=Requirement)
    measured: Measurements = field(default_factory=Measurements)
    flops: FirstBatchFlops = field(default_factory=FirstBatchFlops)

    @property
    def language_model(self) -> LanguageModel:
        """The model being edited."""
        return self.setup.language_model

    @property
    def layers(self) -> EditedLayers:
        """The rewrite layers' weights with their edits."""
        return self.setup.layers

    @property
    def preset(self) -> Preset:
        """The variant of the closed form."""
        return self.setup.preset

    @property
    def sequential(self) -> bool:
        """Whether edits accumulate."""
        return self.setup.sequential

    @property
    def fact_token(self) -> FactToken:
        """Which token is looked up."""
        return self.setup.fact_token

    @property
    def contexts(self) -> tuple[str, ...]:
        """Texts put before prompts, the empty one first."""
        return self.setup.contexts

    @contextmanager
    def unedited(self) -> Iterator[LanguageModel]:
        """The model without its edits inside; with them after, whatever happens."""
        with self.layers.unedited():
            yield self.language_model

    def applied(self) -> dict[str, EditRequest]:
        """What applied edits of earlier fits and of this one asked for, by name."""
        return self.earlier | {edit.name: edit.request for edit in self.edits if edit.status is EditStatus.APPLIED}

    def in_the_weights(self) -> list[EditRequest]:
        """What the edits in the weights asked for, in order; empty in single mode."""
        applied = self.applied()
        return [applied[name] for name in self.layers.names if name in applied]


def session_of(module: object) -> EditSession:
    """The session of a module that edits.

    Raises:
        TypeError: If the module is not one that edits.
    """
    session = getattr(module, "session", None)
    if not isinstance(session, EditSession):
        raise TypeError(f"this callback works with RomeModule during fit, not with {type(module).__name__}")
    return session
