"""All weights being edited: an edit writes into each of its rewrite layers, the lower ones first.

Each layer is a weight of its own with its own metric, and is replayed by itself: what an edit asserts there is fixed
when it is first written. Edits of one run may write into different layers.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from rome_pl.second_moments.second_moment import SecondMoment
from rome_pl.write.closed_form import Assertion, DisablingEditError, Update
from rome_pl.write.edited_weight import EditedWeight, LayerWrite

__all__ = ["EditWrite", "EditedLayers", "LayerAssertions"]


class LayerAssertions(Protocol):
    """What edits assert, layer by layer."""

    def at(self, layer: int, below: Mapping[int, Update]) -> tuple[Sequence[str], Assertion] | None:
        """Which edits assert what at a layer, a row each; ``None`` if none does.

        Args:
            layer: The layer.
            below: The changes of the layers below it, by layer.
        """


@dataclass(frozen=True)
class EditWrite:
    """One write, of one edit or of several solved jointly, into rewrite layers.

    Args:
        names: Identifiers of its edits, in their order.
        layers: The write into each layer that one of them writes into, by layer, the lowest first.
    """

    names: tuple[str, ...]
    layers: Mapping[int, LayerWrite]

    @property
    def assertions(self) -> tuple[Assertion, ...]:
        """What is asserted at each of these layers."""
        return tuple(written.assertion for written in self.layers.values())

    @property
    def updates(self) -> tuple[Update, ...]:
        """The change of each of these layers."""
        return tuple(written.update for written in self.layers.values())

    @property
    def norm(self) -> float:
        """Frobenius norm of the changes of all layers together."""
        return math.hypot(*(update.norm for update in self.updates))

    @property
    def realised(self) -> tuple[float, ...]:
        """For each edit the least of :attr:`LayerWrite.realised` over its layers."""
        shares = dict.fromkeys(self.names, math.inf)
        for written in self.layers.values():
            shares |= {name: min(shares[name], own) for name, own in zip(written.names, written.realised, strict=True)}
        return tuple(shares.values())

    def same_as(self, other: "EditWrite") -> bool:
        """Whether it changes the weights by the same bits."""
        if (self.names, self.layers.keys()) != (other.names, other.layers.keys()):
            return False
        return all(written.same_as(other.layers[layer]) for layer, written in self.layers.items())

    def part(self, name: str) -> "EditWrite":
        """One edit's rows of a joint write."""
        layers = {layer: written.part(name) for layer, written in self.layers.items() if name in written.names}
        return EditWrite((name,), layers)

    def to(self, device: torch.device) -> "EditWrite":
        """The same on a device."""
        return EditWrite(self.names, {layer: written.to(device) for layer, written in self.layers.items()})


