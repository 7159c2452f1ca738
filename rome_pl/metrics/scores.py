"""The scores of edits: what each is, for one record, and their means over records.

The field's scores are not comparable from paper to paper, so each is defined once, here, for a single record, and
always comes with n and a 95 % interval. A record counts once per score, however many prompts it brings, and every
record counts, whatever became of its edit; one that lacks the prompts for a score does not count in it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric

from rome_pl.metrics.intervals import Entry, bootstrap_interval, entry, harmonic_mean, wilson_interval
from rome_pl.metrics.probes import Answer, ProbeScores

__all__ = [
    "SCORES",
    "EditScores",
    "RunningScores",
    "Score",
    "record_values",
    "summarise",
]

Pairs = Sequence[tuple[float, float]]
T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """A score of one record.

    Args:
        of: Its value from what was measured now and on the unedited model; ``None`` where the record has no probes for
            it, NaN where the model gave NaN.
        rate: Whether it is a share of yes-or-no answers, which has a Wilson interval.
    """

    of: Callable[[ProbeScores, ProbeScores | None], float | None]
    rate: bool = True


def _pairs(kind: str) -> Callable[[ProbeScores], Pairs]:
    def of(scores: ProbeScores) -> Pairs:
        if kind == "rewrite":
            new, true = scores.rewrite
            return [] if true is None else [(new, true)]
        if kind == "paraphrases":
            return scores.paraphrases
        return _neighbours(scores, scores.neighbours, kind == "touched")

    return of


def _neighbours(scores: ProbeScores, measured: Sequence[T], touched: bool = False) -> list[T]:
    """What was measured after neighbourhood prompts whose own subject was edited too, or after the others."""
    flags = scores.touched if scores.touched and measured else (False,) * len(measured)
    return [found for found, was in zip(measured, flags, strict=True) if was == touched]


def _preferred(kind: str, sign: int) -> Score:
    """Share of prompts where the right one of two targets is the likelier."""
    pairs = _pairs(kind)
    return Score(
        lambda scores, _: _mean(_broken(new, true) or float(sign * (new - true) > 0) for new, true in pairs(scores))
    )


def _margin(kind: str, sign: int) -> Score:
    """Mean difference of the two targets' probabilities."""
    pairs = _pairs(kind)
    return Score(
        lambda scores, _: _mean(sign * (math.exp(new) - math.exp(true)) for new, true in pairs(scores)), rate=False
    )


def _answers(kind: str, of: Callable[[Answer], float], rate: bool) -> Score:
    def mean(scores: ProbeScores, _: ProbeScores | None) -> float | None:
        answers: Sequence[Answer] = scores.answers.get(kind, ())
        if kind == "neighbour":
            answers = _neighbours(scores, answers)
        return _mean(_broken(answer.log_prob) or of(answer) for answer in answers)

    return Score(mean, rate)


def _accuracy(kind: str) -> Score:
    """Share of the answer's tokens that are the likeliest, each after the answer's own tokens (teacher-forced)."""
    return _answers(kind, lambda answer: answer.accuracy, rate=False)


def _match(kind: str) -> Score:
    """Whether greedy generation gives the whole answer."""
    return _answers(kind, lambda answer: float(answer.generated), rate=True)


def _unchanged(kind: str) -> Score:
    """Share of the answer's positions at which the likeliest token is that of the unedited model."""

    def of(scores: ProbeScores, base: ProbeScores | None) -> float | None:
        if base is None:
            return None
        pairs = zip(scores.answers.get(kind, ()), base.answers.get(kind, ()), strict=True)
        return _mean(
            _broken(now.log_prob, then.log_prob)
            or sum(a == b for a, b in zip(now.predicted, then.predicted, strict=True)) / len(now.predicted)
            for now, then in pairs
        )

    return Score(of, rate=False)


def _mean(values: Iterable[float]) -> float | None:
    collected = list(values)
    return sum(collected) / len(collected) if collected else None


def _broken(*values: float) -> float:
    """NaN if a value is; else 0, which gives way to what follows an ``or``."""
    return math.nan if any(map(math.isnan, values)) else 0.0


