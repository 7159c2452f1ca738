"""What edits assert at each of their layers when they are written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from rome_pl.editing.edit import Edit
from rome_pl.write.closed_form import Assertion, DisablingEditError, Update
from rome_pl.write.edited_layers import Ask, EditedLayers
from rome_pl.write.layer_shares import LayerShares
from rome_pl.write.presets import Preset

__all__ = ["PART", "Asking"]


PART = "made to the part of "
"""How the note of an edit begins that is made in part at a layer; only that of the write that stands is kept."""


@dataclass(frozen=True)
class Asking:
    """Turns what was found for edits into assertions.

    Args:
        layers: The weights that are edited.
        preset: The variant of the closed form.
        alone: Whether each edit is measured by itself on the original weights, and nothing is written.
        anchor_norm: Norm of every asserted value, see :meth:`EditedLayers.anchored`; nothing leaves them as found.
        largest_update: Largest Frobenius norm of an edit's change of a layer, relative to the original weight.
    """

    layers: EditedLayers
    preset: Preset
    alone: bool
    anchor_norm: float | None
    largest_update: float | None

    def ask(self, edits: Sequence[Edit]) -> Ask:
        """What edits assert at each layer; of those written before, the same as then."""

        def ask(layer: int, below: Mapping[int, Update]) -> tuple[Sequence[str], Assertion] | None:
            here = [edit for edit in edits if layer in edit.layers]
            if not here:
                return None
            asked = {edit.name: edit.written.layers[layer].assertion for edit in here if edit.written is not None}
            fresh = [edit for edit in here if edit.written is None]
            for spread in {id(edit.spread): edit.spread for edit in fresh}.values():
                own = [edit for edit in fresh if edit.spread is spread]
                asked |= dict(zip([edit.name for edit in own], self._wanted(own, spread, layer, below), strict=True))
            joint = Assertion.joint([asked[edit.name] for edit in here])
            if fresh and self.largest_update is not None:
                try:
                    joint = self._bounded(here, layer, joint, self.largest_update)
                except DisablingEditError as error:  # it counts the edits of this layer
                    names = [edit.name for edit in edits]
                    raise DisablingEditError(str(error), names.index(here[error.row].name)) from error
            return [edit.name for edit in here], joint

        return ask

    def _wanted(
        self, edits: Sequence[Edit], spread: LayerShares | None, layer: int, below: Mapping[int, Update]
    ) -> list[Assertion]:
        """What edits that were found together assert at one of their layers."""
        if spread is None:
            pairs = [(edit.keys, edit.delta) for edit in edits]
            wanted = [keys.assertion(self.preset, delta) for keys, delta in pairs if keys and delta is not None]
        else:
            offsets = [(edit.place, edit.delta) for edit in edits if edit.delta is not None]
            # Otherwise the writes below are in the weights.
            changes = [below[lower] for lower in edits[0].layers if lower < layer] if self.alone else []
            wanted = spread.assertions(edits[0].layers.index(layer), offsets, changes)
        if self.anchor_norm is None:
            return wanted
        return [self.layers.anchored(layer, one, self.anchor_norm) for one in wanted]

    def _bounded(self, edits: Sequence[Edit], layer: int, asked: Assertion, largest: float) -> Assertion:
        """What asks for no larger changes than are allowed, of edits that were not written before."""
        weaker, strengths = self.layers.at(layer).bounded(asked, largest)
        where, values = f", at layer {layer}", []
        for row, (edit, strength) in enumerate(zip(edits, strengths, strict=True)):
            source = weaker if edit.written is None else asked
            values.append(source.value[row])
            if edit.written is None:
                edit.notes = [note for note in edit.notes if not (note.startswith(PART) and note.endswith(where))]
                if strength < 1:
                    edit.notes.append(f"{PART}{strength:.2g}, to stay within largest_update{where}")
        return replace(weaker, value=torch.stack(values))