class EditedLayers:
    """The rewrite layers' weights with their edits.

    Args:
        weights: The weights, the lowest layer's first.
        moments: The second moment of each layer's keys; none where the metric is the identity.
        main: The layers that edits write into unless they are searched again at others. Empty (default): all.
    """

    def __init__(
        self, weights: Sequence[EditedWeight], moments: Sequence[SecondMoment] = (), main: Sequence[int] = ()
    ) -> None:
        self.weights, self.moments = tuple(weights), tuple(moments)
        self.main = tuple(main or self.numbers)
        self.written: list[EditWrite] = []

    def __len__(self) -> int:
        return len(self.weights)

    def at(self, layer: int) -> EditedWeight:
        """The weight of a layer."""
        return self.weights[self.numbers.index(layer)]

    @property
    def last(self) -> EditedWeight:
        """The weight of the last of the main layers, at which offsets are searched first."""
        return self.at(self.main[-1])

    @property
    def last_moment(self) -> SecondMoment:
        """The second moment of the keys there; where the metric is the identity there is none."""
        return self.moments[self.numbers.index(self.main[-1])]

    @property
    def numbers(self) -> list[int]:
        """The rewrite layers, numbered from 0."""
        return [weight.site.layer for weight in self.weights]

    @property
    def used(self) -> list[int]:
        """The main layers, and those others that an edit is written into."""
        return [layer for layer in self.numbers if layer in self.main or self.at(layer).written]

    @property
    def names(self) -> list[str]:
        """Identifiers of the edits in the weights, in order."""
        return [name for written in self.written for name in written.names]

    @property
    def change(self) -> float:
        """Frobenius norm of the change of the layers in use together, relative to their original weights."""
        changes, originals = zip(*(self.at(layer).norms for layer in self.used), strict=True)
        return math.hypot(*changes) / math.hypot(*originals)

    @property
    def spectral_change(self) -> float:
        """Largest singular value of a layer's change, relative to that of its original weight; the largest of all."""
        return max(change / original for change, original in (weight.spectral_norms() for weight in self.weights))

    @property
    def finite(self) -> bool:
        """Whether every entry of the weights is a finite number."""
        return all(bool(weight.site.weight.isfinite().all()) for weight in self.weights)

    @property
    def pending(self) -> bool:
        """Whether a write awaits its verdict."""
        return any(weight.pending for weight in self.weights)

    def specificity(self, layers: Sequence[int], keys: Sequence[Tensor]) -> tuple[float, ...]:
        """How much more specific keys are than an ordinary token of text, layer by layer: ``kᵀ C⁻¹ k / d_key``.

        Its mean over the text of the second moment is 1. An edit disturbs that text the more, the lower it is.

        Args:
            layers: Some layers.
            keys: A key of each, ``[d_key]``.

        Returns:
            A number for each layer; none where the metric is the identity.
        """
        moments = dict(zip(self.numbers, self.moments, strict=False))
        pairs = [(moments[layer], key) for layer, key in zip(layers, keys, strict=True) if moments]
        return tuple(float(moment.solve(key.unsqueeze(0))[0] @ key.double()) / len(key) for moment, key in pairs)

    def disturbance(self, written: EditWrite) -> float | None:
        """How much a write changes what a layer gives at the tokens of ordinary text; the largest over the layers.

        The root mean square of ``ΔW k`` over the text of the second moment, relative to that of the original ``W k``:
        ``(tr ΔW C ΔWᵀ / tr W C Wᵀ)^½``.

        Args:
            written: The write, of one edit or of several.

        Returns:
            The ratio; ``None`` where the metric is the identity, and there is no text.
        """
        ratios = []
        for layer, moment, whole in zip(self.numbers, self.moments, self._output_squares, strict=False):
            if layer not in written.layers:
                continue
            update = written.layers[layer].update
            left, right = update.left.to(moment.matrix.device), update.right.to(moment.matrix.device)
            ratios.append(float(((left @ left.T) * (moment.apply(right) @ right.T)).sum()) / whole)
        return math.sqrt(max(ratios)) if ratios else None

    def anchored(self, layer: int, assertion: Assertion, norm: float) -> Assertion:
        """Values rescaled to a norm that the original model gives (norm anchors, Liu et al. 2026).

        Where later values are searched on top of earlier ones and keep growing, this ends it.

        Args:
            layer: Which layer.
            assertion: What edits assert there.
            norm: Norm of each value without the projection's bias, in root mean squares of the original ``W k`` over
                the text of the layer's second moment, ``(tr W C Wᵀ)^½``.
        """
        value, bias = assertion.value.double(), self.at(layer).site.bias
        square = self._output_squares[self.numbers.index(layer)]
        shift = torch.zeros_like(value[0]) if bias is None else bias.detach().to(value)
        apart = value - shift
        lengths = apart.norm(dim=1, keepdim=True).clamp(min=torch.finfo(value.dtype).tiny)
        return replace(assertion, value=shift + apart * (norm * math.sqrt(square) / lengths))

    @cached_property
    def _output_squares(self) -> list[float]:
        """Mean squared norm of each layer's original outputs, bias apart, over the text of its second moment."""
        pairs = [
            (weight.site.matrix(weight.original).to(moment.matrix), moment)
            for weight, moment in zip(self.weights, self.moments, strict=False)
        ]
        return [float((moment.apply(matrix) * matrix).sum()) for matrix, moment in pairs]

    def resume(self) -> None:
        """Take up the weights where they were left; see :meth:`EditedWeight.resume`."""
        for weight in self.weights:
            weight.resume()

    def propose(self, name: str, assertions: LayerAssertions) -> EditWrite:
        """What :meth:`write` would write for one edit, without writing it; raises as that does."""
        return self._each([name], assertions, lambda weight, names, asked: weight.propose(names[0], asked))

    def write(self, names: Sequence[str], assertions: LayerAssertions) -> EditWrite:
        """Write edits, jointly if they are several; they stay pending until :meth:`commit`, or :meth:`revert`.

        Args:
            names: Their identifiers.
            assertions: What they assert; asked layer by layer, when the layers below are written.

        Raises:
            DisablingEditError: If an update would explode; nothing is written.
            ValueError: If an update is not finite, or an edit of that name is in; nothing is written.
        """
        try:
            written = self._each(names, assertions, EditedWeight.write)
        except BaseException:
            for weight in self.weights:
                weight.revert()
            raise
        self.written.append(written)
        return written

    def _each(
        self,
        names: Sequence[str],
        assertions: LayerAssertions,
        make: Callable[[EditedWeight, Sequence[str], Assertion], LayerWrite],
    ) -> EditWrite:
        made: dict[int, LayerWrite] = {}
        for layer, weight in zip(self.numbers, self.weights, strict=True):
            asked = assertions.at(layer, {below: written.update for below, written in made.items()})
            if asked is not None:
                try:
                    made[layer] = make(weight, *asked)
                except DisablingEditError as error:  # it counts the edits of this layer
                    raise DisablingEditError(str(error), names.index(asked[0][error.row])) from error
        return EditWrite(tuple(names), made)

    def restore(self, written: EditWrite) -> None:
        """Take up a write that an earlier run has made, without solving it again."""
        for layer, part in written.layers.items():
            self.at(layer).restore(part)
        self.written.append(written)

    def commit(self) -> None:
        """Keep the pending write."""
        for weight in self.weights:
            weight.commit()

    def revert(self) -> None:
        """Take the pending write back, if there is one; the weights are bit for bit what they were before."""
        if self.pending:
            self.written.pop()
        for weight in self.weights:
            weight.revert()

    def remove(self, names: Collection[str]) -> None:
        """Undo edits by name, replaying the others in order on the original weights.

        Raises:
            KeyError: If a name was not written.
            DisablingEditError: If another edit's update would explode then; nothing is changed.
        """
        missing = set(names) - set(self.names)
        if missing:
            raise KeyError(f"not written, or undone already: {sorted(missing)}")
        replayed = [weight.without(names) for weight in self.weights]
        anew = {layer: iter(found.written) for layer, found in zip(self.numbers, replayed, strict=True)}
        remaining: list[EditWrite] = []
        for written in self.written:
            # A layer whose edits of this write are all gone has no write in its place.
            left = [layer for layer, part in written.layers.items() if set(part.names) - set(names)]
            if left:
                kept = tuple(name for name in written.names if name not in names)
                remaining.append(EditWrite(kept, {layer: next(anew[layer]) for layer in left}))
        for weight, found in zip(self.weights, replayed, strict=True):
            weight.adopt(found)
        self.written = remaining

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """The original weights inside; the edited ones after, whatever happens."""
        with ExitStack() as stack:
            for weight in self.weights:
                stack.enter_context(weight.unedited())
            yield
