"""Means over records with their 95 % intervals."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Entry", "bootstrap_interval", "entry", "harmonic_mean", "wilson_interval"]

Entry = dict[str, float | int | None]
"""``{"value", "low", "high", "n"}``; with ``n_nan`` if records were left out because the model gave NaN."""

_Z = 1.959963984540054  # two-sided 95 %
_RESAMPLES = 1000


def entry(
    values: Tensor, interval: Callable[[Tensor], tuple[float, float]], mean: Callable[[Tensor], Tensor] | None = None
) -> Entry:
    """Return the mean of one value per record, its interval, and n.

    Args:
        values: One row per record, ``[records]`` or ``[records, values]``; rows with a NaN are left out and counted.
        interval: Computes the interval of the rows that are kept.
        mean: Computes the mean over rows. ``None`` (default): the arithmetic mean of ``[records]``.
    """
    broken = values.isnan() if values.ndim == 1 else values.isnan().any(1)
    kept = values[~broken]
    made: Entry = {"value": None, "low": None, "high": None, "n": len(kept)}
    if len(kept):
        low, high = interval(kept)
        made |= {"value": float(kept.mean() if mean is None else mean(kept)), "low": low, "high": high}
    if bool(broken.any()):
        made["n_nan"] = int(broken.sum())
    return made


def wilson_interval(rates: Tensor) -> tuple[float, float]:
    """Wilson's 95 % interval for the mean of per-record rates.

    Example:
        >>> [round(edge, 3) for edge in wilson_interval(torch.tensor([1.0, 1.0, 1.0, 0.0]))]
        [0.301, 0.954]
    """
    n, p = len(rates), float(rates.double().mean())
    centre = p + _Z**2 / (2 * n)
    spread = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def bootstrap_interval(
    values: Tensor, mean: Callable[[Tensor], Tensor] = lambda resamples: resamples.mean(1)
) -> tuple[float, float]:
    """The bootstrap's 95 % interval of a mean over records (percentiles of 1,000 seeded resamples).

    Args:
        values: One row per record.
        mean: Computes the mean of each resample, ``[resamples, records, ...]`` to ``[resamples]``.
    """
    draws = torch.randint(len(values), (_RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = mean(values[draws]).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype))
    return float(low), float(high)


def harmonic_mean(rates: Tensor) -> Tensor:
    """Harmonic mean over the last dimension of mean rates; 0 where one is 0."""
    harmonic = rates.shape[-1] / (1 / rates).sum(-1)
    return torch.where((rates > 0).all(-1), harmonic, torch.zeros_like(harmonic))
