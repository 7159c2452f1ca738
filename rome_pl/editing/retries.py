"""The searches for an edit's value: with the settings of the run, then with those of its retries until one succeeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rome_pl.editing.edit import Edit
from rome_pl.editing.edit_setup import prepare_edits
from rome_pl.editing.session import EditSession
from rome_pl.forward.suffix_engine import SuffixEngine
from rome_pl.ledger.status import EditStatus
from rome_pl.search.attempts import Attempt
from rome_pl.search.objective import ValueObjective
from rome_pl.search.value_search import SearchOptions, SearchResult

__all__ = ["Retries", "take_found"]


class Retries:
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


def take_found(edit: Edit, found: SearchResult, base_output: Tensor) -> None:
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
