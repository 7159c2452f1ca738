"""The searches of an edit: the first one and its retries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rome_pl.forward.suffix_engine import SuffixEngine
from rome_pl.model.architecture import RewriteSite
from rome_pl.model.language_model import LanguageModel
from rome_pl.search.value_search import SearchOptions

__all__ = ["Attempt", "attempts_of", "engines_of"]


@dataclass(frozen=True)
class Attempt:
    """One search.

    Args:
        layers: The layers that the result is written into, the lowest first. The search is at the last.
        options: The options of the search.
    """

    layers: tuple[int, ...]
    options: SearchOptions


def attempts_of(options: Mapping[str, Any], main: Sequence[int]) -> list[Attempt]:
    """Return the searches that the options of :class:`rome_pl.RomeModule` ask for, in order.

    Args:
        options: Checked options. Each entry of ``retries`` overrides options of the first search.
        main: The layers of the first search.
    """
    first = SearchOptions(**{field.name: options[field.name] for field in fields(SearchOptions)})
    attempts = [Attempt(tuple(sorted(main)), first)]
    for other in options["retries"]:
        settings = dict(other)
        layers = settings.pop("layers", None)
        attempts.append(Attempt(tuple(sorted(main if layers is None else layers)), replace(first, **settings)))
    return attempts


def engines_of(
    language_model: LanguageModel, sites: Sequence[RewriteSite], attempts: Sequence[Attempt], compiled: bool
) -> dict[tuple[int, ...], SuffixEngine]:
    """Return the suffix engines of attempts, by their layers, those of the first attempt first.

    Args:
        language_model: The model.
        sites: The rewritten projections, the lowest first.
        attempts: The first search and the retries.
        compiled: Whether to use ``torch.compile`` for the steps.
    """
    engines = {}
    for layers in dict.fromkeys(attempt.layers for attempt in attempts):
        *below, last = (site for site in sites if site.layer in layers)
        pad_id = language_model.encoder.pad_id
        engines[layers] = SuffixEngine(language_model.model, last, pad_id, compiled, below)
    return engines
