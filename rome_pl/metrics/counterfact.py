"""CounterFact's scores with their uncertainty (Meng et al. 2022, section 3.2).

ES, PS and NS are shares of prompts where the right target is the likelier one; EM, PM and NM the mean difference of
the two probabilities; S the harmonic mean of ES, PS and NS. A record counts once per score, however many prompts it
brings, and every record counts, whatever became of its edit.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from rome_pl.metrics.probes import ProbeScores

__all__ = ["SCORES", "CounterFactScores", "RunningScores", "wilson_interval"]

SCORES = ("ES", "EM", "PS", "PM", "NS", "NM")
_Z = 1.959963984540054  # two-sided 95 %
_RESAMPLES = 1000


class CounterFactScores(Metric):
    """ES, EM, PS, PM, NS, NM and S over records, each with a 95 % interval and n.

    ``update`` takes one record's :class:`ProbeScores`. ``compute`` returns a mapping from score to
    ``{"value", "low", "high", "n"}``; a score that no record has probes for has ``None`` and n = 0.
    Rates have Wilson intervals with n = records; the others bootstrap intervals (1,000 seeded resamples).
    """

    full_state_update = False
    records: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("records", default=[], dist_reduce_fx="cat")

    def update(self, scores: ProbeScores) -> None:
        """Add one record."""
        self.records.append(torch.tensor([record_values(scores)], dtype=torch.float64))

    def compute(self) -> dict[str, dict[str, float | int | None]]:
        """All scores."""
        records = self.records if isinstance(self.records, Tensor) else torch.cat([*self.records, _NOTHING])
        columns = {name: records[:, i][~records[:, i].isnan()] for i, name in enumerate(SCORES)}
        table = {}
        for name, column in columns.items():
            interval = wilson_interval if name.endswith("S") else _bootstrap_mean
            table[name] = (
                _entry(float(column.mean()), *interval(column), len(column))
                if len(column)
                else _entry(None, None, None, 0)
            )
        rates = records[:, [SCORES.index(name) for name in ("ES", "PS", "NS")]]
        complete = rates[~rates.isnan().any(1)]
        table["S"] = (
            _entry(*_bootstrap_harmonic(complete), len(complete)) if len(complete) else _entry(None, None, None, 0)
        )
        return table


class RunningScores:
    """Means of the six scores over the records so far, without intervals: one record costs the same, first or last."""

    def __init__(self) -> None:
        self._sums = torch.zeros(len(SCORES), dtype=torch.float64)
        self._counts = torch.zeros(len(SCORES), dtype=torch.int64)

    def update(self, scores: ProbeScores) -> None:
        """Add one record."""
        values = torch.tensor(record_values(scores), dtype=torch.float64)
        self._sums += values.nan_to_num(0.0)
        self._counts += ~values.isnan()

    def compute(self) -> dict[str, float]:
        """The means; scores that no record has probes for are left out."""
        means = (self._sums / self._counts).tolist()
        return {name: mean for name, mean in zip(SCORES, means, strict=True) if not math.isnan(mean)}


_NOTHING = torch.empty(0, len(SCORES), dtype=torch.float64)


def record_values(scores: ProbeScores) -> list[float]:
    """One record's ES, EM, PS, PM, NS, NM; NaN where it has no probes."""
    new, true = scores.rewrite
    if true is None:
        return [math.nan] * len(SCORES)
    values = [float(new > true), math.exp(new) - math.exp(true)]
    for pairs, sign in ((scores.paraphrases, 1), (scores.neighbours, -1)):
        if not pairs:
            values += [math.nan, math.nan]
            continue
        values.append(sum(sign * (n - t) > 0 for n, t in pairs) / len(pairs))
        values.append(sum(sign * (math.exp(n) - math.exp(t)) for n, t in pairs) / len(pairs))
    return values


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


def _resamples(n: int) -> Tensor:
    return torch.randint(n, (_RESAMPLES, n), generator=torch.Generator().manual_seed(0))


def _bootstrap_mean(values: Tensor) -> tuple[float, float]:
    means = values[_resamples(len(values))].mean(1)
    return _quantiles(means)


def _bootstrap_harmonic(rates: Tensor) -> tuple[float, float, float]:
    means = rates[_resamples(len(rates))].mean(1)
    return float(_harmonic(rates.mean(0))), *_quantiles(_harmonic(means))


def _harmonic(values: Tensor) -> Tensor:
    harmonic = values.shape[-1] / (1 / values).sum(-1)
    return torch.where((values > 0).all(-1), harmonic, torch.zeros_like(harmonic))


def _quantiles(values: Tensor) -> tuple[float, float]:
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype))
    return float(low), float(high)


def _entry(value: float | None, low: float | None, high: float | None, n: int) -> dict[str, float | int | None]:
    return {"value": value, "low": low, "high": high, "n": n}


def summarise(scores: Sequence[ProbeScores]) -> dict[str, dict[str, float | int | None]]:
    """All scores of a sequence of records; on several devices every rank summarises its own sequence."""
    metric = CounterFactScores(sync_on_compute=False)
    for record in scores:
        metric.update(record)
    return metric.compute() if scores else {name: _entry(None, None, None, 0) for name in (*SCORES, "S")}
