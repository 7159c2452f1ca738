"""Shows a run where people look: scalars by edit, and pictures of the loss curves."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from rome_pl.edit import Edit, session_of
from rome_pl.metrics import RunningScores, summarise

__all__ = ["TensorBoardReport"]


class TensorBoardReport(Callback):
    """Logs each edit with the edit's index as the x axis, to every logger of the Trainer.

    Scalars: ``edit/…`` (loss, probability before and after, norms, seconds), ``running/…`` (ES, PS, NS over the edits
    so far, right after each write), ``final/…``. A TensorBoard logger gets a picture of every edit's loss curve too.

    Args:
        pictures: Most edits that get a picture.
    """

    def __init__(self, pictures: int = 100) -> None:
        self.pictures = pictures
        self._running = RunningScores()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running = RunningScores()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Edit, batch_idx: int
    ) -> None:
        edit: Edit = outputs["edit"]
        session = session_of(pl_module)
        scalars = {f"edit/seconds_{stage}": seconds for stage, seconds in edit.seconds.items()}
        for name, value in (("probability_before", edit.before), ("probability_after", edit.after)):
            if value is not None:
                scalars[f"edit/{name}"] = value
        if edit.steps:
            last = edit.steps[-1]
            scalars |= {"edit/loss": last.loss, "edit/nll": last.nll, "edit/kl": last.kl, "edit/steps": len(edit.steps)}
        if edit.written is not None:
            scalars["edit/update_norm"] = edit.written.update.norm
        scalars["stream/weight_change"] = session.weight.change
        if "immediate" in edit.scores:
            self._running.update(edit.scores["immediate"])
        scalars |= {f"running/{name}": value for name, value in self._running.compute().items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=edit.index)
            if isinstance(logger, TensorBoardLogger) and edit.steps and edit.index < self.pictures:
                logger.experiment.add_figure("loss curve", _loss_curve(edit), global_step=edit.index)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = session_of(pl_module)
        final = [edit.scores["final"] for edit in session.edits if "final" in edit.scores]
        scalars = {
            f"final/{name}": entry["value"] for name, entry in summarise(final).items() if entry["value"] is not None
        }
        scalars |= {f"perplexity/{moment}": value for moment, value in session.perplexity.items()}
        if scalars:
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=len(session.edits))


def _loss_curve(edit: Edit) -> Any:
    from matplotlib.figure import Figure  # not pyplot, whose global figures would have to be closed

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(len(edit.steps))
    for part in ("loss", "nll", "kl", "decay"):
        left.plot(steps, [getattr(step, part) for step in edit.steps], label=part, marker=".")
    left.set(xlabel="step", ylabel="loss", yscale="symlog")
    left.legend(frameon=False)
    right.plot(steps, [step.probability for step in edit.steps], marker=".", color="black")
    right.set(xlabel="step", ylabel="probability of the target", ylim=(0, 1.02))
    title = f"{edit.request.prompt} → {edit.request.target_new}"
    figure.suptitle(title.replace("$", r"\$")[:90], fontsize=9)
    return figure
