"""How a model continues the prompts of some edits, before a run and after it."""

from collections.abc import Sequence

from rome_pl.editing.session import EditSession
from rome_pl.forward.generation import generate
from rome_pl.requests.edit_request import EditRequest
from rome_pl.utils.markdown import entity_escaped, markdown_table

__all__ = ["Sample", "compared", "comparison", "note_continuations"]

TOKENS = 20
"""Tokens of a continuation."""

Sample = tuple[EditRequest, str, str]
"""A request, how the unedited model continues its prompt, and how the final one does."""


def note_continuations(session: EditSession, number: int, stage: str) -> None:
    """Let the model, as it is now, go on greedily with the bare prompts of the first requests; the session keeps it.

    Where edits do not accumulate there is no final model, and nothing happens. What is known already is not
    generated again.

    Args:
        session: The run.
        number: Most requests.
        stage: ``base`` or ``final``.
    """
    known = session.measured.continuations.setdefault(stage, {})
    if not session.sequential:
        return
    chosen = [request for request in session.requests if _leaves_room(session, request)][: max(0, number)]
    missing = [request for request in chosen if str(request.case_id) not in known]
    # A space at the end belongs to the answer's first token.
    texts = generate(session.language_model, [request.prompt.rstrip(" ") for request in missing], TOKENS)
    known.update({str(request.case_id): text for request, text in zip(missing, texts, strict=True)})


def compared(session: EditSession, number: int) -> Sequence[Sample]:
    """The samples of which both stages are known, at most so many."""
    before, after = (session.measured.continuations.get(stage, {}) for stage in ("base", "final"))
    known = [request for request in session.requests if str(request.case_id) in before.keys() & after.keys()]
    return [(request, before[str(request.case_id)], after[str(request.case_id)]) for request in known[: max(0, number)]]


def comparison(samples: Sequence[Sample]) -> str:
    """A table of samples for TensorBoard, in Markdown."""
    rows = [(request.prompt, request.target_new, before, after) for request, before, after in samples]
    return markdown_table(("prompt", "wanted", "unedited model", "final model"), rows, escape=entity_escaped)


def _leaves_room(session: EditSession, request: EditRequest) -> bool:
    encoder = session.language_model.encoder
    return len(encoder.prompt(request.prompt.rstrip(" ")).ids) < encoder.max_length
