"""Measures every request's probes before, right after, and at the end of a stream."""

import logging
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.editing.edit import EditBatch, edits_of
from rome_pl.editing.probing import in_force, measure_probes, probe, with_touched
from rome_pl.editing.session import EditSession, session_of
from rome_pl.metrics import ProbeScores, held_out_text, measure_text, perplexity
from rome_pl.metrics.probes import MEASURED_TOGETHER
from rome_pl.metrics.score_cache import KnownScores
from rome_pl.utils.distributed import gather

__all__ = ["ProbeEvaluation"]

log = logging.getLogger(__name__)


class ProbeEvaluation(Callback):
    """ES, PS and NS are made of what this measures: on the unedited model, right after each edit, on the final model.

    List it between :class:`RankOneWriter` and :class:`EditCommit`. Skipped and rejected edits are measured too: they
    count with whatever the model then says. On several devices each measures its share.

    Args:
        held_out_text: UTF-8 text for perplexity before and after a sequential stream, and for the divergence of the
            final model from the unedited one. ``None`` (default): the shipped one.
        measure_perplexity: Whether to measure these at all.
    """

    def __init__(self, held_out_text: str | None = None, measure_perplexity: bool = True) -> None:
        self.held_out_text, self.measure_perplexity = held_out_text, measure_perplexity
        self._text = ""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.measure_perplexity:
            return
        self._text = held_out_text(self.held_out_text)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = session_of(pl_module)
        log.info("Measuring %d records on the unedited model", len(session.requests))
        # Unless an earlier fit has edited the model, what other runs have measured of it holds.
        known = None if session.layers.written else KnownScores(session.language_model)
        session.measured.base_scores = self._measure_all(trainer, session, known)
        if self.measure_perplexity:
            session.measured.perplexity["base"] = perplexity(session.language_model, self._text)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        session = session_of(pl_module)
        edits = [
            edit for edit in edits_of(outputs) if edit.name in session.measured.base_scores
        ]  # the others are no requests
        for edit in edits:
            edit.scores["base"] = session.measured.base_scores[edit.name]
        edits = [edit for edit in edits if not edit.resumed]  # the others were measured when they were made
        started = time.perf_counter()
        for edit in edits:
            edit.scores["immediate"] = session.measured.base_scores[edit.name]
        # In single mode an edit that is not in force leaves the model as it was; no need to measure again.
        changed = [edit for edit in edits if (session.sequential and session.layers.written) or in_force(edit)]
        if changed:
            for edit, scores in zip(changed, measure_probes(session, changed), strict=True):
                edit.scores["immediate"] = scores
        for edit in edits:
            edit.seconds["evaluate"] = (time.perf_counter() - started) / len(edits)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = session_of(pl_module)
        if not session.sequential:
            return
        log.info("Measuring %d records on the final model", len(session.requests))
        session.measured.final_scores = self._measure_all(trainer, session)
        for edit in session.edits:
            if edit.name in session.measured.final_scores:
                edit.scores["final"] = session.measured.final_scores[edit.name]
        if self.measure_perplexity:
            measure = measure_text(session.language_model, self._text, session.unedited)
            session.measured.perplexity["final"], session.measured.divergence = measure.perplexity, measure.divergence

    @staticmethod
    def _measure_all(
        trainer: Trainer, session: EditSession, known: KnownScores | None = None
    ) -> dict[str, ProbeScores]:
        """Every request's scores under the weights as they are; ``known`` if these are the original ones."""
        mine = session.requests[trainer.global_rank :: trainer.world_size]
        scores: list[ProbeScores] = []
        if known is not None:
            scores = with_touched(session, mine, known.measure(mine))
        else:
            for start in range(0, len(mine), MEASURED_TOGETHER):
                scores += probe(session, mine[start : start + MEASURED_TOGETHER])
        measured = [(str(request.case_id), found) for request, found in zip(mine, scores, strict=True)]
        return dict(gather(measured) if trainer.world_size > 1 else measured)
