r"""The metric :math:`M` of the closed form: the directions along which an edit writes, given earlier edits.

Every metric is symmetric. Some include the keys of earlier edits, which are added write by write. They are factorised
again after each write, so that the cost of an edit does not depend on the length of the stream.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from rome_pl.errors import OptionError
from rome_pl.second_moments.second_moment import NULL_SPACE, RIDGE, SecondMoment, per_expert

__all__ = ["ExpertMetric", "KeyMetric", "MetricName", "NullSpace", "PastKeys", "PlainMetric", "make_metric"]

MetricName = Literal["second_moment", "past_keys", "null_space"]
"""How a preset uses the second moment."""


class KeyMetric(ABC):
    """Applies ``M`` to keys.

    ``settings`` are its arguments of :func:`make_metric`, for manifests.
    """

    settings: dict[str, Any]

    @abstractmethod
    def __call__(self, keys: Tensor) -> Tensor:
        """Apply ``M`` to keys ``[n, d_key]``. Returns the same shape in float64."""

    @property
    def fixed(self) -> Callable[[Tensor], Tensor]:
        """The metric without any edit."""
        return self

    @abstractmethod
    def remember(self, keys: Tensor) -> None:
        """Add the keys of a write, ``[n, d_key]``."""

    @abstractmethod
    def afresh(self) -> "KeyMetric":
        """Return the same metric without any write."""


class PlainMetric(KeyMetric):
    """A metric that does not depend on earlier edits.

    Args:
        apply: Applies it to keys ``[n, d_key]``.
    """

    def __init__(self, apply: Callable[[Tensor], Tensor]) -> None:
        self._apply = apply

    @override
    def __call__(self, keys: Tensor) -> Tensor:
        return self._apply(keys)

    @override
    def remember(self, keys: Tensor) -> None:
        pass

    @override
    def afresh(self) -> "KeyMetric":
        return self


class _Remembering(KeyMetric):
    """A metric with the sum ``Σ k kᵀ`` over earlier edits. It is factorised when it is next needed.

    Its matrices are as large as ``C`` and change with every edit, so their memory is reused: the small tensors of each
    edit would fragment the memory for new ones.
    """

    def __init__(self) -> None:
        self._past: Tensor | None = None
        self._matrix: Tensor | None = None
        self._factor: Tensor | None = None
        self._stale = True

    @override
    def remember(self, keys: Tensor) -> None:
        keys = self._seen(keys.double())
        self._past = keys.T @ keys if self._past is None else self._past.addmm_(keys.T, keys)
        self._stale = True

    @override
    def afresh(self) -> "KeyMetric":
        made = copy(self)
        made._past = made._matrix = made._factor = None
        made._stale = True
        return made

    def _factorised(self, past: Tensor) -> Tensor:
        """The Cholesky factor of the matrix whose inverse the metric is."""
        if self._stale or self._factor is None:
            if self._matrix is None or self._factor is None or self._factor.device != past.device:
                self._matrix, self._factor = torch.empty_like(past), torch.empty_like(past)
            self._fill(self._matrix, past)
            torch.linalg.cholesky(self._matrix, out=self._factor)
            self._stale = False
        return self._factor

    @abstractmethod
    def _fill(self, matrix: Tensor, past: Tensor) -> None:
        """Write the matrix whose inverse the metric is."""

    def _seen(self, keys: Tensor) -> Tensor:
        """The part of the keys that is summed."""
        return keys


class PastKeys(_Remembering):
    r"""``M = (n_0 (C + ridge) + Σ_past k kᵀ)⁻¹``: an earlier edit counts as one key of text (recursive least squares).

    Args:
        moment: The second moment ``C``.
        weight: ``n_0``: number of keys of text that ``C`` counts for.
    """

    def __init__(self, moment: SecondMoment, weight: float) -> None:
        super().__init__()
        self._moment, self._weight = moment, weight

    @override
    def __call__(self, keys: Tensor) -> Tensor:
        if self._past is None:
            return self.fixed(keys)
        solved: Tensor = torch.cholesky_solve(keys.double().T, self._factorised(self._past)).T
        return solved

    @override
    def _fill(self, matrix: Tensor, past: Tensor) -> None:
        torch.add(past, self._moment.matrix, alpha=self._weight, out=matrix)
        matrix.diagonal().add_(self._weight * RIDGE * self._moment.matrix.diagonal().mean())

    @property
    @override
    def fixed(self) -> Callable[[Tensor], Tensor]:
        return lambda keys: self._moment.solve(keys) / self._weight


class NullSpace(_Remembering):
    r"""``M = P (Σ_past k kᵀ P + L2·I)⁻¹``, ``P`` projecting onto directions rare in text (Fang et al. 2025, Eq. 14).

    Solved within the space that ``P`` projects onto, where the inner matrix is symmetric and positive definite.

    Args:
        moment: The second moment. Its eigenvectors with eigenvalues below ``threshold`` span that space.
        ridge: ``L2``.
        threshold: Eigenvalues below it belong to the space.

    Raises:
        OptionError: If no eigenvalue is below the threshold: nothing could be written.
    """

    def __init__(self, moment: SecondMoment, ridge: float, threshold: float = NULL_SPACE) -> None:
        super().__init__()
        values, vectors = torch.linalg.eigh(moment.matrix)
        self._basis: Tensor = vectors[:, values < threshold].contiguous()
        self._ridge = ridge
        if self._basis.shape[1] == 0:
            raise OptionError(
                f"nullspace_threshold: no eigenvalue of the second moment is below {threshold:g} (the least is "
                f"{float(values[0]):.2g}), so nothing could be written; give a larger one"
            )

    @override
    def __call__(self, keys: Tensor) -> Tensor:
        inside = keys.double() @ self._basis
        if self._past is None:
            return self.fixed(keys)
        solved: Tensor = torch.cholesky_solve(inside.T, self._factorised(self._past)).T @ self._basis.T
        return solved

    @override
    def _fill(self, matrix: Tensor, past: Tensor) -> None:
        matrix.copy_(past)
        matrix.diagonal().add_(self._ridge)

    @property
    @override
    def fixed(self) -> Callable[[Tensor], Tensor]:
        return lambda keys: (keys.double() @ self._basis) @ self._basis.T / self._ridge

    @override
    def _seen(self, keys: Tensor) -> Tensor:
        return keys @ self._basis


class ExpertMetric(KeyMetric):
    """A metric of its own for each expert of a mixture.

    Keys of earlier edits count for the experts that they reached. So a write changes no expert but those that its own
    key reaches.

    Args:
        experts: The metrics. ``None``: nothing is written into that expert.
    """

    def __init__(self, experts: Sequence[KeyMetric | None]) -> None:
        self._experts = tuple(experts)

    @override
    def __call__(self, keys: Tensor) -> Tensor:
        return per_expert(keys.double(), self._experts)

    @property
    @override
    def fixed(self) -> Callable[[Tensor], Tensor]:
        each = [metric and metric.fixed for metric in self._experts]
        return lambda keys: per_expert(keys.double(), each)

    @override
    def remember(self, keys: Tensor) -> None:
        parts = keys.reshape(len(keys), len(self._experts), -1)
        for expert, metric in enumerate(self._experts):
            own = parts[parts[:, expert].any(1), expert]
            if metric is not None and len(own):
                metric.remember(own)

    @override
    def afresh(self) -> "KeyMetric":
        made = copy(self)
        made._experts = tuple(metric and metric.afresh() for metric in self._experts)
        return made


def make_metric(
    name: MetricName, moment: SecondMoment | None, *, weight: float, ridge: float, threshold: float
) -> KeyMetric:
    """Make the metric of a preset.

    Args:
        name: The kind of metric.
        moment: The second moment. ``None``: the metric is the identity.
        weight: ``n_0``, see :class:`PastKeys`.
        ridge: ``L2``, see :class:`NullSpace`.
        threshold: Eigenvalues below it belong to the null space.

    Raises:
        OptionError: If the preset needs a second moment and there is none.
    """
    if moment is None and name != "second_moment":
        raise OptionError("mom2_adjustment: this preset is made of the second moment and cannot do without it")
    metric: KeyMetric
    if moment is None:
        metric = PlainMetric(lambda keys: keys)
    elif moment.tokens is None:
        metric = _of_one(name, moment, weight, ridge, threshold)
    else:
        metric = ExpertMetric(_of_experts(name, moment, weight, ridge, threshold))
    metric.settings = {"name": name, "weight": weight, "ridge": ridge, "threshold": threshold}
    return metric


def _of_one(name: MetricName, moment: SecondMoment, weight: float, ridge: float, threshold: float) -> KeyMetric:
    if name == "null_space":
        return NullSpace(moment, ridge, threshold)
    if name == "past_keys":
        return PastKeys(moment, weight)
    return PlainMetric(moment.solve if weight == 1 else lambda keys: moment.solve(keys) / weight)


def _of_experts(
    name: MetricName, moment: SecondMoment, weight: float, ridge: float, threshold: float
) -> list[KeyMetric | None]:
    """Metrics of the experts that have one. An expert with too little text, or without a null space, has none."""
    each, refused = list[KeyMetric | None](), None
    for one in moment.known:
        try:
            each.append(None if one is None else _of_one(name, one, weight, ridge, threshold))
        except OptionError as error:
            each.append(None)
            refused = error
    if refused is not None and each.count(None) == len(each):
        raise refused
    return each
