"""One edited weight: a float64 master that is rounded once into the model, and can be restored bit for bit.

The state is the original weight and the ordered list of writes, each of one edit or of several solved jointly. A subset
is undone by replaying the closed form for the others: later updates were solved against a weight that contained the
undone ones.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rome_pl.model.architecture import RewriteSite
from rome_pl.write.closed_form import Assertion, NotFiniteError, Update, rank_one_update
from rome_pl.write.key_metric import KeyMetric, PlainMetric

__all__ = ["EditedWeight", "LayerWrite"]


NOTHING = 1e-12
"""A smaller change, relative to the value, counts as rounding and cannot be lost."""

POWER_STEPS = 30
"""Steps of power iteration: enough for two digits of the largest singular value."""


def _largest_singular_value(matrix: Tensor) -> float:
    vector = torch.ones(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(POWER_STEPS):
        vector = matrix.T @ (matrix @ vector)
        vector /= vector.norm().clamp(min=torch.finfo(matrix.dtype).tiny)
    return float((matrix @ vector).norm())


@dataclass(frozen=True)
class LayerWrite:
    """One write into one layer, of one edit or of several solved jointly.

    Args:
        names: Identifiers of its n edits.
        assertion: Their assertions, one row each.
        update: The resulting change of the master, in n factors.
        realised: For each edit the share of the intended change at its key that survives rounding to the model's dtype:
            the projection of the actual change onto the intended one. 1: nothing is lost.
    """

    names: tuple[str, ...]
    assertion: Assertion
    update: Update
    realised: tuple[float, ...]

    def same_as(self, other: "LayerWrite") -> bool:
        """Whether both change the weight by the same bits."""
        pairs = ((self.update.left, other.update.left), (self.update.right, other.update.right))
        return self.names == other.names and all(one.equal(two.to(one.device)) for one, two in pairs)

    def part(self, name: str) -> "LayerWrite":
        """Return one edit's rows of a joint write."""
        row = self.names.index(name)
        only = slice(row, row + 1)
        return LayerWrite(
            names=(name,),
            assertion=self.assertion.rows([row]),
            update=Update(self.update.left[only], self.update.right[only]),
            realised=(self.realised[row],),
        )

    def to(self, device: torch.device) -> "LayerWrite":
        """The same on a device."""
        return LayerWrite(self.names, self.assertion.to(device), self.update.to(device), self.realised)


@dataclass(frozen=True)
class Replayed:
    """A computed weight that is not in use yet.

    Args:
        master: The float64 master, ``[d_value, d_key]``.
        written: Its writes.
        metric: The metric after them.
    """

    master: Tensor
    written: list[LayerWrite]
    metric: KeyMetric


