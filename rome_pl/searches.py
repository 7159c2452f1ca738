"""The searches for an edit's value: with the settings of the run, then with those of its retries until one succeeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from rome_pl.architecture import RewriteSite
from rome_pl.batch_preparation import prepare_edits
from rome_pl.edit import Edit, EditStatus
from rome_pl.language_model import LanguageModel
from rome_pl.objective import ValueObjective
from rome_pl.session import EditSession
from rome_pl.suffix import SuffixEngine
from rome_pl.value_search import Found, SearchOptions

__all__ = ["Attempt", "Searches", "attempts_of", "engines_of", "take_found"]


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
        layers = settings.pop("layers", None)
        attempts.append(Attempt(tuple(sorted(main if layers is None else layers)), replace(first, **settings)))
    return attempts


class Searches:
    """Makes the attempts, each for the edits that those before it have failed.

    Args:
        attempts: The first search and the retries.
        session: What the edits of the run share.
        engines: What they run on, by their layers.
        search: Makes one search, of edits whose place is that in the objective.
        options: Those of :class:`rome_pl.RomeModule`.
    """

    def __init__(
        self,
        attempts: Sequence[Attempt],
        session: EditSession,
        engines: Mapping[tuple[int, ...], SuffixEngine],
        search: Callable[[ValueObjective, Sequence[Edit], SearchOptions], None],
        options: Mapping[str, Any],
    ) -> None:
        self._attempts, self._session, self._search, self._options = tuple(attempts), session, search, options
        self._engines = engines

    def first(self, objective: ValueObjective, edits: Sequence[Edit]) -> None:
        """Search the values of edits that were prepared together, with retries where too little is found."""
        self._search(objective, edits, self._attempts[0].options)
        self._go_on(edits, 1, objective)

    def again(self, edit: Edit, reason: str) -> bool:
        """Search the value of one edit again, under the weights as they are now.

        Args:
            edit: The edit; if another value was found it is pending and not written.
            reason: Why what was found is not good enough.

        Returns:
            Whether there was a retry left, and it has found a value.
        """
        number = edit.attempt + 1
        if number == len(self._attempts):
            return False
        edit.written, edit.delta, edit.value, edit.after, edit.greedy_after = None, None, None, None, None
        objective = self._attempt(number, [edit], None, f": {reason}")
        self._go_on([edit], number + 1, objective)
        edit.failed = False  # it could be tried, whatever has become of the second search
        return edit.delta is not None

    def _go_on(self, edits: Sequence[Edit], first: int, objective: ValueObjective) -> None:
        """Make the attempts from a number on, each for the edits whose last search has found too little.

        Whether what is found makes the model say the target is for the write to show: it is cheap beside a search, and
        an edit that takes is the same with retries and without.
        """
        least = self._options["retry_below"]
        for number in range(first, len(self._attempts)):
            edits = [edit for edit in edits if not edit.steps[-1].probability >= least]  # it may be no number
            if not edits:
                return
            objective = self._attempt(number, edits, objective)

    def _attempt(
        self, number: int, edits: Sequence[Edit], objective: ValueObjective | None, reason: str = ""
    ) -> ValueObjective:
        """Make one retry, on what the edits were prepared for if it searches there."""
        attempt = self._attempts[number]
        if objective is None or attempt.layers != edits[0].layers:
            objective = prepare_edits(edits, self._session, self._engines[attempt.layers], self._options)
        self._search(objective, edits, attempt.options)
        elsewhere = attempt.layers != self._attempts[0].layers
        where = f", at layer {', '.join(map(str, attempt.layers))}" if elsewhere else ""
        for edit in edits:
            edit.attempt = number
            edit.notes.append(f"searched again with retry {number}{where}{reason}")
        return objective


def engines_of(
    language_model: LanguageModel, sites: Sequence[RewriteSite], attempts: Sequence[Attempt], compiled: bool
) -> dict[tuple[int, ...], SuffixEngine]:
    """What attempts run on, by their layers, those of the first attempt first.

    Args:
        language_model: The model.
        sites: The projections that edits are written into, the lowest first.
        attempts: The first search and the retries.
        compiled: Whether steps go through ``torch.compile``.
    """
    engines = {}
    for layers in dict.fromkeys(attempt.layers for attempt in attempts):
        *below, last = (site for site in sites if site.layer in layers)
        pad_id = language_model.encoder.pad_id
        engines[layers] = SuffixEngine(language_model.model, last, pad_id, compiled, below)
    return engines


def take_found(edit: Edit, found: Found, base_output: Tensor) -> None:
    """Give an edit what a search has found for it, or fail it where the search broke down.

    Args:
        edit: The edit.
        found: What was found.
        base_output: What the unedited layer gives at the lookup tokens of the batch, ``[n, d_value]``.
    """
    edit.steps = found.steps
    edit.note_before(found.greedy_before)
    if found.finite:
        edit.status, edit.reason, edit.failed = EditStatus.PENDING, None, False
        edit.delta = found.delta
        edit.value = base_output[edit.place].double() + found.delta.double()
    else:
        last = f"the loss became {found.steps[-1].loss} at step {len(found.steps) - 1}"
        edit.fail(f"{last}; lower v_lr, or load the model in float32")
