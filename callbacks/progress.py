"""Progress bars that count what a user counts."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

from rome_pl.edit import EditBatch
from rome_pl.moment_pass import MomentPass
from rome_pl.session import session_of

__all__ = ["EditProgressBar", "EvaluationProgressBar", "MomentProgressBar", "TraceProgressBar"]


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
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        return len(dataset) if isinstance(dataset, Sequence) else super().total_train_batches

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
        moments = getattr(self.trainer.lightning_module, "moments", None)
        if not isinstance(moments, MomentPass):
            return super().total_predict_batches_current_dataloader
        blocks = sum(
            boundaries[-1] - len(done)
            for boundaries, done in zip(moments.plan.boundaries, moments.plan.done, strict=True)
        )
        return blocks // moments.peers.world_size + len(moments.plan.boundaries)

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


class TraceProgressBar(RichProgressBar):
    """Lightning's Rich progress bar, naming what it counts: facts."""

    @property
    @override
    def predict_description(self) -> str:
        return "Tracing"
