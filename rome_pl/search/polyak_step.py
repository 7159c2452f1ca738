"""A step rule made for value vectors."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

__all__ = ["PolyakStep"]

ENOUGH = 0.05
"""Part of the distance to the target log-odds that a step has to cover for the next one to shorten the offset."""


class PolyakStep(Optimizer):
    r"""Steps as long as the distance to the target demands: Newton's method for a root along the gradient.

    With loss :math:`L` and :math:`p = e^{-L}`, the log-odds :math:`z = \log(p / (1 - p))` are close to linear in an
    offset where the loss is not. The step is the shortest one that takes their linearisation to
    :math:`z^*`, those of ``target_probability``:

    .. math:: \Delta = \eta\,(z^* - z)_+ \frac{\nabla z}{\|\nabla z\|^2}, \qquad \nabla z = -\frac{\nabla L}{1 - p}

    capped at ``radius`` norms of the original value. It is Polyak's step length (Polyak 1969) for the log-odds, whose
    wanted value is known. There is no rate to tune.

    Many offsets reach the target. The shortest one disturbs least; it is parallel to the gradient. With ``shorten``
    each step also removes that fraction of the offset's component orthogonal to the gradient, which does not change the
    linearised log-odds. It is a damped step of the iteration by which structural reliability finds the point of a level
    set that is nearest to the origin (Hasofer & Lind 1974; Rackwitz & Fiessler 1978). Where the log-odds are not
    linear, this costs some progress: after a step that covered less than 0.05 of the distance, nothing is removed.

    Args:
        params: Offsets, one parameter group each; :class:`rome_pl.RomeModule` adds to each group the current ``loss``
            and ``scale``, the norm of the original value, as tensors without dimensions.
        lr: Fraction :math:`\eta` of the step that is taken.
        target_probability: The target of the step, above the module's ``stop_probability``.
        radius: Largest step, in norms of the original value.
        shorten: Fraction of the offset's component orthogonal to the gradient that a step removes.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        target_probability: float = 0.99,
        radius: float = 1.0,
        shorten: float = 0.0,
    ) -> None:
        if not 0 < target_probability < 1:
            raise ValueError(f"target_probability: expected a number in (0, 1), got {target_probability}")
        if not radius > 0:
            raise ValueError(f"radius: expected a positive number, got {radius}")
        if not 0 <= shorten <= 1:
            raise ValueError(f"shorten: expected a number in [0, 1], got {shorten}")
        defaults = {"lr": lr, "target_probability": target_probability, "radius": radius, "shorten": shorten}
        super().__init__(params, defaults)

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every offset that has a gradient."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return result

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if "loss" not in group or "scale" not in group:
            raise RuntimeError("PolyakStep needs each parameter group's 'loss' and 'scale'; RomeModule gives them")
        assert parameter.grad is not None
        gradient, target = parameter.grad, group["target_probability"]
        wanted = math.log(target / (1 - target))
        loss = group["loss"].to(gradient)
        tiny = torch.finfo(gradient.dtype).tiny
        # log-odds of exp(-loss), and 1 - exp(-loss), without the cancellation of computing them that way
        rest = -torch.expm1(-loss)
        odds = -loss - rest.clamp(min=tiny).log()
        norm = torch.linalg.vector_norm(gradient)
        # Without a gradient there is no direction, and length / norm may overflow.
        direction = torch.where(norm > 0, gradient / norm.clamp(min=tiny), torch.zeros_like(gradient))
        length = group["lr"] * (wanted - odds).clamp(min=0) * rest / norm.clamp(min=tiny)
        length = torch.minimum(length, group["radius"] * group["scale"].to(gradient))
        across = parameter - (parameter @ direction) * direction
        parameter.sub_(torch.where(norm > 0, length, torch.zeros_like(length)) * direction)
        if group["shorten"] and (before := self.state[parameter].get("odds")) is not None:
            nearer = odds - before >= ENOUGH * (wanted - before)
            parameter.sub_(group["shorten"] * nearer * across)
        if group["shorten"]:
            self.state[parameter]["odds"] = odds
