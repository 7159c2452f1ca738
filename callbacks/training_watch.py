"""Watching the training of a module that makes no edits; :class:`rome_pl.callbacks.StateCheck` uses it."""

import logging
from typing import Any

from lightning.pytorch import Trainer

from rome_pl.editing.session_watch import EditBounds
from rome_pl.errors import OptionError
from rome_pl.metrics.model_health import ModelWatch
from rome_pl.utils.distributed import check_strategy

__all__ = ["TrainingWatch", "check_training_options"]

log = logging.getLogger(__name__)


def check_training_options(trainer: Trainer, on_failure: str, bounds: EditBounds) -> None:
    """Refuse options that only a module that edits can follow.

    Raises:
        OptionError: With the option.
    """
    check_strategy(trainer.strategy)
    if on_failure not in ("warn", "stop"):
        raise OptionError(f"on_failure: {on_failure} undoes edits, and this module makes none; use warn or stop")
    if bounds.only_for_edits is not None:
        raise OptionError(bounds.only_for_edits)


class TrainingWatch:
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
