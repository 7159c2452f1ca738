r"""The closed form of a weight edit, and its published variants as settings of one formula.

With keys that shape the update in the columns of :math:`K_u`, keys at which values are asserted in those of
:math:`K_*`, wanted outputs :math:`V_*` (bias included), metric :math:`M` and ridge :math:`\lambda`:

.. math:: \Delta W = R\,(K_u^\top M K_* + \lambda I)^{-1} K_u^\top M, \qquad R = V_* - (W K_* + b)

ROME (Meng et al. 2022, Eq. 2) has :math:`M = C^{-1}` and one key; with :math:`\lambda = 0` the edited projection gives
:math:`V_*` at :math:`K_*` exactly. Everything here is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rome_pl.errors import RomeError

__all__ = [
    "PRESETS",
    "Assertion",
    "DisablingEditError",
    "KeyChoice",
    "Preset",
    "PresetName",
    "Update",
    "rank_one_update",
]

KeyChoice = Literal["mean", "bare"]
"""Which key: the mean over contexts, or the one of the bare prompt."""


@dataclass(frozen=True)
class Preset:
    """A published variant.

    Args:
        shape: The key that shapes the update, ``K_u``.
        at: The key at which the value is asserted, ``K_*``.
        mom2_adjustment: Whether the metric is the inverse second moment; otherwise the identity.
    """

    shape: KeyChoice
    at: KeyChoice
    mom2_adjustment: bool


PresetName = Literal["rome", "r_rome", "easyedit"]

PRESETS: dict[PresetName, Preset] = {
    # Meng et al. 2022, as their public code does it: the residual is taken at the bare prompt's key.
    "rome": Preset(shape="mean", at="bare", mom2_adjustment=True),
    # Gupta et al. 2024, "Rebuilding ROME": one key everywhere.
    "r_rome": Preset(shape="mean", at="mean", mom2_adjustment=True),
    # EasyEdit's shipped settings: ROME's keys without statistics.
    "easyedit": Preset(shape="mean", at="bare", mom2_adjustment=False),
}
assert set(PRESETS) == set(get_args(PresetName))

MIN_COSINE = 1e-3
"""Mixed keys whose cosine under the metric is smaller are refused: the update would explode."""


class DisablingEditError(RomeError):
    """The two keys are all but orthogonal under the metric, so the update's norm would explode."""


@dataclass(frozen=True)
class Assertion:
    """What an edit asserts: at key ``at`` the projection's output is ``value``.

    Args:
        shape: Keys that shape the update, ``[n, d_key]``.
        at: Keys at which the values hold, ``[n, d_key]``.
        value: Wanted outputs, bias included, ``[n, d_value]``.
        ridge: The λ of the formula.
    """

    shape: Tensor
    at: Tensor
    value: Tensor
    ridge: float = 0.0

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
        DisablingEditError: If the shaping and asserted keys differ and are all but orthogonal under the metric.
        ValueError: If they differ for more than one edit at a time, for which the inner matrix is not symmetric.
    """
    shape, at = assertion.shape.double(), assertion.at.double()
    residual = assertion.value.double() - at @ weight.T
    if bias is not None:
        residual = residual - bias.double()
    directions = metric(shape)
    inner = directions @ at.T
    if torch.equal(shape, at):
        inner = (inner + inner.T) / 2 + assertion.ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        factor = torch.linalg.cholesky(inner)
        return Update(left=residual, right=torch.cholesky_solve(directions, factor))
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
