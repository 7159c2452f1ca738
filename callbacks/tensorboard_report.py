"""Shows a run where people look: scalars by edit for every logger; pictures, texts and settings for TensorBoard."""

import logging
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from rome_pl.editing.edit import Edit, EditBatch, edits_of
from rome_pl.editing.session import EditSession, session_of
from rome_pl.metrics import RunningScores
from rome_pl.reports.continuations import compared, comparison, note_continuations
from rome_pl.reports.drawing import Figure, pixels
from rome_pl.reports.run_figures import draw_figures
from rome_pl.reports.run_results import detailed_records, note_change, run_results
from rome_pl.reports.scalars import charts, edit_scalars, final_scalars, run_settings
from rome_pl.reports.stream_figures import LABELLED, loss_curves

__all__ = ["TensorBoardReport"]

log = logging.getLogger(__name__)


class TensorBoardReport(Callback):
    """Logs each edit with the edit's index as the x axis, to every logger of the Trainer.

    Scalars: ``edit/…`` (loss, probability before and after, norms, seconds), ``running/…`` (ES, PS, NS over the edits
    so far, right after each write), ``stream/…``, and at the end ``final/…`` and ``perplexity/…``; in single mode,
    where there is no final model, ``immediate/…``.

    A TensorBoard logger gets more, other loggers have no place for it: pictures of the edits' loss curves as they come,
    ten edits to a picture, since drawing one takes a good part of what an edit takes; the pictures of
    :mod:`rome_pl.reports.run_figures` at the end; the settings with the final scores (HParams); and a layout of custom
    scalars. In sequential mode also ``generations``: how the unedited and the final model continue the prompts of the
    first edits. In single mode there is no such text: no edit is ever written there.

    Args:
        pictures: Most edits whose curves are drawn as they come.
        generations: Most edits whose prompts are continued.
        figures: Whether the pictures of the whole run are drawn at the end.
    """

    def __init__(self, pictures: int = 100, generations: int = 5, figures: bool = True) -> None:
        self.pictures, self.generations, self.figures = pictures, generations, figures
        self._running = RunningScores()
        self._unlogged: dict[int, Edit] = {}
        self._next = 0
        self._undrawn: list[Edit] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning would log the settings before the run with a metric of its own, and TensorBoard goes by the first
        # settings that it finds; they are logged with the final scores.
        for logger in _tensorboards(trainer):
            logger._default_hp_metric = False

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running, self._undrawn = RunningScores(), []
        self._unlogged, self._next = {}, 0
        session = session_of(pl_module)
        data = getattr(trainer, "datamodule", None)
        retention = session.sequential and trainer.enable_validation and getattr(data, "retention_sample", 1) > 0
        for logger in _tensorboards(trainer):
            logger.experiment.add_custom_scalars(charts(session.sequential, retention))
            note_continuations(session, self.generations, "base")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        session = session_of(pl_module)
        if session.sequential:
            note_change(session)
        self._unlogged |= {edit.index: edit for edit in edits_of(outputs)}
        self._log(trainer, session)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        session = getattr(pl_module, "session", None)
        if isinstance(session, EditSession):
            self._log(trainer, session, everything=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = session_of(pl_module)
        self._log(trainer, session, everything=True)
        content, step = run_results(session, []), len(session.edits)
        scalars = final_scalars(content)
        settings = run_settings(pl_module.hparams_initial, session, getattr(trainer, "datamodule", None))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and scalars:
                logger.log_hyperparams(settings, scalars, step)  # logs the scalars too
            elif scalars:
                logger.log_metrics(scalars, step=step)
        if trainer.is_global_zero and _tensorboards(trainer):
            try:
                self._show_all(trainer, session, content)
            except Exception:  # the edits are done: a picture must not cost their results and the saved model
                log.warning("TensorBoard does not get all pictures and texts of the run", exc_info=True)

    def _show_all(self, trainer: Trainer, session: EditSession, content: Mapping[str, Any]) -> None:
        step = len(session.edits)
        note_continuations(session, self.generations, "final")
        if samples := compared(session, self.generations):
            for logger in _tensorboards(trainer):
                logger.experiment.add_text("generations", comparison(samples), step)
        if self.figures:
            records = detailed_records(session, content["records"])
            for name, figure in draw_figures(content, records, session.edits, session.measured.weight_changes).items():
                _show(trainer, f"figures/{name}", figure, step)

    def _log(self, trainer: Trainer, session: EditSession, everything: bool = False) -> None:
        """Log the edits that are next in order; at the end all that are left.

        Batches of edits of similar length are not done in order, but a step that goes back draws a tangle.
        """
        # Where edits accumulate, each batch is next in order.
        change = next(reversed(session.measured.weight_changes.values()), 0.0)
        while self._unlogged and (everything or self._next in self._unlogged):
            self._next = min(self._unlogged) if everything else self._next
            edit = self._unlogged.pop(self._next)
            self._next += 1
            scalars = edit_scalars(edit) | {"stream/weight_change": change}
            if "immediate" in edit.scores:
                self._running.update(edit.scores["immediate"], edit.scores.get("base"))
            scalars |= {f"running/{name}": value for name, value in self._running.compute().items()}
            if edit.resumed:  # the run that made it has logged it
                continue
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=edit.index)
            if edit.steps and edit.index < self.pictures:
                self._undrawn.append(edit)
        while len(self._undrawn) >= LABELLED or (everything and self._undrawn):
            drawn, self._undrawn = self._undrawn[:LABELLED], self._undrawn[LABELLED:]
            if _tensorboards(trainer) and trainer.is_global_zero:
                _show(trainer, "loss curves", loss_curves(drawn), drawn[-1].index)


def _tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _show(trainer: Trainer, tag: str, figure: Figure, step: int) -> None:
    picture = pixels(figure)
    for logger in _tensorboards(trainer):
        logger.experiment.add_image(tag, picture, step, dataformats="HWC")
