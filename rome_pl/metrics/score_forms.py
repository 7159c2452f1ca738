"""Probe scores as JSON, in ledgers and caches."""

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from rome_pl.files.schemas import Count
from rome_pl.metrics import probes
from rome_pl.metrics.probes import ProbeScores

__all__ = ["SCORES", "Answer", "Scores", "scores_from_json"]

Measured = Annotated[float, Field(strict=True)]
"""A number that may be NaN if the model is broken."""
Pair = Annotated[list[Measured | None], Field(min_length=2, max_length=2)]


class Answer(TypedDict):
    """As :class:`rome_pl.metrics.probes.Answer`."""

    log_prob: Measured | None
    accuracy: Measured | None
    predicted: list[Count]


class Scores(TypedDict):
    """As :class:`rome_pl.metrics.probes.ProbeScores`."""

    rewrite: Pair
    paraphrases: list[Pair]
    neighbours: list[Pair]
    answers: dict[str, list[Answer]]
    touched: list[bool]


SCORES: TypeAdapter[Any] = TypeAdapter(Scores)


def scores_from_json(content: dict[str, Any]) -> ProbeScores:
    """Make scores from the JSON form of their ``asdict``."""
    return ProbeScores(
        rewrite=tuple(content["rewrite"]),
        paraphrases=tuple(tuple(pair) for pair in content["paraphrases"]),
        neighbours=tuple(tuple(pair) for pair in content["neighbours"]),
        answers={
            kind: tuple(replace(probes.Answer(**answer), predicted=tuple(answer["predicted"])) for answer in answers)
            for kind, answers in content["answers"].items()
        },
        touched=tuple(content["touched"]),
    )
