"""All weights being edited: an edit writes into each rewrite layer, the lower ones first.

Each layer is a weight of its own with its own metric, and is replayed by itself: what an edit asserts there is fixed
when it is first written.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rome_pl.rank_one import Assertion, Update
from rome_pl.second_moment import SecondMoment
from rome_pl.weights import EditedWeight, LayerWrite

__all__ = ["Ask", "EditedLayers", "Written"]

Ask = Callable[[int, Sequence[Update]], Assertion]
"""What is asserted at the layer of a place, 0 for the lowest, given the changes of the layers below it."""


@dataclass(frozen=True)
class Written:
    """One write, of one edit or of several solved jointly, into every rewrite layer.

    Args:
        layers: The write into each layer, the lowest first.
    """

    layers: tuple[LayerWrite, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Identifiers of its edits."""
        return self.layers[0].names

    @property
    def assertions(self) -> tuple[Assertion, ...]:
        """What is asserted at each layer."""
        return tuple(written.assertion for written in self.layers)

    @property
    def updates(self) -> tuple[Update, ...]:
        """The change of each layer."""
        return tuple(written.update for written in self.layers)

    @property
    def norm(self) -> float:
        """Frobenius norm of the changes of all layers together."""
        return math.hypot(*(update.norm for update in self.updates))

    @property
    def realised(self) -> tuple[float, ...]:
        """For each edit the least of :attr:`LayerWrite.realised` over the layers."""
        return tuple(min(shares) for shares in zip(*(written.realised for written in self.layers), strict=True))

    def same_as(self, other: "Written") -> bool:
        """Whether it changes the weights by the same bits."""
        return all(one.same_as(two) for one, two in zip(self.layers, other.layers, strict=True))

    def part(self, name: str) -> "Written":
        """One edit's rows of a joint write."""
        return Written(tuple(written.part(name) for written in self.layers))

    def to(self, device: torch.device) -> "Written":
        """The same on a device."""
        return Written(tuple(written.to(device) for written in self.layers))


class EditedLayers:
    """The rewrite layers' weights with their edits.

    Args:
        weights: The weights, the lowest layer's first.
        moments: The second moment of each layer's keys; none where the metric is the identity.
    """

    def __init__(self, weights: Sequence[EditedWeight], moments: Sequence[SecondMoment] = ()) -> None:
        self.weights, self.moments = tuple(weights), tuple(moments)
        self.written: list[Written] = []

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def last(self) -> EditedWeight:
        """The weight of the layer at which offsets are searched."""
        return self.weights[-1]

    @property
    def numbers(self) -> list[int]:
        """The rewrite layers, numbered from 0."""
        return [weight.site.layer for weight in self.weights]

    @property
    def names(self) -> list[str]:
        """Identifiers of the edits in the weights, in order."""
        return self.weights[0].names

    @property
    def change(self) -> float:
        """Frobenius norm of the change of all layers together, relative to their original weights."""
        changes, originals = zip(*(weight.norms for weight in self.weights), strict=True)
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
        return self.weights[-1].pending

    def specificity(self, keys: Sequence[Tensor]) -> tuple[float, ...]:
        """How much more specific keys are than an ordinary token of text, layer by layer: ``kᵀ C⁻¹ k / d_key``.

        Its mean over the text of the second moment is 1. An edit disturbs that text the more, the lower it is.

        Args:
            keys: A key of each layer, ``[d_key]``.

        Returns:
            A number for each layer; none where the metric is the identity.
        """
        pairs = zip(self.moments, keys, strict=False)
        return tuple(float(moment.solve(key.unsqueeze(0))[0] @ key.double()) / len(key) for moment, key in pairs)

    def disturbance(self, written: Written) -> float | None:
        """How much a write changes what a layer gives at the tokens of ordinary text; the largest over the layers.

        The root mean square of ``ΔW k`` over the text of the second moment, relative to that of the original ``W k``:
        ``(tr ΔW C ΔWᵀ / tr W C Wᵀ)^½``.

        Args:
            written: The write, of one edit or of several.

        Returns:
            The ratio; ``None`` where the metric is the identity, and there is no text.
        """
        ratios = []
        for moment, whole, update in zip(self.moments, self._output_squares, written.updates, strict=False):
            left, right = update.left.to(moment.matrix.device), update.right.to(moment.matrix.device)
            ratios.append(float(((left @ left.T) * (right @ moment.matrix @ right.T)).sum()) / whole)
        return math.sqrt(max(ratios)) if ratios else None

    def anchored(self, place: int, assertion: Assertion, norm: float) -> Assertion:
        """Values rescaled to a norm that the original model gives (norm anchors, Liu et al. 2026).

        Where later values are searched on top of earlier ones and keep growing, this ends it.

        Args:
            place: Which layer, 0 for the lowest.
            assertion: What edits assert there.
            norm: Norm of each value without the projection's bias, in root mean squares of the original ``W k`` over
                the text of the layer's second moment, ``(tr W C Wᵀ)^½``.
        """
        value, bias = assertion.value.double(), self.weights[place].site.bias
        shift = torch.zeros_like(value[0]) if bias is None else bias.detach().to(value)
        apart = value - shift
        lengths = apart.norm(dim=1, keepdim=True).clamp(min=torch.finfo(value.dtype).tiny)
        return replace(assertion, value=shift + apart * (norm * math.sqrt(self._output_squares[place]) / lengths))

    @cached_property
    def _output_squares(self) -> list[float]:
        """Mean squared norm of each layer's original outputs, bias apart, over the text of its second moment."""
        pairs = [
            (weight.site.matrix(weight.original).to(moment.matrix), moment.matrix)
            for weight, moment in zip(self.weights, self.moments, strict=False)
        ]
        return [float(((matrix @ second) * matrix).sum()) for matrix, second in pairs]

    def resume(self) -> None:
        """Take up the weights where they were left; see :meth:`EditedWeight.resume`."""
        for weight in self.weights:
            weight.resume()

    def propose(self, name: str, ask: Ask) -> Written:
        """What :meth:`write` would write for one edit, without writing it; raises as that does."""
        made: list[LayerWrite] = []
        for place, weight in enumerate(self.weights):
            made.append(weight.propose(name, ask(place, [written.update for written in made])))
        return Written(tuple(made))

    def write(self, names: Sequence[str], ask: Ask) -> Written:
        """Write edits, jointly if they are several; they stay pending until :meth:`commit`, or :meth:`revert`.

        Args:
            names: Their identifiers.
            ask: Tells what they assert, a row each; asked layer by layer, the layers below being written then.

        Raises:
            DisablingEditError: If an update would explode; nothing is written.
            ValueError: If an update is not finite, or an edit of that name is in; nothing is written.
        """
        made: list[LayerWrite] = []
        try:
            for place, weight in enumerate(self.weights):
                made.append(weight.write(names, ask(place, [written.update for written in made])))
        except BaseException:
            for weight in self.weights:
                weight.revert()
            raise
        self.written.append(Written(tuple(made)))
        return self.written[-1]

    def restore(self, written: Written) -> None:
        """Take up a write that an earlier run has made, without solving it again."""
        for weight, part in zip(self.weights, written.layers, strict=True):
            weight.restore(part)
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
        for weight, found in zip(self.weights, replayed, strict=True):
            weight.adopt(found)
        self.written = [Written(parts) for parts in zip(*(weight.written for weight in self.weights), strict=True)]

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """The original weights inside; the edited ones after, whatever happens."""
        with ExitStack() as stack:
            for weight in self.weights:
                stack.enter_context(weight.unedited())
            yield
