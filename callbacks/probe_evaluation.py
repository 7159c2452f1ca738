"""Measures every request's probes before, right after, and at the end of a stream."""

import logging
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.edit import Edit, EditSession, session_of
from rome_pl.errors import OptionError
from rome_pl.metrics import perplexity, probe_scores

__all__ = ["ProbeEvaluation"]

log = logging.getLogger(__name__)


class ProbeEvaluation(Callback):
    """ES, PS and NS are made of what this measures: on the unedited model, right after each edit, on the final model.

    List it between :class:`RankOneWriter` and :class:`EditCommit`, while a single edit is still in the weights. Skipped
    and rejected edits are measured too: they count with whatever the model then says.

    Args:
        held_out_text: UTF-8 text for perplexity before and after a sequential stream; nothing takes the one shipped.
        measure_perplexity: Whether to measure perplexity at all.
    """

    def __init__(self, held_out_text: str | None = None, measure_perplexity: bool = True) -> None:
        self.held_out_text, self.measure_perplexity = held_out_text, measure_perplexity
        self._text = ""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.measure_perplexity:
            return
        source = Path(self.held_out_text) if self.held_out_text else files("rome_pl") / "assets" / "held_out_text.txt"
        try:
            self._text = source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"held_out_text: {source} cannot be read as UTF-8 text: {error}") from error

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = session_of(pl_module)
        log.info("Measuring %d records on the unedited model", len(session.requests))
        for request in session.requests:
            session.base_scores[str(request.case_id)] = probe_scores(session.language_model, request)
        self._measure_perplexity(session, "base")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Edit, batch_idx: int
    ) -> None:
        edit: Edit = outputs["edit"]
        session = session_of(pl_module)
        if edit.name not in session.base_scores:  # no valid record
            return
        started = time.perf_counter()
        edit.scores["base"] = session.base_scores[edit.name]
        if session.weight.written:
            edit.scores["immediate"] = probe_scores(session.language_model, edit.request)
        else:
            edit.scores["immediate"] = edit.scores["base"]
        edit.seconds["evaluate"] = time.perf_counter() - started

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = session_of(pl_module)
        if not session.sequential:
            return
        log.info("Measuring %d records on the final model", len(session.requests))
        for request in session.requests:
            session.final_scores[str(request.case_id)] = probe_scores(session.language_model, request)
        for edit in session.edits:
            if edit.name in session.final_scores:
                edit.scores["final"] = session.final_scores[edit.name]
        self._measure_perplexity(session, "final")

    def _measure_perplexity(self, session: EditSession, moment: str) -> None:
        if self.measure_perplexity:
            session.perplexity[moment] = perplexity(session.language_model, self._text)
