"""Watches the model between the edits of a stream."""

import logging
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.editing.edit import Edit, EditBatch, edits_of
from rome_pl.editing.recovery import recover, roll_back
from rome_pl.editing.retention import note_after
from rome_pl.editing.session import EditSession
from rome_pl.editing.session_watch import EditBounds, SessionWatch
from rome_pl.errors import OptionError
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics import held_out_text
from rome_pl.metrics.model_health import CANARIES, Bounds, ModelWatch, TrainedWeights, Weights, language_model_of
from rome_pl.model.language_model import LanguageModel
from rome_pl.utils.distributed import check_strategy

__all__ = ["StateCheck"]

log = logging.getLogger(__name__)


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
        self.bounds = Bounds(largest_change, least_canary_agreement, largest_perplexity_ratio, largest_divergence)
        self.edit_bounds = EditBounds(largest_spectral_change, least_retained, retention_sample)
        self.every_n_edits, self.perplexity_text, self.on_failure = every_n_edits, perplexity_text, on_failure
        self.canaries: Sequence[str] = canaries or CANARIES
        self.checks: list[dict[str, Any]] = []
        self._watch: SessionWatch | None = None
        self._training: _TrainingWatch | None = None
        self._since_good: list[Edit] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.bounds.need_text:
            held_out_text(self.perplexity_text)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch, self._training, self.checks = None, None, []

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = getattr(pl_module, "session", None)
        if isinstance(session, EditSession):
            self._since_good, self.checks = [], session.measured.state_checks
            if session.sequential:
                watch = self._begin(session.language_model, session.layers)
                self._watch = SessionWatch(session, watch, self.edit_bounds)
        elif self._training is None:  # in a later epoch the first one's weights are the original ones still
            _check_training_options(trainer, self.on_failure, self.edit_bounds)
            language_model = language_model_of(pl_module)
            watch = self._begin(language_model, TrainedWeights(language_model.model))
            self._training = _TrainingWatch(watch, self.every_n_edits, self.on_failure == "stop")
            self.checks = self._training.checks

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch = self._training = None  # they may hold a copy of the weights

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        if self._training is not None:
            self._training.after_batch(trainer)
        elif self._watch is not None:
            self._check_edits(trainer, self._watch, edits_of(outputs))

    def _check_edits(self, trainer: Trainer, watch: SessionWatch, edits: Sequence[Edit]) -> None:
        """Look at the model of a stream of edits, if it is time, and act on what is found."""
        session, applied = watch.session, [edit for edit in edits if edit.status is EditStatus.APPLIED]
        self._since_good += applied
        if self.edit_bounds.least_retained is not None:
            note_after(session, applied)
        done = len(session.edits)
        due = done // self.every_n_edits > (done - len(edits)) // self.every_n_edits
        if not due and not trainer.is_last_batch:
            return
        found = self._look(watch)
        self.checks.append({"edits": done, **found})
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
            dropped = recover(session, since, finding, lambda: not self._look(watch)["failures"], weaken)
            self._end_if_hopeless(trainer, watch, dropped)
            return
        log.warning("Rolling back %d edits: the model's state is bad %s", len(since), finding)
        roll_back(session, since, finding)
        trainer.should_stop = trainer.should_stop or self.on_failure == "stop"

    def _end_if_hopeless(self, trainer: Trainer, watch: SessionWatch, dropped: int) -> None:
        check = {"edits": len(watch.session.edits), "recovered": True, **self._look(watch)}
        self.checks.append(check)
        if (verdict := watch.verdict(dropped, check["failures"])) is not None:
            check["verdict"] = verdict
            log.error("The stream ends: %s", verdict)
            trainer.should_stop = True

    def _look(self, watch: SessionWatch) -> dict[str, Any]:
        return watch.look()

    def _begin(self, language_model: LanguageModel, weights: Weights) -> ModelWatch:
        text = held_out_text(self.perplexity_text) if self.bounds.need_text else ""
        return ModelWatch(language_model, weights, self.bounds, self.canaries, text)


def _check_training_options(trainer: Trainer, on_failure: str, bounds: EditBounds) -> None:
    """Refuse options that only a module that edits can follow.

    Raises:
        OptionError: With the option.
    """
    check_strategy(trainer.strategy)
    if on_failure not in ("warn", "stop"):
        raise OptionError(f"on_failure: {on_failure} undoes edits, and this module makes none; use warn or stop")
    if bounds.only_for_edits is not None:
        raise OptionError(bounds.only_for_edits)


class _TrainingWatch:
    """Looks at a model every n batches of its training.

    Args:
        watch: Knows what the model was at first.
        every_n_batches: Interval.
        stop: Whether the training ends when the model's state is bad.
    """

    def __init__(self, watch: ModelWatch, every_n_batches: int, stop: bool) -> None:
        self._watch, self._every, self._stop, self._batches = watch, every_n_batches, stop, 0
        self.checks: list[dict[str, Any]] = []

    def after_batch(self, trainer: Trainer) -> None:
        """Look at the model, if it is time: scalars ``state/…`` go to every logger."""
        self._batches += 1
        if self._batches % self._every and not trainer.is_last_batch:
            return
        found = self._watch.look()
        self.checks.append({"batches": self._batches, **found})
        scalars = {f"state/{name}": float(value) for name, value in found.items() if name != "failures"}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=self._batches)
        if found["failures"]:
            log.warning("The model's state is bad after %d batches: %s", self._batches, "; ".join(found["failures"]))
            trainer.should_stop = trainer.should_stop or self._stop
