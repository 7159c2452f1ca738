"""Measures what earlier edits are worth while a sequential stream goes on, in Lightning's validation loop."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.editing.session import Retention, session_of
from rome_pl.metrics import ProbeScores, RunningScores, held_out_text, perplexity

__all__ = ["RetentionCheck"]


class RetentionCheck(Callback):
    """Keeps the scores of earlier edits, measured every ``val_check_interval`` batches of the Trainer.

    The data module's ``retention_sample`` says how many edits are looked at. Scalars ``retention/…`` go to every
    logger, with the number of edits as the x axis; results.json gets the scores, the ages, and which edits were lost
    by when.

    Args:
        measure_perplexity: Whether held-out perplexity is measured too.
        text: UTF-8 text for it. ``None`` (default): the shipped one.
    """

    def __init__(self, measure_perplexity: bool = True, text: str | None = None) -> None:
        self.measure_perplexity, self.text = measure_perplexity, text
        self._scores: dict[str, ProbeScores] = {}

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session_of(pl_module)  # another module's validation gives something else than scores
        self._scores = {}

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._scores.update(outputs or {})

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self._scores:
            return
        session = session_of(pl_module)
        running = RunningScores()
        for name, scores in self._scores.items():
            running.update(scores, session.measured.base_scores.get(name))
        measured = perplexity(session.language_model, held_out_text(self.text)) if self.measure_perplexity else None
        point = Retention(len(session.edits), measured, session.layers.change, self._scores)
        session.measured.retention.append(point)
        scalars = {f"retention/{name}": value for name, value in running.compute().items()}
        if measured is not None:
            scalars["retention/perplexity"] = measured
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=point.edits)
