r"""The closed form of a weight edit, and its published variants as settings of one formula.

With keys that shape the update in the columns of :math:`K_u`, keys at which values are asserted in those of
:math:`K_*`, wanted outputs :math:`V_*` (bias included), metric :math:`M` and ridge :math:`\lambda`:

.. math:: \Delta W = R\,(K_u^\top M K_* + \lambda I)^{-1} K_u^\top M, \qquad R = V_* - (W K_* + b)

ROME (Meng et al. 2022, Eq. 2) has :math:`M = C^{-1}` and one key; with :math:`\lambda = 0` the edited projection gives
:math:`V_*` at :math:`K_*` exactly. Everything here is float64.
"""

from collections.abc import Callable, Sequence
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
    "NotFiniteError",
    "Preset",
    "PresetName",
    "Update",
    "balance",
    "rank_one_update",
]

KeyChoice = Literal["mean", "bare", "balanced"]
"""Which key: the mean over contexts, the one of the bare prompt, or the one between them of :func:`balance`."""


@dataclass(frozen=True)
class Preset:
    """A published variant.

    Args:
        shape: The key that shapes the update, ``K_u``.
        at: The key at which the value is asserted, ``K_*``.
        mom2_adjustment: Whether the metric is made of the second moment; otherwise it is the identity.
        value: The value asserted: ``bare``, the optimised offset on top of the bare prompt's output, as published; or
            ``own``, on top of the output at the asserted key, so that the residual is the offset itself.
        metric: How the second moment is used.
        ridge: λ.
        mom2_update_weight: ``n_0``: how many keys the second moment counts for, against λ or the keys of other edits.
        shares: How several layers share an offset, see :mod:`rome_pl.spread`: evenly, or each as much as its key is
            specific.
    """

    shape: KeyChoice
    at: KeyChoice
    mom2_adjustment: bool
    value: Literal["bare", "own"] = "bare"
    metric: Literal["second_moment", "past_keys", "null_space"] = "second_moment"
    ridge: float = 0.0
    mom2_update_weight: float = 1.0
    shares: Literal["even", "specific"] = "even"


PresetName = Literal[
    "rome", "r_rome", "p_rome", "balanced", "easyedit", "emmet", "memit", "accumulated", "alphaedit", "lifelong"
]

PRESETS: dict[PresetName, Preset] = {
    # Meng et al. 2022, as their public code does it: the residual is taken at the bare prompt's key.
    "rome": Preset(shape="mean", at="bare", mom2_adjustment=True),
    # Gupta et al. 2024, "Rebuilding ROME": one key everywhere.
    "r_rome": Preset(shape="mean", at="mean", mom2_adjustment=True),
    # The same paper: the bare prompt's key everywhere.
    "p_rome": Preset(shape="bare", at="bare", mom2_adjustment=True),
    # Ours: the offset as it was optimised, added in full under the bare prompt and under the other contexts alike.
    "balanced": Preset(shape="balanced", at="balanced", mom2_adjustment=True, value="own"),
    # EasyEdit's shipped settings: ROME's keys without statistics.
    "easyedit": Preset(shape="mean", at="bare", mom2_adjustment=False),
    # Gupta et al. 2024, "A Unified Framework for Model Editing", Eq. 10; λ and n_0 as in their settings for GPT-2 XL.
    "emmet": Preset(shape="mean", at="mean", mom2_adjustment=True, value="own", ridge=0.1, mom2_update_weight=1000.0),
    # Meng et al. 2023, Eq. 14 and Algorithm 1; n_0 as published for GPT-J.
    "memit": Preset(shape="mean", at="mean", mom2_adjustment=True, value="own", ridge=1.0, mom2_update_weight=15000.0),
    # ROME by recursive least squares: keys of earlier edits join the metric, and are disturbed as little as text.
    "accumulated": Preset(
        shape="mean", at="mean", mom2_adjustment=True, value="own", metric="past_keys", mom2_update_weight=1000.0
    ),
    # Fang et al. 2025, Eq. 14.
    "alphaedit": Preset(shape="mean", at="mean", mom2_adjustment=True, value="own", metric="null_space", ridge=1.0),
    # Ours, for long streams: balanced keys in the metric of "accumulated", and shares that disturb text least.
    "lifelong": Preset(
        shape="balanced",
        at="balanced",
        mom2_adjustment=True,
        value="own",
        metric="past_keys",
        mom2_update_weight=1000.0,
        shares="specific",
    ),
}
assert set(PRESETS) == set(get_args(PresetName))


def balance(bare: Tensor, contexts: Tensor, metric: Callable[[Tensor], Tensor]) -> float:
    r"""How much of the bare prompt's key to mix with that of the other contexts for an update to reach both in full.

    An update shaped by :math:`k = w k_0 + (1 - w) k_c` acts at a key in proportion to its product with
    :math:`k` under the metric. These products are equal at both keys for

    .. math:: w = \frac{-k_c^\top M (k_0 - k_c)}{(k_0 - k_c)^\top M (k_0 - k_c)}

    Where the first token of a text takes the place of a BOS, a subject that opens the prompt has a key :math:`k_0` far
    from :math:`k_c`, and the even mean leaves one of them half edited.

    Args:
        bare: Key of the bare prompt, ``[d_key]``.
        contexts: Mean key of the other contexts, ``[d_key]``.
        metric: Applies the symmetric ``M`` to keys ``[n, d_key]``.

    Returns:
        The share, in [0, 1].
    """
    difference = (bare - contexts).double()
    direction = metric(difference.unsqueeze(0))[0]
    length = float(difference @ direction)
    if not length > 0:  # one key: any mixture is the same
        return 0.5
    return min(1.0, max(0.0, float(-(contexts.double() @ direction)) / length))


MIN_COSINE = 1e-3
"""Mixed keys whose cosine under the metric is smaller are refused: the update would explode."""


MIN_PIVOT = 1e-3
"""In a joint solve a key is refused whose sine to the span of the keys before it, under the metric, is smaller."""


class NotFiniteError(ValueError):
    """An update that holds numbers that are not finite."""


class DisablingEditError(RomeError):
    """An edit whose update's norm would explode.

    Args:
        message: What is wrong.
        row: Which edit of a joint solve it is.
    """

    def __init__(self, message: str, row: int = 0) -> None:
        super().__init__(message)
        self.row = row


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

    @classmethod
    def joint(cls, assertions: Sequence["Assertion"]) -> "Assertion":
        """Several assertions as one, to be solved together."""
        assert len({assertion.ridge for assertion in assertions}) == 1
        return cls(
            shape=torch.cat([assertion.shape for assertion in assertions]),
            at=torch.cat([assertion.at for assertion in assertions]),
            value=torch.cat([assertion.value for assertion in assertions]),
            ridge=assertions[0].ridge,
        )

    def rows(self, rows: Sequence[int]) -> "Assertion":
        """Some of its edits."""
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
        """Several updates as one."""
        return cls(torch.cat([update.left for update in updates]), torch.cat([update.right for update in updates]))

    def to(self, device: torch.device) -> "Update":
        """The same update on a device."""
        return Update(self.left.to(device), self.right.to(device))

    def added_to(self, weight: Tensor) -> Tensor:
        """The changed weight. Whoever adds the same updates one after the other gets the same bits.

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
        DisablingEditError: If the shaping and asserted keys differ and are all but orthogonal under the metric, or in
            a joint solve the keys are all but linearly dependent.
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
