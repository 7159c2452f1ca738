"""One edit on its way through a run, and what the edits of a run share.

An :class:`Edit` is the batch that callbacks see before the optimisation and the result they see after it; an
:class:`EditSession` is what they may look at besides. Neither knows Lightning.
"""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Literal

from torch import Tensor

from rome_pl.encoding import EncodedEdit, EncodedRow, FactToken
from rome_pl.language_model import LanguageModel
from rome_pl.ledger import Ledger
from rome_pl.metrics.probes import ProbeScores, TargetMeasure, measure_target
from rome_pl.objective import ValueObjective
from rome_pl.rank_one import Assertion, Preset
from rome_pl.requests import EditRequest
from rome_pl.second_moment import SecondMoment
from rome_pl.weights import EditedWeight, Written

__all__ = ["Edit", "EditError", "EditSession", "EditStatus", "Step", "session_of"]


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


@dataclass(frozen=True)
class Step:
    """The losses of one optimisation step."""

    loss: float
    nll: float
    kl: float
    decay: float
    probability: float


@dataclass
class Edit:
    """One request on its way.

    Args:
        index: Position in the run, from 0.
        request: What is asked for.
        encoded: Its rows as tokens; ``None`` if they could not be made.
        objective: Loss of its value offset, with the prefix pass behind it; freed once the edit is decided.
        status: Where it stands.
        failed: Whether it could not be tried, which ``on_error`` decides about.
        reason: Why it was rejected, skipped or rolled back.
        notes: Remarks that changed nothing.
        key_mean: Mean key over contexts, ``[d_key]``.
        key_bare: Key of the bare prompt, ``[d_key]``.
        delta: The optimised value offset, ``[d_value]``.
        value: The value to assert, ``[d_value]``.
        steps: Losses, one per evaluation.
        written: The write, once done.
        before: Probability of the target before the edit: geometric mean over its tokens, on the bare prompt.
        after: The same after the write.
        scores: Probe measurements by moment (``base``, ``immediate``, ``final``).
        seconds: Wall time by stage.
    """

    index: int
    request: EditRequest
    encoded: EncodedEdit | None = None
    objective: ValueObjective | None = None
    status: EditStatus = EditStatus.PENDING
    failed: bool = False
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    key_mean: Tensor | None = None
    key_bare: Tensor | None = None
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
        request = {name: value for name, value in asdict(self.request).items() if name not in ("source", "case_id")}
        written = self.written
        return {
            "index": self.index,
            "case_id": self.request.case_id,
            "status": str(self.status),
            "reason": self.reason,
            "notes": self.notes,
            "request": request,
            "probability": {"before": self.before, "after": self.after},
            "num_steps": len(self.steps),
            "loss": self.steps[-1].loss if self.steps else None,
            "value_norm": float(self.delta.norm()) if self.delta is not None else None,
            "update_norm": written.update.norm if written else None,
            "realised": written.realised if written else None,
        }

    @property
    def name(self) -> str:
        """Identifier in the edited weight and the ledger."""
        return str(self.request.case_id)

    def decide(self, status: EditStatus, reason: str) -> None:
        """Record a verdict other than success."""
        self.status, self.reason = status, reason

    def fail(self, reason: str) -> None:
        """Skip the edit because it could not be tried."""
        self.failed = True
        self.decide(EditStatus.SKIPPED, reason)

    def assertion(self, preset: Preset) -> Assertion:
        """The write this edit asks for: which key shapes it and at which key its value holds is the preset's choice."""
        assert self.value is not None
        return Assertion(
            shape=self._key(preset.shape).double().unsqueeze(0),
            at=self._key(preset.at).double().unsqueeze(0),
            value=self.value.double().unsqueeze(0),
        )

    def _key(self, which: Literal["mean", "bare"]) -> Tensor:
        key = self.key_mean if which == "mean" else self.key_bare
        assert key is not None
        return key


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
        requests: Every valid request of the run, in order.
        num_refused: Number of requests that could not be encoded.
        edits: The edits begun so far.
        base_scores: Every valid request's probes before the stream, by name of the edit.
        final_scores: The same after a sequential stream.
        perplexity: Held-out perplexity, by moment (``base``, ``final``).
        state_checks: What the checks of the model's state found.
        ledger: Where edits are recorded, if anywhere.
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
    perplexity: dict[str, float] = field(default_factory=dict)
    state_checks: list[dict[str, object]] = field(default_factory=list)
    ledger: Ledger | None = None

    def measure_target(self, row: EncodedRow) -> TargetMeasure:
        """The target's probability after a prompt, under the current weights."""
        return measure_target(self.language_model, row)


def session_of(module: object) -> EditSession:
    """The session of a module that edits.

    Raises:
        TypeError: If the module is not one that edits.
    """
    session = getattr(module, "session", None)
    if not isinstance(session, EditSession):
        raise TypeError(f"this callback works with RomeModule during fit, not with {type(module).__name__}")
    return session
