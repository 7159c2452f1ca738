"""Progress that counts what a user counts: bars, and lines for log files."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from typing_extensions import override

from rome_pl.editing.edit import EditBatch
from rome_pl.editing.session import session_of
from rome_pl.second_moments.moment_pass import MomentPass

__all__ = ["EditProgressBar", "EvaluationProgressBar", "MomentProgressBar", "ProgressLines", "TraceProgressBar"]

log = logging.getLogger(__name__)


class EditProgressBar(RichProgressBar):
    """Lightning's Rich progress bar, naming what it counts: edits, with the last one's loss and target probability."""

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    @property
    @override
    def total_train_batches(self) -> int | float:
        """Number of requests, which is what the bar counts."""
        requests = _num_requests(self.trainer)
        return super().total_train_batches if requests is None else requests

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._update(self.train_progress_bar_id, len(session_of(pl_module).edits))

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        return "Editing"


class MomentProgressBar(RichProgressBar):
    """Lightning's Rich progress bar, naming what it counts: blocks of text for this process."""

    @property
    @override
    def total_predict_batches_current_dataloader(self) -> int | float:
        """Steps if no pass ends early; the data loader cannot know them."""
        blocks = _num_blocks(self.trainer)
        return super().total_predict_batches_current_dataloader if blocks is None else blocks

    @property
    @override
    def predict_description(self) -> str:
        return "Summing keys"


class EvaluationProgressBar(RichProgressBar):
    """Lightning's Rich progress bar, naming what it counts: lists of requests."""

    @property
    @override
    def predict_description(self) -> str:
        return "Measuring"


class ProgressLines(ProgressBar):
    """Says now and then how far a run is, a line each time: for log files, in which a bar is noise.

    Args:
        counted: What is counted, in the plural.
        every_n_seconds: Least time between two lines; the last one always comes.
    """

    def __init__(self, counted: str = "edits", every_n_seconds: float = 30.0) -> None:
        super().__init__()
        self.counted, self.every_n_seconds = counted, every_n_seconds
        self._enabled = True
        self._began = self._last = 0.0
        self._told = 0

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin()  # not before: other callbacks measure the unedited model at the start

    @override
    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        self._tell(len(session_of(pl_module).edits), _num_requests(trainer))

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        blocks = _num_blocks(trainer)
        self._tell(batch_idx + 1, trainer.num_predict_batches[dataloader_idx] if blocks is None else blocks)

    def _begin(self) -> None:
        self._began = self._last = time.monotonic()
        self._told = 0

    def _tell(self, done: int, total: float | None) -> None:
        now = time.monotonic()
        if not self._enabled or done == self._told or (done != total and now - self._last < self.every_n_seconds):
            return
        self._last, self._told = now, done
        of = "" if total is None else f" of {total}"
        log.info("%d%s %s after %.0f s", done, of, self.counted, now - self._began)


def _num_requests(trainer: Trainer) -> int | None:
    """Number of requests of a stream, if it is known."""
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sequence) else None


def _num_blocks(trainer: Trainer) -> int | None:
    """Blocks of text for this process, if it sums keys and none of its passes ends early."""
    moments = getattr(trainer.lightning_module, "moments", None)
    if not isinstance(moments, MomentPass):
        return None
    blocks = sum(
        boundaries[-1] - len(done) for boundaries, done in zip(moments.plan.boundaries, moments.plan.done, strict=True)
    )
    return blocks // moments.peers.world_size + len(moments.plan.boundaries)


class TraceProgressBar(RichProgressBar):
    """Lightning's Rich progress bar, naming what it counts: facts."""

    @property
    @override
    def predict_description(self) -> str:
        return "Tracing"
