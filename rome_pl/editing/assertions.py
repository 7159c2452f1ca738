"""What edits assert at each of their layers when they are written."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from rome_pl.editing.edit import Edit
from rome_pl.editing.run_setup import RunSetup
from rome_pl.write.closed_form import Assertion, DisablingEditError, Update
from rome_pl.write.layer_shares import LayerShares

__all__ = ["PART", "EditAssertions"]


PART = "made to the part of "
"""How the note of an edit begins that is made in part at a layer; only that of the write that stands is kept."""


class EditAssertions:
    """Turns what was found for edits into assertions, layer by layer.

    Edits that were written before assert the same as then.

    Args:
        setup: What the edits of the run share. In single mode each is measured by itself on the original weights.
        edits: The edits.
        strength: Which part of the changes is made.
    """

    def __init__(self, setup: RunSetup, edits: Sequence[Edit], strength: float = 1.0) -> None:
        self._setup, self._layers, self._edits, self._strength = setup, setup.layers, edits, strength

    def at(self, layer: int, below: Mapping[int, Update]) -> tuple[Sequence[str], Assertion] | None:
        """Which edits assert what at a layer.

        Args:
            layer: The layer.
            below: The changes of the layers below it, by layer.

        Returns:
            Names of edits, and their assertions, a row each; ``None`` if no edit writes there.

        Raises:
            DisablingEditError: If an update would explode; its row counts all edits.
        """
        here = [edit for edit in self._edits if layer in edit.layers]
        if not here:
            return None
        found = self._written(here, layer) | self._found([edit for edit in here if edit.written is None], layer, below)
        names = [edit.name for edit in here]
        joint = Assertion.joint([found[name] for name in names])
        if self._setup.largest_update is not None and any(edit.written is None for edit in here):
            joint = self._bounded(here, layer, joint, self._setup.largest_update)
        if self._strength != 1:
            joint = self._layers.at(layer).weaker(joint, self._strength)
        return names, joint

    @staticmethod
    def _written(edits: Sequence[Edit], layer: int) -> dict[str, Assertion]:
        """The assertions of edits that were written before, by name."""
        return {edit.name: edit.written.layers[layer].assertion for edit in edits if edit.written is not None}

    def _found(self, edits: Sequence[Edit], layer: int, below: Mapping[int, Update]) -> dict[str, Assertion]:
        """The assertions of edits that were searched, by name."""
        found: dict[str, Assertion] = {}
        for shares in dict.fromkeys(edit.search.shares for edit in edits):
            together = [edit for edit in edits if edit.search.shares is shares]
            made = self._shared(together, shares, layer, below) if shares is not None else self._alone(together)
            if (norm := self._setup.anchor_norm) is not None:
                made = [self._layers.anchored(layer, one, norm) for one in made]
            found |= dict(zip([edit.name for edit in together], made, strict=True))
        return found

    def _alone(self, edits: Sequence[Edit]) -> list[Assertion]:
        """What edits of one layer assert."""
        pairs = [(edit.search.keys, edit.search.delta) for edit in edits]
        return [keys.assertion(self._setup.preset, delta) for keys, delta in pairs if delta is not None]

    def _shared(
        self, edits: Sequence[Edit], shares: LayerShares, layer: int, below: Mapping[int, Update]
    ) -> list[Assertion]:
        """What edits that were prepared together assert at one of their layers."""
        layers = edits[0].layers
        offsets = [(edit.search.position, edit.search.delta) for edit in edits if edit.search.delta is not None]
        # In sequential mode the writes below are in the weights.
        changes = [] if self._setup.sequential else [below[lower] for lower in layers if lower < layer]
        return shares.assertions(layers.index(layer), offsets, changes)

    def _bounded(self, edits: Sequence[Edit], layer: int, joint: Assertion, largest: float) -> Assertion:
        """Assertions that change the layer by no more than is allowed; those of edits that were written before stay."""
        try:
            weaker, strengths = self._layers.at(layer).bounded(joint, largest)
        except DisablingEditError as error:  # it counts the edits of this layer
            names = [edit.name for edit in self._edits]
            raise DisablingEditError(str(error), names.index(edits[error.row].name)) from error
        where, values = f", at layer {layer}", []
        for row, (edit, strength) in enumerate(zip(edits, strengths, strict=True)):
            values.append((weaker if edit.written is None else joint).value[row])
            if edit.written is None:
                edit.notes = [note for note in edit.notes if not (note.startswith(PART) and note.endswith(where))]
                if strength < 1:
                    edit.notes.append(f"{PART}{strength:.2g}, to stay within largest_update{where}")
        return replace(weaker, value=torch.stack(values))
