"""Says early when edits damage what they should leave alone."""

import logging
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.editing.edit import EditBatch, edits_of
from rome_pl.editing.probing import divergence_alone, divergence_together, in_force, neighbour_damage
from rome_pl.editing.session import EditSession, session_of
from rome_pl.metrics import held_out_text
from rome_pl.metrics.damage import Damage, DamageBounds

__all__ = ["DamageCheck"]

log = logging.getLogger(__name__)

ADVICE = (
    "These settings do not suit the model. 'rome-pl tune' finds better ones; by hand try another layer, several "
    "layers, or a lower stop_probability"
)


class DamageCheck(Callback):
    """Warns when edits cost other facts or ordinary text too much, after the first edits and at the end of a run.

    It needs what :class:`ProbeEvaluation` measures. List it between that and :class:`EditCommit`. Only edits that
    have taken count. ``results.json`` holds each finding under ``damage``.

    Args:
        largest_neighbour_loss: Largest share of neighbourhood prompts whose right answer may be lost (a difference of
            two NS). The warning comes if a loss is larger by more than its standard error over records. ``None``:
            neighbours are not looked at.
        largest_divergence: Largest divergence of the next token of ordinary text from the unedited model's for an
            edit, in nats; in sequential mode that of all edits divided by their number. ``None``: it is not measured.
        first_edits: After how many edits to look for the first time. Ordinary text is read for these alone.
        windows: Windows of 256 tokens of the text that are read for an edit.
        held_out_text: UTF-8 text. ``None`` (default): the shipped one.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        largest_neighbour_loss: float | None = 0.05,
        largest_divergence: float | None = 0.02,
        first_edits: int = 10,
        windows: int = 1,
        held_out_text: str | None = None,
    ) -> None:
        for name, value in (("first_edits", first_edits), ("windows", windows)):
            if value < 1:
                raise ValueError(f"{name}: expected a number from 1 on, got {value}")
        self.bounds = DamageBounds(largest_neighbour_loss, largest_divergence)
        self.first_edits, self.windows, self.held_out_text = first_edits, windows, held_out_text
        self._text = ""
        self._divergences: list[float] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.bounds.largest_divergence is not None:
            self._text = held_out_text(self.held_out_text)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session_of(pl_module)
        self._divergences = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        session = session_of(pl_module)
        made = [edit for edit in edits_of(outputs) if in_force(edit)]
        if self.bounds.largest_divergence is not None and not session.sequential:
            for edit in made[: self.first_edits - len(self._divergences)]:
                self._divergences.append(divergence_alone(session, edit, self._text, self.windows))
        done = neighbour_damage(session)
        if done.edits >= self.first_edits > done.edits - len(made):
            self._look(trainer, session, done, f"after {done.edits} edits")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = session_of(pl_module)
        found, looks = neighbour_damage(session, final=True), session.measured.damage
        known = bool(looks) and looks[-1]["edits"] == found.edits and looks[-1]["after"] == found.after
        if found.edits and not known:
            self._look(trainer, session, found, f"at the end, with {found.edits} edits")

    def _look(self, trainer: Trainer, session: EditSession, found: Damage, when: str) -> None:
        """Measure what an edit does to ordinary text, keep what was found, and warn of what is new in it."""
        found = replace(found, divergence=self._divergence(session, found.edits))
        session.measured.damage.append(found.line(self.bounds))
        findings = found.findings(self.bounds)
        if findings and trainer.is_global_zero:
            log.warning("Damage %s: %s. %s", when, "; ".join(findings), ADVICE)

    def _divergence(self, session: EditSession, edits: int) -> float | None:
        if self.bounds.largest_divergence is None or not edits:
            return None
        if session.sequential:
            return divergence_together(session, self._text, self.windows) / edits
        return sum(self._divergences) / len(self._divergences) if self._divergences else None
