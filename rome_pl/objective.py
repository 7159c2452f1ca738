"""What the value optimisation minimises (Meng et al. 2022, Eq. 4), and the projection after each step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rome_pl.encoding import EncodedEdit
from rome_pl.prefix import PrefixPass

__all__ = ["Losses", "ValueObjective", "clamp_norm_"]


@dataclass(frozen=True)
class Losses:
    """One evaluation, all scalars.

    Args:
        nll: Mean over contexts of the length-normalised negative log-likelihood of the target.
        kl: Divergence of "{subject} is a" from the model without offset, times its factor.
        decay: Norm penalty, times its factor.
    """

    nll: Tensor
    kl: Tensor
    decay: Tensor

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return self.nll + self.kl + self.decay

    @property
    def probability(self) -> Tensor:
        """Geometric mean over contexts and target tokens of the target's probability; detached."""
        return self.nll.detach().neg().exp()


class ValueObjective:
    """The loss of one edit as a function of its value offset.

    Args:
        prefix: Prefix pass over ``(*edit.rows, edit.kl_row)``, in this order.
        edit: The encoded edit.
        kl_factor: Weight of the divergence.
        v_weight_decay: Weight of the norm penalty.
    """

    def __init__(self, prefix: PrefixPass, edit: EncodedEdit, kl_factor: float, v_weight_decay: float) -> None:
        self.prefix = prefix
        self.kl_factor, self.v_weight_decay = kl_factor, v_weight_decay
        rows = prefix.rows
        kl_row = edit.kl_row
        device = rows.labels.device
        self._positions = (
            torch.cat([rows.predict_row, torch.tensor([len(edit.rows)], device=device)]),
            torch.cat([rows.predict_column, torch.tensor([rows.prefix + kl_row.first - kl_row.lookup], device=device)]),
        )
        # Every context shares the target's length up to tokenisation: average over tokens first, then over contexts.
        lengths = torch.tensor([len(row.target) for row in edit.rows], device=device)
        self._shares = lengths[rows.predict_row] * len(edit.rows)
        self.base_output = prefix.outputs[0]
        floating = torch.promote_types(self.base_output.dtype, torch.float32)
        #: Norm of the projection's output at the bare prompt's lookup token: ``‖m_0‖``.
        self.base_norm: Tensor = torch.linalg.vector_norm(self.base_output.to(floating))
        self._base_kl: Tensor | None = None

    def __call__(self, delta: Tensor) -> Losses:
        """Evaluate at an offset ``[d_value]``; the first call must be at zero, where the divergence's reference is."""
        count = len(self.prefix.outputs)
        logits = self.prefix.logits(delta.expand(count, -1), self._positions)
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        at_targets = log_probs[:-1].gather(1, self.prefix.rows.labels.unsqueeze(1)).squeeze(1)
        nll = -(at_targets / self._shares).sum()
        at_kl = log_probs[-1]
        if self._base_kl is None:
            assert not delta.detach().any()  # the loop starts at zero
            self._base_kl = at_kl.detach()
        kl = self.kl_factor * (at_kl.exp() * (at_kl - self._base_kl)).sum()
        decay = self.v_weight_decay * delta.norm() / self.base_norm**2
        return Losses(nll, kl, decay)


@torch.no_grad()
def clamp_norm_(delta: Tensor, largest: Tensor) -> None:
    """Project onto the ball ``‖δ‖ ≤ largest``, in place and without a host sync."""
    norm = delta.norm()
    delta.mul_(torch.where(norm > largest, largest / norm, torch.ones_like(norm)))
