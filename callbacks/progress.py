"""A progress bar that counts edits."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

from rome_pl.edit import EditBatch, session_of

__all__ = ["EditProgressBar"]


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