SCORES: dict[str, Score] = {
    # CounterFact (Meng et al. 2022, section 3.2): the new target against the true one.
    "ES": _preferred("rewrite", 1),
    "EM": _margin("rewrite", 1),
    "PS": _preferred("paraphrases", 1),
    "PM": _margin("paraphrases", 1),
    "NS": _preferred("neighbours", -1),
    "NM": _margin("neighbours", -1),
    # Neighbours whose own subject was edited in the same stream are no neighbours any more: reported apart.
    "NS_touched": _preferred("touched", -1),
    # zsRE (Meng et al. 2022, App. C) and EasyEdit (Wang et al. 2024): answers, token by token, teacher-forced.
    "rewrite_acc": _accuracy("rewrite"),
    "rephrase_acc": _accuracy("paraphrase"),
    "neighbour_acc": _accuracy("neighbour"),
    "locality_acc": _accuracy("locality"),
    "portability_acc": _accuracy("portability"),
    "locality": _unchanged("locality"),
    # The whole answer, generated greedily: what teacher forcing does not leak.
    "rewrite_match": _match("rewrite"),
    "rephrase_match": _match("paraphrase"),
    "neighbour_match": _match("neighbour"),
    "locality_match": _match("locality"),
    "portability_match": _match("portability"),
}
"""Every score, by name. S, the harmonic mean of ES, PS and NS, is one of the means and not of the record."""

_COUNTERFACT = ("ES", "EM", "PS", "PM", "NS", "NM", "S")
_HARMONIC = ("ES", "PS", "NS")
_ABSENT = math.inf
"""Stands in a record's row for a score that it has no probes for: NaN is what a broken model gives."""


def record_values(scores: ProbeScores, base: ProbeScores | None = None) -> dict[str, float]:
    """One record's scores, those that it has probes for.

    Args:
        scores: What was measured.
        base: The same on the unedited model; ``locality`` needs it.
    """
    values = {name: score.of(scores, base) for name, score in SCORES.items()}
    return {name: value for name, value in values.items() if value is not None}


class EditScores(Metric):
    """All scores over records, each with a 95 % interval and n.

    ``update`` takes one record's :class:`ProbeScores` and, for ``locality``, those of the unedited model. ``compute``
    returns a mapping from score to ``{"value", "low", "high", "n"}``; a score that no record has probes for has
    ``None`` and n = 0. Rates have Wilson intervals with n = records; the others bootstrap intervals (1,000 seeded
    resamples). Records for which the model gave NaN are left out of a score and counted as its ``n_nan``.
    """

    names: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys((*_COUNTERFACT, *SCORES)))
    """The scores that ``compute`` returns, in this order."""

    full_state_update = False
    records: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("records", default=[], dist_reduce_fx="cat")

    def update(self, scores: ProbeScores, base: ProbeScores | None = None) -> None:
        """Add one record."""
        values = record_values(scores, base)
        self.records.append(torch.tensor([[values.get(name, _ABSENT) for name in SCORES]], dtype=torch.float64))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Bring the records of all devices together, also if this one has none."""
        if not self.records:
            self.records.append(_NOTHING)
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Entry]:
        """The means."""
        records = self.records if isinstance(self.records, Tensor) else torch.cat([*self.records, _NOTHING])
        columns = {name: records[:, place] for place, name in enumerate(SCORES)}
        table = {
            name: entry(column[column != _ABSENT], wilson_interval if SCORES[name].rate else bootstrap_interval)
            for name, column in columns.items()
        }
        rates = torch.stack([columns[name] for name in _HARMONIC], dim=1)
        table["S"] = entry(
            rates[(rates != _ABSENT).all(1)],
            lambda kept: bootstrap_interval(kept, lambda resamples: harmonic_mean(resamples.mean(1))),
            lambda kept: harmonic_mean(kept.mean(0)),
        )
        return {name: table[name] for name in self.names}


_NOTHING = torch.empty(0, len(SCORES), dtype=torch.float64)


class RunningScores:
    """Means over the records so far, without intervals: one record costs the same, first or last."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(SCORES, 0.0)
        self._counts = dict.fromkeys(SCORES, 0)

    def update(self, scores: ProbeScores, base: ProbeScores | None = None) -> None:
        """Add one record."""
        for name, value in record_values(scores, base).items():
            if not math.isnan(value):
                self._sums[name] += value
                self._counts[name] += 1

    def compute(self) -> dict[str, float]:
        """The means; scores that no record has probes for are left out."""
        return {name: self._sums[name] / count for name, count in self._counts.items() if count}


def summarise(scores: Mapping[str, ProbeScores], base: Mapping[str, ProbeScores] | None = None) -> dict[str, Entry]:
    """All scores of records, by their names; on several devices every rank summarises its own.

    Args:
        scores: What was measured.
        base: The same on the unedited model, for ``locality``.
    """
    metric = EditScores(sync_on_compute=False)
    for name, record in scores.items():
        metric.update(record, base.get(name) if base is not None else None)
    if not scores:
        return {name: {"value": None, "low": None, "high": None, "n": 0} for name in EditScores.names}
    return metric.compute()