class EditedWeight:
    """A rewrite site's weight with its edits.

    Args:
        site: The projection.
        metric: The metric, or a function that applies it to keys ``[n, d_key]``.
    """

    def __init__(self, site: RewriteSite, metric: KeyMetric | Callable[[Tensor], Tensor]) -> None:
        self.site = site
        self.metric = metric if isinstance(metric, KeyMetric) else PlainMetric(metric)
        self.written: list[LayerWrite] = []
        self._original = site.weight.detach().clone()
        self._master = site.matrix(self._original).double()
        self._before_pending: Tensor | None = None

    def resume(self) -> None:
        """Continue with the weight after the model may have moved to another device.

        Raises:
            RuntimeError: If the weight was changed from outside.
        """
        device = self.site.weight.device
        self._original, self._master = self._original.to(device), self._master.to(device)
        if not torch.equal(self.site.weight, self._stored()):
            raise RuntimeError(
                f"{self.site.name} was changed from outside since its last edit: the edits made so far could not be "
                "undone any more. Start a new module (or KnowledgeEditor) from the model as it is"
            )

    @property
    def change(self) -> float:
        """Frobenius norm of the master's change, relative to the original weight."""
        change, original = self.norms
        return change / original

    @property
    def norms(self) -> tuple[float, float]:
        """Frobenius norms of the master's change and of the original weight."""
        original = self.site.matrix(self._original).double()
        return float((self._master - original).norm()), float(original.norm())

    def propose(self, name: str, assertion: Assertion) -> LayerWrite:
        """Return the write that :meth:`write` would make, without writing it.

        Raises:
            DisablingEditError: If the update would explode.
            ValueError: If the update is not finite.
        """
        return self._solve(self._master, (name,), assertion, self.metric)[1]

    def write(self, names: Sequence[str], assertion: Assertion) -> LayerWrite:
        """Write edits, several of them jointly. They stay pending until :meth:`commit` or :meth:`revert`.

        Args:
            names: Their identifiers.
            assertion: What they assert, a row each.

        Raises:
            DisablingEditError: If the update would explode. Nothing is written.
            ValueError: If the update is not finite, or an edit of that name is in the weight. Nothing is written.
        """
        assert self._before_pending is None, "the last write is neither committed nor reverted"
        for name in names:
            if name in self.names:
                raise ValueError(f"edit {name} is in the weight already; undo it first, or give another case_id")
        master, written = self._solve(self._master, tuple(names), assertion, self.metric)
        self._before_pending, self._master = self._master, master
        self.written.append(written)
        self._store()
        return written

    def weaker(self, assertion: Assertion, strength: float | Tensor) -> Assertion:
        """Return an assertion that asks for a part of an assertion's present change.

        Args:
            assertion: The assertion of n edits.
            strength: The part, one number for all or ``[n, 1]``.
        """
        assertion = assertion.to(self._master.device)
        now = assertion.at.double() @ self._master.T
        if self.site.bias is not None:
            now = now + self.site.bias.double()
        return replace(assertion, value=now + strength * (assertion.value.double() - now))

    @torch.no_grad()
    def bounded(self, assertion: Assertion, largest: float) -> tuple[Assertion, list[float]]:
        """Weaken an assertion so that no edit asks for too large a change.

        Args:
            assertion: The assertion of n edits.
            largest: Largest Frobenius norm of an edit's own change, relative to the original weight.

        Returns:
            The assertion, and for each edit the part of its change that is left.

        Raises:
            DisablingEditError: If the update would explode.
        """
        assertion = assertion.to(self._master.device)
        update = rank_one_update(self._master, self.site.bias, assertion, self.metric)
        norms = update.left.norm(dim=1) * update.right.norm(dim=1)
        strengths = (largest * self.norms[1] / norms).clamp(max=1.0)
        if bool((strengths == 1).all()):
            return assertion, strengths.tolist()
        return self.weaker(assertion, strengths.unsqueeze(1)), strengths.tolist()

    @torch.no_grad()
    def spectral_norms(self) -> tuple[float, float]:
        """Compute the largest singular values of the master's change and of the original weight, by power iteration."""
        original = self.site.matrix(self._original).double()
        return _largest_singular_value(self._master - original), _largest_singular_value(original)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Use the original weight inside; restore the edited one afterwards, even after an exception."""
        weight = self.site.weight
        edited = weight.detach().clone()
        try:
            with torch.no_grad():
                weight.copy_(self._original)
            yield
        finally:
            with torch.no_grad():
                weight.copy_(edited)

    def restore(self, written: LayerWrite) -> None:
        """Apply a write of an earlier run, without solving it again."""
        self._master = written.update.to(self._master.device).added_to(self._master)
        self.metric.remember(written.assertion.shape.to(self._master.device))
        self.written.append(written)
        self._store()

    @property
    def original(self) -> Tensor:
        """The weight without any edit, in the model's own orientation. Do not write to it."""
        return self._original

    @property
    def names(self) -> list[str]:
        """Identifiers of the edits in the weight, in order."""
        return [name for written in self.written for name in written.names]

    @property
    def pending(self) -> bool:
        """Whether a write is neither committed nor reverted."""
        return self._before_pending is not None

    def commit(self) -> None:
        """Keep the pending write."""
        if self._before_pending is not None:
            self.metric.remember(self.written[-1].assertion.shape)
        self._before_pending = None

    def revert(self) -> None:
        """Revert the pending write, if there is one. The weight is restored bit for bit."""
        if self._before_pending is None:
            return
        self._master, self._before_pending = self._before_pending, None
        self.written.pop()
        self._store()

    def remove(self, names: Collection[str]) -> None:
        """Undo edits by name, replaying the others in order on the original weight.

        Raises:
            KeyError: If an edit of that name is not in the weight.
        """
        missing = set(names) - set(self.names)
        if missing:
            raise KeyError(f"not written, or undone already: {sorted(missing)}")
        self.adopt(self.without(names))

    def without(self, names: Collection[str]) -> Replayed:
        """Compute the weight without some edits. Nothing is changed.

        Raises:
            DisablingEditError: If another edit's update would then explode.
        """
        master, metric = self.site.matrix(self._original).double(), self.metric.afresh()
        replayed: list[LayerWrite] = []
        for written in self.written:
            kept = [row for row, name in enumerate(written.names) if name not in names]
            if kept:
                remaining = tuple(written.names[row] for row in kept)
                master, again = self._solve(master, remaining, written.assertion.rows(kept), metric)
                metric.remember(again.assertion.shape)
                replayed.append(again)
        return Replayed(master, replayed, metric)

    def adopt(self, replayed: Replayed) -> None:
        """Use a result of :meth:`without`. A pending write is dropped."""
        self._master, self.written, self.metric = replayed.master, replayed.written, replayed.metric
        self._before_pending = None
        self._store()

    @torch.no_grad()
    def _solve(
        self, master: Tensor, names: tuple[str, ...], assertion: Assertion, metric: KeyMetric
    ) -> tuple[Tensor, LayerWrite]:
        assertion = assertion.to(master.device)  # the model may have moved since the assertion was made
        update = rank_one_update(master, self.site.bias, assertion, metric)
        changed = update.added_to(master)
        if not bool(changed.isfinite().all()):
            raise NotFiniteError(f"edit {', '.join(names)}: the update is not finite")
        at, dtype = assertion.at.double(), self._original.dtype
        wanted = (at @ update.right.T) @ update.left
        wide = torch.promote_types(dtype, torch.float32)  # holds the difference of two rounded weights exactly
        real = at @ (changed.to(dtype).to(wide) - master.to(dtype).to(wide)).double().T
        realised = (real * wanted).sum(1) / (wanted * wanted).sum(1).clamp(min=torch.finfo(torch.float64).tiny)
        nothing = wanted.norm(dim=1) <= NOTHING * assertion.value.double().norm(dim=1)
        realised = torch.where(nothing, 1.0, realised)
        return changed, LayerWrite(names, assertion, update, tuple(realised.tolist()))

    def _stored(self) -> Tensor:
        """The master in the model's dtype and orientation."""
        # Without edits it is the original itself, which the master might round differently.
        return self._original if not self.written else self.site.stored(self._master).to(self._original.dtype)

    def _store(self) -> None:
        with torch.no_grad():
            self.site.weight.copy_(self._stored())
