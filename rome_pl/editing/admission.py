"""Which requests of a stream can be edited at all, known before the first edit."""

import logging
from collections.abc import Callable, Sequence

from rome_pl.editing.session import EditSession
from rome_pl.encoding.encoded_rows import EncodedEdit
from rome_pl.errors import OptionError
from rome_pl.requests.conflicts import touched_neighbours
from rome_pl.requests.edit_request import EditRequest, RequestError

__all__ = ["admit_requests", "check_joint_solve"]

log = logging.getLogger(__name__)


def admit_requests(
    session: EditSession, requests: Sequence[EditRequest], encode: Callable[[EditRequest], EncodedEdit]
) -> tuple[dict[str, int], dict[str, RequestError], list[int]]:
    """Encode every request and its probes once, so that what cannot be edited is known before the first edit.

    Args:
        session: Gets the valid requests.
        requests: The stream.
        encode: Encodes one.

    Returns:
        The place in the stream of every request, and why some are refused, both by name; and the number of tokens from
        the lookup token on, 0 for a refused one.

    Raises:
        RequestError: If two requests have one name.
    """
    places: dict[str, int] = {}
    refused: dict[str, RequestError] = {}
    valid: list[EditRequest] = []
    lengths: list[int] = []
    for place, request in enumerate(requests):
        name = str(request.case_id)
        if name in places:
            raise RequestError("case_id", "occurs twice: results could not be told apart", case_id=request.case_id)
        places[name] = place
        lengths.append(0)
        try:
            encoded = encode(request)
            session.language_model.encoder.check_probes(request)
            valid.append(request)
            lengths[-1] = max(len(row.ids) - row.lookup for row in encoded.rows)
        except RequestError as error:
            refused[name] = error
    session.requests, session.num_refused = tuple(valid), len(refused)
    session.touched = touched_neighbours(valid, {request.subject for request in valid}) if session.sequential else {}
    return places, refused, lengths


def check_joint_solve(session: EditSession, size: int) -> None:
    """Refuse what sequential batches cannot do, and say before the first what they do.

    Args:
        session: The run.
        size: Most edits of a batch.

    Raises:
        OptionError: If the preset asserts values at other keys than those that shape its updates.
    """
    if session.preset.shape != session.preset.at:
        raise OptionError(
            f"preset {session.preset.name} asserts values at other keys than those that shape its updates, which "
            "several edits at once cannot do; use data.batch_size: 1, or preset r_rome"
        )
    log.warning(
        "Sequential edits in batches of %d: the values of a batch are optimised on the same weights and solved "
        "jointly, which is not what edits one after the other give",
        size,
    )
