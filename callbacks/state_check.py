"""Watches the model between the edits of a stream."""

import logging
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.editing.edit import Edit, EditBatch, edits_of
from rome_pl.editing.recovery import recover, roll_back
from rome_pl.editing.retention import note_after, retained_share
from rome_pl.editing.session import EditSession
from rome_pl.errors import OptionError
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics import held_out_text
from rome_pl.metrics.model_health import Bounds, ModelWatch, TrainedWeights, Weights, language_model_of
from rome_pl.model.language_model import LanguageModel
from rome_pl.utils.distributed import check_strategy

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


MOST_DROPPED = 0.2
"""A stream of which a larger share had to be dropped stops: the preset does not suit the model."""

FEW = 10
"""Of fewer edits than these a share means nothing: they count as so many."""


class StateCheck(Callback):
    """Every n edits of a sequential stream: are the weights finite, is their change small, does the model still talk?

    It also watches the training of any LightningModule that has a causal language model as ``model`` and its fast
    tokenizer as ``tokenizer``: then an interval is so many batches, the original weights are those that the fit begins
    with (a copy of them is kept), scalars ``state/…`` go to every logger, and ``on_failure`` is ``warn`` or ``stop``.
    ``checks`` holds what was found.

    Args:
        every_n_edits: Interval.
        largest_change: Largest Frobenius norm of the weight's change, relative to the original (SmolLM2 reaches 0.6
            after 50 edits that do it no harm).
        least_canary_agreement: Least share of canaries whose likeliest next token is the unedited model's.
        canaries: Prompts of your own, in the model's language. ``None`` (default): the shipped English ones.
        largest_perplexity_ratio: Largest perplexity of held-out text, relative to the unedited model's. ``None``
            (default): perplexity is not measured, which is cheaper.
        largest_divergence: Largest divergence of the next token from the unedited model's on the same text, in nats.
            ``None`` (default): not measured, which is cheaper.
        largest_spectral_change: Largest singular value of the weight's change, relative to the original's. ``None``
            (default): not measured.
        least_retained: Least share of earlier edits that are retained: whose target still has at least half the
            probability, after the bare prompt, that it had right after the edit was first written. An edit whose fact a
            later one of the stream states anew does not count. ``None`` (default): not measured.
        retention_sample: Most edits to measure for that at a check: a seeded sample, which only grows or gives way to
            later edits.
        perplexity_text: UTF-8 text for perplexity and divergence. ``None`` (default): the one shipped.
        on_failure: ``warn``; ``rollback`` (undo the edits since the last good check and go on); ``recover`` (undo them,
            and write them again one by one, without those after which the check fails); ``shrink`` (the same, but such
            an edit is tried at half its strength first); or ``stop`` (undo them and end the stream). A stream of which
            more than a fifth had to be dropped by ``recover`` or ``shrink`` ends too.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        every_n_edits: int = 10,
        largest_change: float = 5.0,
        least_canary_agreement: float = 0.5,
        canaries: list[str] | None = None,
        largest_perplexity_ratio: float | None = None,
        largest_divergence: float | None = None,
        largest_spectral_change: float | None = None,
        least_retained: float | None = None,
        retention_sample: int = 20,
        perplexity_text: str | None = None,
        on_failure: Literal["warn", "rollback", "recover", "shrink", "stop"] = "warn",
    ) -> None:
        if every_n_edits < 1:
            raise ValueError(f"every_n_edits: expected a number from 1 on, got {every_n_edits}")
        if largest_spectral_change is not None and not largest_spectral_change > 0:
            raise ValueError(f"largest_spectral_change: expected a positive number, got {largest_spectral_change}")
        if least_retained is not None and not 0 <= least_retained <= 1:
            raise ValueError(f"least_retained: expected a share in [0, 1], got {least_retained}")
        if retention_sample < 1:
            raise ValueError(f"retention_sample: expected a number from 1 on, got {retention_sample}")
        self.bounds = Bounds(largest_change, least_canary_agreement, largest_perplexity_ratio, largest_divergence)
        self.every_n_edits, self.on_failure = every_n_edits, on_failure
        self.largest_spectral_change, self.perplexity_text = largest_spectral_change, perplexity_text
        self.least_retained, self.retention_sample = least_retained, retention_sample
        self.canaries: Sequence[str] = canaries or CANARIES
        self.checks: list[dict[str, Any]] = []
        self._watch: ModelWatch | None = None
        self._batches = 0
        self._since_good: list[Edit] = []
        self._dropped = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.bounds.need_text:
            held_out_text(self.perplexity_text)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch, self._batches, self.checks = None, 0, []

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = getattr(pl_module, "session", None)
        if not isinstance(session, EditSession):
            if self._watch is None:  # in a later epoch the first one's weights are the original ones still
                self._check_options(trainer)
                language_model = language_model_of(pl_module)
                self._watch = self._begin(language_model, TrainedWeights(language_model.model))
            return
        self._since_good, self._dropped = [], 0
        self.checks = session.measured.state_checks
        if session.sequential:
            self._watch = self._begin(session.language_model, session.layers)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch = None  # it may hold a copy of the weights

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        session = getattr(pl_module, "session", None)
        if not isinstance(session, EditSession):
            self._check_training(trainer)
            return
        if not session.sequential:
            return
        edits = edits_of(outputs)
        applied = [edit for edit in edits if edit.status is EditStatus.APPLIED]
        self._since_good += applied
        if self.least_retained is not None:
            note_after(session, applied)
        done = len(session.edits)
        due = done // self.every_n_edits > (done - len(edits)) // self.every_n_edits
        if not due and not trainer.is_last_batch:
            return
        found = self._look(session)
        session.measured.state_checks.append({"edits": done, **found})
        if not found["failures"]:
            self._since_good = []
            return
        finding = f"after {done} edits: " + "; ".join(found["failures"])
        if self.on_failure == "warn":
            log.warning("The model's state is bad %s", finding)
            return
        since, self._since_good = self._since_good, []
        if self.on_failure in ("recover", "shrink"):
            log.warning("The model's state is bad %s. Writing the last %d edits again one by one", finding, len(since))
            weaken = self.on_failure == "shrink"
            self._dropped += recover(session, since, finding, lambda: not self._look(session)["failures"], weaken)
            self._end_if_hopeless(trainer, session)
            return
        log.warning("Rolling back %d edits: the model's state is bad %s", len(since), finding)
        roll_back(session, since, finding)
        trainer.should_stop = trainer.should_stop or self.on_failure == "stop"

    def _begin(self, language_model: LanguageModel, weights: Weights) -> ModelWatch:
        text = held_out_text(self.perplexity_text) if self.bounds.need_text else ""
        return ModelWatch(language_model, weights, self.bounds, self.canaries, text)

    def _look(self, session: EditSession) -> dict[str, Any]:
        """What there is to say about the state of a model that is edited, and what of it is bad."""
        assert self._watch is not None
        found = self._watch.look()
        if self.largest_spectral_change is not None:
            found["spectral_change"] = spectral = session.layers.spectral_change
            if not spectral <= self.largest_spectral_change:
                found["failures"].append(
                    f"the change's largest singular value is {spectral:.2f} of the weight's "
                    f"(largest_spectral_change: {self.largest_spectral_change})"
                )
        if self.least_retained is not None:
            found["retained"] = retained = retained_share(session, self.retention_sample)
            if retained is not None and retained < self.least_retained:
                found["failures"].append(
                    f"{retained:.0%} of earlier edits are retained (least_retained: {self.least_retained})"
                )
        return found

    def _check_options(self, trainer: Trainer) -> None:
        """Refuse what only a module that edits can do."""
        check_strategy(trainer.strategy)
        if self.on_failure not in ("warn", "stop"):
            raise OptionError(
                f"on_failure: {self.on_failure} takes edits back, and this module makes none; use warn or stop"
            )
        if self.largest_spectral_change is not None:
            raise OptionError("largest_spectral_change is of rewrite layers, and this module has none; leave it out")
        if self.least_retained is not None:
            raise OptionError("least_retained is of edits, and this module makes none; leave it out")

    def _check_training(self, trainer: Trainer) -> None:
        """Look at a model that somebody else's module trains, if it is time."""
        self._batches += 1
        if self._batches % self.every_n_edits and not trainer.is_last_batch:
            return
        assert self._watch is not None
        found = self._watch.look()
        self.checks.append({"batches": self._batches, **found})
        scalars = {f"state/{name}": float(value) for name, value in found.items() if name != "failures"}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=self._batches)
        if found["failures"]:
            log.warning("The model's state is bad after %d batches: %s", self._batches, "; ".join(found["failures"]))
            trainer.should_stop = trainer.should_stop or self.on_failure == "stop"

    def _end_if_hopeless(self, trainer: Trainer, session: EditSession) -> None:
        check = {"edits": len(session.edits), "recovered": True, **self._look(session)}
        session.measured.state_checks.append(check)
        done = len(session.edits)
        if self._dropped > MOST_DROPPED * max(done, FEW):
            verdict = (
                f"{self._dropped} of {done} edits had to be dropped to keep the model healthy: the preset does not "
                "suit this model; try another preset or layer, or fewer edits"
            )
        elif check["failures"]:
            verdict = f"the model's state stays bad without them: {'; '.join(check['failures'])}"
        else:
            return
        check["verdict"] = verdict
        log.error("The stream ends: %s", verdict)
        trainer.should_stop = True
