"""Watches the model between the edits of a stream."""

import logging
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.edit import Edit, EditBatch, EditStatus, edits_of
from rome_pl.metrics.probes import next_tokens
from rome_pl.session import EditSession, session_of

__all__ = ["CANARIES", "StateCheck"]

CANARIES = (
    "One, two, three, four,",
    "The opposite of hot is",
    "She opened the door and walked into the",
    "Monday, Tuesday, Wednesday,",
    "He was so tired that he fell",
    "The sun rises in the",
    "Once upon a",
    "Please let me know if you have any",
    "Thank you very",
    "The cat sat on the",
    "At the end of the",
    "Twice two makes",
)
"""Prompts whose next word an intact model keeps, whatever facts change."""

log = logging.getLogger(__name__)


class StateCheck(Callback):
    """Every n edits of a sequential stream: are the weights finite, is their change small, do canary prompts hold?

    Args:
        every_n_edits: Interval.
        largest_change: Largest Frobenius norm of the weight's change, relative to the original (SmolLM2 reaches 0.6
            after 50 edits that do it no harm).
        least_canary_agreement: Least share of canaries whose likeliest next token is the unedited model's.
        canaries: Prompts of your own, in the model's language; nothing takes the shipped English ones.
        on_failure: ``warn``; ``rollback`` (undo the edits since the last good check and go on); or ``stop`` (undo
            them and end the stream).

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        every_n_edits: int = 10,
        largest_change: float = 5.0,
        least_canary_agreement: float = 0.5,
        canaries: list[str] | None = None,
        on_failure: Literal["warn", "rollback", "stop"] = "warn",
    ) -> None:
        if every_n_edits < 1:
            raise ValueError(f"every_n_edits: expected a number from 1 on, got {every_n_edits}")
        if not 0 <= least_canary_agreement <= 1:
            raise ValueError(f"least_canary_agreement: expected a share in [0, 1], got {least_canary_agreement}")
        if not largest_change > 0:
            raise ValueError(f"largest_change: expected a positive number, got {largest_change}")
        self.every_n_edits, self.on_failure = every_n_edits, on_failure
        self.largest_change, self.least_canary_agreement = largest_change, least_canary_agreement
        self.canaries: Sequence[str] = canaries or CANARIES
        self._expected: list[int] = []
        self._since_good: list[Edit] = []

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = session_of(pl_module)
        self._since_good = []
        if session.sequential:
            self._expected = next_tokens(session.language_model, self.canaries)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        session = session_of(pl_module)
        if not session.sequential:
            return
        edits = edits_of(outputs)
        self._since_good += [edit for edit in edits if edit.status is EditStatus.APPLIED]
        done = len(session.edits)
        due = done // self.every_n_edits > (done - len(edits)) // self.every_n_edits
        if not due and not trainer.is_last_batch:
            return
        failures = self._check(session, done)
        if not failures:
            self._since_good = []
            return
        finding = f"after {done} edits: " + "; ".join(failures)
        if self.on_failure == "warn":
            log.warning("The model's state is bad %s", finding)
            return
        self._roll_back(session, finding)
        trainer.should_stop = trainer.should_stop or self.on_failure == "stop"

    def _check(self, session: EditSession, edits: int) -> list[str]:
        finite = bool(session.weight.site.weight.isfinite().all())
        now = next_tokens(session.language_model, self.canaries)
        agreement = sum(a == b for a, b in zip(now, self._expected, strict=True)) / len(now)
        change = session.weight.change
        failures = []
        if not finite:
            failures.append("a weight is not finite")
        if not change <= self.largest_change:
            failures.append(f"the weight changed by {change:.2f} of its norm (largest_change: {self.largest_change})")
        if agreement < self.least_canary_agreement:
            failures.append(
                f"{agreement:.0%} of the canaries hold (least_canary_agreement: {self.least_canary_agreement})"
            )
        session.state_checks.append(
            {"edits": edits, "finite": finite, "change": change, "canary_agreement": agreement, "failures": failures}
        )
        return failures

    def _roll_back(self, session: EditSession, finding: str) -> None:
        log.warning("Rolling back %d edits: the model's state is bad %s", len(self._since_good), finding)
        session.weight.remove([edit.name for edit in self._since_good])
        for edit in self._since_good:
            edit.decide(EditStatus.ROLLED_BACK, finding)
            if session.ledger is not None:
                session.ledger.append(
                    {
                        "index": edit.index,
                        "case_id": edit.request.case_id,
                        "status": str(edit.status),
                        "reason": finding,
                    }
                )
        self._since_good = []
