"""Relations between the requests of a stream."""

from collections.abc import Iterable, Sequence, Set

from rome_pl.requests.edit_request import EditRequest
from rome_pl.requests.words import is_whole_word

__all__ = ["SUBJECT_S_KEY", "conflicts", "earlier_facts", "standing", "subjects_apart", "touched_neighbours"]

SUBJECT_S_KEY = ("subject_last", "subject_first")
"""Lookup tokens that give all facts about a subject nearly the same key."""

Fact = tuple[str, str, str]
"""A subject, and a prompt or a relation."""

MOST_KEPT = 16
"""Largest number of earlier facts about its subject that an edit's search preserves: one row a step for each."""


def touched_neighbours(requests: Sequence[EditRequest], subjects: Set[str]) -> dict[str, tuple[bool, ...]]:
    """Find the measured neighbourhood prompts that name a subject edited by another request.

    Args:
        requests: The requests with the prompts.
        subjects: The subjects of the whole stream.
    """
    found: dict[str, tuple[bool, ...]] = {}
    for request in requests:
        if request.target_true is None:  # nothing to measure after its neighbours
            continue
        others = subjects - {request.subject}
        marks = tuple(any(_names(prompt, subject) for subject in others) for prompt in request.neighbours)
        if any(marks):
            found[str(request.case_id)] = marks
    return found


def conflicts(requests: Sequence[EditRequest]) -> dict[str, str]:
    """Describe how requests conflict with earlier ones in a stream, by ``case_id``.

    Two requests are about one fact if they have the same subject, and the same prompt or relation. The later one
    contradicts or repeats the earlier one.

    Args:
        requests: The stream.
    """
    found: dict[str, str] = {}
    earlier: dict[Fact, EditRequest] = {}
    for request in requests:
        facts = _facts(request)
        for fact in facts:
            other = earlier.get(fact)
            if other is not None and other.target_new == request.target_new:
                found[str(request.case_id)] = f"asks for what record {other.case_id} asks for already"
            elif other is not None:
                found[str(request.case_id)] = (
                    f"contradicts record {other.case_id}, which asks for {other.target_new!r} of the same subject and "
                    f"{fact[1]}: the later edit wins, and the earlier one counts as lost"
                )
            if str(request.case_id) in found:
                break
        earlier.update(dict.fromkeys(facts, request))
    return found


def earlier_facts(request: EditRequest, others: Sequence[EditRequest]) -> list[EditRequest]:
    """Return the earlier facts about a request's subject that it should preserve: no later request restates them.

    Args:
        request: The request.
        others: The requests before it, in order.

    Returns:
        The latest :data:`MOST_KEPT` of them, in order.
    """
    return standing([other for other in others if other.subject == request.subject], _facts(request))[-MOST_KEPT:]


def standing(requests: Sequence[EditRequest], stated: Iterable[Fact] = ()) -> list[EditRequest]:
    """Return the requests of a stream whose fact no later request restates.

    Args:
        requests: The stream.
        stated: Facts stated after the stream.
    """
    kept: list[EditRequest] = []
    later = set(stated)
    for request in reversed(requests):
        if later.isdisjoint(facts := _facts(request)):
            kept.append(request)
        later.update(facts)
    return kept[::-1]


def subjects_apart(requests: Sequence[EditRequest], size: int) -> list[list[int]]:
    """Cut a stream, in order, into runs of at most ``size`` requests. No run has a subject twice.

    Args:
        requests: The stream.
        size: Largest number of requests in a run.

    Returns:
        For each run the indices of its requests in the stream.
    """
    runs: list[list[int]] = []
    subjects: set[str] = set()
    for place, request in enumerate(requests):
        if not runs or len(runs[-1]) == size or request.subject in subjects:
            runs.append([])
            subjects = set()
        runs[-1].append(place)
        subjects.add(request.subject)
    return runs


def _facts(request: EditRequest) -> list[Fact]:
    """The facts a request states: its subject with its prompt, and with its relation."""
    facts = [(request.subject, "prompt", request.prompt.strip())]
    if request.relation is not None:
        facts.append((request.subject, "relation", request.relation))
    return facts


def _names(prompt: str, subject: str) -> bool:
    """Whether a prompt contains a subject as whole words."""
    position = prompt.find(subject)
    while position >= 0:
        if is_whole_word(prompt, position, position + len(subject)):
            return True
        position = prompt.find(subject, position + 1)
    return False
