r"""The closed form of a weight edit, and its published variants as settings of one formula.

The columns of :math:`K_u` are the keys that shape the update, those of :math:`K_*` the keys at which values are
asserted. With asserted outputs :math:`V_*` (bias included), metric :math:`M` and ridge :math:`\lambda`:

.. math:: \Delta W = R\,(K_u^\top M K_* + \lambda I)^{-1} K_u^\top M, \qquad R = V_* - (W K_* + b)

ROME (Meng et al. 2022, Eq. 2) has :math:`M = C^{-1}` and one key; with :math:`\lambda = 0` the edited projection gives
:math:`V_*` at :math:`K_*` exactly. Everything here is float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rome_pl.errors import RomeError

__all__ = ["Assertion", "DisablingEditError", "NotFiniteError", "Update", "rank_one_update"]


MIN_COSINE = 1e-3
"""Smallest cosine, under the metric, of two different keys of an edit: below it the update would explode."""


MIN_PIVOT = 1e-3
"""Smallest sine, under the metric, between a key and the span of the keys before it in a joint solve."""


class NotFiniteError(ValueError):
    """An update with numbers that are not finite."""


class DisablingEditError(RomeError):
    """An edit whose update would have an exploding norm.

    Args:
        message: The reason.
        row: Index of the edit in a joint solve.
    """

    def __init__(self, message: str, row: int = 0) -> None:
        super().__init__(message)
        self.row = row


@dataclass(frozen=True)
class Assertion:
    """The assertion of an edit: at key ``at`` the projection's output is ``value``.

    Args:
        shape: Keys that shape the update, ``[n, d_key]``.
        at: Keys at which the values hold, ``[n, d_key]``.
        value: Asserted outputs, bias included, ``[n, d_value]``.
        ridge: The λ of the formula.
    """

    shape: Tensor
    at: Tensor
    value: Tensor
    ridge: float = 0.0

    @classmethod
    def joint(cls, assertions: Sequence["Assertion"]) -> "Assertion":
        """Join several assertions, to be solved together."""
        assert len({assertion.ridge for assertion in assertions}) == 1
        return cls(
            shape=torch.cat([assertion.shape for assertion in assertions]),
            at=torch.cat([assertion.at for assertion in assertions]),
            value=torch.cat([assertion.value for assertion in assertions]),
            ridge=assertions[0].ridge,
        )

    def rows(self, rows: Sequence[int]) -> "Assertion":
        """Select some of its edits."""
        index = list(rows)
        return Assertion(self.shape[index], self.at[index], self.value[index], self.ridge)

    def to(self, device: torch.device) -> "Assertion":
        """The same assertion on a device."""
        return Assertion(self.shape.to(device), self.at.to(device), self.value.to(device), self.ridge)


@dataclass(frozen=True)
class Update:
    """A weight change in factors: ``left.T @ right``.

    Args:
        left: ``[n, d_value]``, float64.
        right: ``[n, d_key]``, float64.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def joint(cls, updates: Sequence["Update"]) -> "Update":
        """Join several updates."""
        return cls(torch.cat([update.left for update in updates]), torch.cat([update.right for update in updates]))

    def to(self, device: torch.device) -> "Update":
        """The same update on a device."""
        return Update(self.left.to(device), self.right.to(device))

    def added_to(self, weight: Tensor) -> Tensor:
        """Return the changed weight. Adding the same updates in the same order gives the same bits.

        Args:
            weight: ``[d_value, d_key]``, float64.
        """
        return torch.addmm(weight, self.left.T, self.right)

    @property
    def norm(self) -> float:
        """Frobenius norm of the change, from the factors alone."""
        gram = (self.left @ self.left.T) * (self.right @ self.right.T)
        return float(gram.sum().clamp(min=0).sqrt())


def rank_one_update(
    weight: Tensor, bias: Tensor | None, assertion: Assertion, metric: Callable[[Tensor], Tensor]
) -> Update:
    """Solve for the change that asserts the values.

    Args:
        weight: ``[d_value, d_key]``, float64.
        bias: ``[d_value]`` or ``None``.
        assertion: Keys and values, on the weight's device.
        metric: Applies the symmetric ``M`` to keys ``[n, d_key]``.

    Returns:
        The factors ``left`` = solved residuals and ``right`` = :math:`K_u^T M`, scaled so that a single edit's
        ``left`` is the residual itself.

    Raises:
        DisablingEditError: If the shaping and asserted keys differ and are nearly orthogonal under the metric, the
            keys of a joint solve are nearly linearly dependent, or the metric knows nothing of a key.
        ValueError: If they differ in a joint solve, whose inner matrix is then not symmetric.
    """
    shape, at = assertion.shape.double(), assertion.at.double()
    residual = assertion.value.double() - at @ weight.T
    if bias is not None:
        residual = residual - bias.double()
    directions = metric(shape)
    lost = shape.any(1) & ~directions.any(1)
    if bool(lost.any()):
        raise DisablingEditError(
            "the router picks only experts there that nothing can be written into: they got too little text for a "
            "second moment (compute it from more: mom2_n_samples), or have no null space (give a larger "
            "nullspace_threshold)",
            row=int(lost.nonzero()[0]),
        )
    inner = directions @ at.T
    if torch.equal(shape, at):
        inner = (inner + inner.T) / 2 + assertion.ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        # With unit diagonal the pivots are sines; the solve is the same.
        scale = inner.diagonal().clamp(min=torch.finfo(inner.dtype).tiny).rsqrt()
        factor, _ = torch.linalg.cholesky_ex(inner * scale * scale.unsqueeze(1))
        sound = factor.diagonal() >= MIN_PIVOT  # False for NaN too
        if not bool(sound.all()) and len(inner) == 1:
            raise DisablingEditError("the key is zero or not finite under the metric: nothing can be written there")
        if not bool(sound.all()):
            raise DisablingEditError(
                "its key is all but a combination of the keys of other edits of its batch, which ask for other values: "
                "the update would explode. Make the edits one after the other (data.batch_size: 1)",
                row=int((~sound).nonzero()[0]),
            )
        right = scale.unsqueeze(1) * torch.cholesky_solve(scale.unsqueeze(1) * directions, factor)
        return Update(left=residual, right=right)
    if len(shape) != 1:
        raise ValueError("keys that shape an update may differ from those it asserts for one edit at a time only")
    scale = ((directions * shape).sum() * (metric(at) * at).sum()).sqrt()
    cosine = float(inner / scale)
    if not abs(cosine) >= MIN_COSINE:
        raise DisablingEditError(
            f"the mean key and the bare prompt's key are all but orthogonal under the metric (cosine {cosine:.1e}): "
            "the update would explode. Use preset r_rome, which asserts the value at the mean key"
        )
    return Update(left=residual, right=directions / (inner + assertion.ridge))
