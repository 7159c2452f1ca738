"""The searches for an edit's value: with the settings of the run, then with others until one succeeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rome_pl.value_search import SearchOptions

__all__ = ["Attempt", "attempts_of"]


@dataclass(frozen=True)
class Attempt:
    """One search.

    Args:
        layers: The layers that what it finds is written into, the lowest first; it searches at the last.
        options: How it searches.
    """

    layers: tuple[int, ...]
    options: SearchOptions


def attempts_of(options: Mapping[str, Any], main: Sequence[int]) -> list[Attempt]:
    """The searches that the options of :class:`rome_pl.RomeModule` ask for, in their order.

    Args:
        options: Checked options; each of ``retries`` says what it does otherwise than the first search.
        main: The layers of the first search.
    """
    first = SearchOptions(**{field.name: options[field.name] for field in fields(SearchOptions)})
    attempts = [Attempt(tuple(sorted(main)), first)]
    for other in options["retries"]:
        settings = dict(other)
        layers = settings.pop("layers", main)
        attempts.append(Attempt(tuple(sorted(layers)), replace(first, **settings)))
    return attempts
