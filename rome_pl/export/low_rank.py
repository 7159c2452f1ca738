"""A weight change in as many factors as its rank, or in fewer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rome_pl.write.closed_form import Update

__all__ = ["LowRank", "low_rank"]


@dataclass(frozen=True)
class LowRank:
    """A weight change in factors: ``up @ down``.

    Args:
        down: ``[r, d_key]``, float32.
        up: ``[d_value, r]``, float32.
        full_rank: Rank of the whole change; ``r`` is smaller if it was compressed.
        error: Frobenius norm of the difference of factors and change, rounding included, relative to the change's.
    """

    down: Tensor
    up: Tensor
    full_rank: int
    error: float

    @property
    def rank(self) -> int:
        """Number of factors."""
        return len(self.down)


def low_rank(update: Update, rank: int | None = None) -> LowRank:
    r"""Factorise a change into its singular vectors.

    With :math:`L^T = Q_l R_l` and :math:`R^T = Q_r R_r` the change is :math:`Q_l (R_l R_r^T) Q_r^T`, and the matrix in
    the middle has at most n rows, so the change itself is never computed. A truncated factorisation is the best of its
    rank (Eckart and Young 1936).

    Args:
        update: The change, in n factors.
        rank: Largest number of factors. ``None`` (default): the number of nonzero singular values, at most ``min(n,
            d_value, d_key)``.
    """
    left, right = torch.linalg.qr(update.left.T), torch.linalg.qr(update.right.T)
    outer, sizes, inner = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    rounding = torch.finfo(sizes.dtype).eps * max(*update.left.shape, update.right.shape[1])
    full_rank = int((sizes > rounding * sizes[0]).sum())
    kept = full_rank if rank is None else min(rank, full_rank)
    roots = sizes[:kept].sqrt()
    up = (left.Q @ outer[:, :kept] * roots).float()
    down = (roots.unsqueeze(1) * (inner[:kept] @ right.Q.T)).float()
    lacking = Update.joint([update, Update(-up.T.double(), down.double())])
    norm = _norm(update)
    return LowRank(down.contiguous(), up.contiguous(), full_rank, _norm(lacking) / norm if norm > 0 else 0.0)


def _norm(update: Update) -> float:
    """Frobenius norm. Unlike :attr:`Update.norm`, it is accurate for a sum that nearly vanishes."""
    return float((torch.linalg.qr(update.left.T).R @ torch.linalg.qr(update.right.T).R.T).norm())
