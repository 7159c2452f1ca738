"""Shows a run where people look: scalars by edit, and pictures of the loss curves."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from rome_pl.edit import Edit, EditBatch, edits_of, session_of
from rome_pl.metrics import RunningScores, summarise

__all__ = ["TensorBoardReport"]

CURVES = 10
"""Edits in one picture."""

LABEL = 50
"""Longest label of a curve, in characters; of a longer one the end is shown, where the answer stands."""


class TensorBoardReport(Callback):
    """Logs each edit with the edit's index as the x axis, to every logger of the Trainer.

    Scalars: ``edit/…`` (loss, probability before and after, norms, seconds), ``running/…`` (ES, PS, NS over the edits
    so far, right after each write), ``final/…``. A TensorBoard logger gets pictures of the edits' loss curves too, ten
    edits to a picture: drawing one takes a good part of what an edit takes.

    Args:
        pictures: Most edits whose curves are drawn.
    """

    def __init__(self, pictures: int = 100) -> None:
        self.pictures = pictures
        self._running = RunningScores()
        self._undrawn: list[Edit] = []

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running, self._undrawn = RunningScores(), []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        session = session_of(pl_module)
        change = session.weight.change
        for edit in edits_of(outputs):
            scalars = _scalars(edit) | {"stream/weight_change": change}
            if "immediate" in edit.scores:
                self._running.update(edit.scores["immediate"], edit.scores.get("base"))
            scalars |= {f"running/{name}": value for name, value in self._running.compute().items()}
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=edit.index)
            if edit.steps and edit.index < self.pictures:
                self._undrawn.append(edit)
        if len(self._undrawn) >= CURVES:
            self._draw(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)
        session = session_of(pl_module)
        final = {edit.name: edit.scores["final"] for edit in session.edits if "final" in edit.scores}
        table = summarise(final, session.base_scores)
        scalars = {f"final/{name}": entry["value"] for name, entry in table.items() if entry["value"] is not None}
        scalars |= {f"perplexity/{moment}": value for moment, value in session.perplexity.items()}
        if scalars:
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=len(session.edits))

    def _draw(self, trainer: Trainer) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if self._undrawn and loggers:
            for logger in loggers:
                logger.experiment.add_figure("loss curves", _curves(self._undrawn), self._undrawn[-1].index)
        self._undrawn = []


def _scalars(edit: Edit) -> dict[str, float]:
    scalars = {f"edit/seconds_{stage}": seconds for stage, seconds in edit.seconds.items()}
    for name, value in (("probability_before", edit.before), ("probability_after", edit.after)):
        if value is not None:
            scalars[f"edit/{name}"] = value
    if edit.steps:
        last = edit.steps[-1]
        scalars |= {"edit/loss": last.loss, "edit/nll": last.nll, "edit/kl": last.kl, "edit/steps": len(edit.steps)}
    if edit.written is not None:
        scalars["edit/update_norm"] = edit.written.update.norm
    return scalars


def _curves(edits: Sequence[Edit]) -> Any:
    from matplotlib.figure import Figure  # not pyplot, whose global figures would have to be closed

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for edit in edits:
        label = f"{edit.request.prompt} → {edit.request.target_new}".replace("$", r"\$")
        label = label if len(label) <= LABEL else "…" + label[1 - LABEL :]
        left.plot([step.loss for step in edit.steps], marker=".", label=label)
        right.plot([step.probability for step in edit.steps], marker=".")
    left.set(xlabel="evaluation", ylabel="loss", yscale="log")
    right.set(xlabel="evaluation", ylabel="probability of the target", ylim=(0, 1.02))
    figure.legend(loc="outside right center", frameon=False, fontsize=7)
    return figure
