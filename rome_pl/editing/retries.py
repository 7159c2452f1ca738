"""The searches for an edit's value: with the settings of the run, then with those of its retries until one succeeds."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from rome_pl.editing.edit import Edit
from rome_pl.editing.edit_setup import prepare_edits
from rome_pl.editing.run_setup import RunSetup
from rome_pl.forward.suffix_engine import SuffixEngine
from rome_pl.ledger.status import EditStatus
from rome_pl.search.attempts import Attempt
from rome_pl.search.objective import ValueObjective
from rome_pl.search.value_search import SearchOptions, SearchResult

__all__ = ["Retries", "take_result"]

Search = Callable[[ValueObjective, Sequence[Edit], SearchOptions], None]
"""Searches the values of edits, of which each knows its position in the objective."""


class Retries:
    """Makes the attempts, each for the edits that those before it have failed.

    Args:
        attempts: The first search and the retries.
        setup: What the edits of the run share.
        engines: What they run on, by their layers.
        search: Makes one search.
        step: Enters the state of a training step, for a search outside of one.
        options: Those of :class:`rome_pl.RomeModule`.
    """

    def __init__(
        self,
        attempts: Sequence[Attempt],
        setup: RunSetup,
        engines: Mapping[tuple[int, ...], SuffixEngine],
        search: Search,
        step: Callable[[], AbstractContextManager[object]],
        options: Mapping[str, Any],
    ) -> None:
        self._attempts, self._setup, self._engines = tuple(attempts), setup, engines
        self._search, self._step, self._options = search, step, options

    def first(self, objective: ValueObjective, edits: Sequence[Edit]) -> None:
        """Search the values of edits that were prepared together, with retries where too little is found."""
        self._search(objective, edits, self._attempts[0].options)
        self._retry_failed(edits, 1, objective)

    def again(self, edit: Edit, reason: str) -> bool:
        """Search the value of one edit again, under the weights as they are now.

        Args:
            edit: The edit; if another value was found it is pending and not written.
            reason: Why the value that was found is not good enough.

        Returns:
            Whether there was a retry left, and it has found a value.
        """
        number = edit.search.attempt + 1
        if number == len(self._attempts):
            return False
        edit.drop_write()
        with self._step():
            objective = self._retry(number, [edit], None, f": {reason}")
            self._retry_failed([edit], number + 1, objective)
        edit.failed = False  # it could be tried, whatever has become of the second search
        return edit.search.delta is not None

    def _retry_failed(self, edits: Sequence[Edit], first: int, objective: ValueObjective) -> None:
        """Make the retries from a number on, each for the edits whose last search has found too little.

        Whether what is found makes the model say the target is for the write to show: it is cheap beside a search, and
        an edit that takes is the same with retries and without.
        """
        least = self._options["retry_below"]
        for number in range(first, len(self._attempts)):
            edits = [edit for edit in edits if not edit.steps[-1].probability >= least]  # it may be no number
            if not edits:
                return
            objective = self._retry(number, edits, objective)

    def _retry(
        self, number: int, edits: Sequence[Edit], objective: ValueObjective | None, reason: str = ""
    ) -> ValueObjective:
        """Make one retry, on what the edits were prepared for if it searches there."""
        attempt = self._attempts[number]
        if objective is None or attempt.layers != edits[0].layers:
            encoded = [edit.search.encoded for edit in edits]
            objective = prepare_edits(edits, encoded, self._setup, self._engines[attempt.layers], self._options)
        self._search(objective, edits, attempt.options)
        elsewhere = attempt.layers != self._attempts[0].layers
        where = f", at layer {', '.join(map(str, attempt.layers))}" if elsewhere else ""
        for edit in edits:
            edit.search.attempt = number
            edit.notes.append(f"searched again with retry {number}{where}{reason}")
        return objective


def take_result(edit: Edit, result: SearchResult, base_output: Tensor) -> None:
    """Give an edit the result of a search, or fail it where the search broke down.

    Args:
        edit: The edit.
        result: The result.
        base_output: The outputs of the unedited layer at the lookup tokens of the batch, ``[n, d_value]``.
    """
    edit.steps = result.steps
    edit.note_before(result.greedy_before)
    search = edit.search
    if result.finite:
        edit.status, edit.reason, edit.failed = EditStatus.PENDING, None, False
        search.delta = result.delta
        search.value = base_output[search.position].double() + result.delta.double()
        edit.value_norm = float(result.delta.norm())
    else:
        search.delta = search.value = edit.value_norm = None
        last = f"the loss became {result.steps[-1].loss} at step {len(result.steps) - 1}"
        edit.fail(f"{last}; lower v_lr, or load the model in float32")
