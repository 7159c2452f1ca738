"""A progress bar that counts edits."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

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

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        return "Editing"
