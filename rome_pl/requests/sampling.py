"""Seeded samples of a data set or stream."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from rome_pl.requests.edit_request import EditRequest
from rome_pl.utils.hashing import hash_seed

__all__ = ["lasting_sample", "sample_requests"]


def lasting_sample(names: Iterable[str], number: int) -> list[str]:
    """Draw a seeded sample of a growing list of edits. A member leaves it only for a later edit.

    Args:
        names: The edits so far.
        number: Largest size of the sample.

    Returns:
        The names in the sample, in an order that does not depend on the stream.
    """
    return sorted(names, key=lambda name: hash_seed("retention", name))[:number]


def sample_requests(
    requests: Sequence[EditRequest], number: int, seed: int = 0, by_relation: bool = False
) -> list[EditRequest]:
    """Draw a seeded sample, in the order of the data set. A small data set is returned whole.

    Whether a record is drawn depends on its name, the seed and the other records' relations, not on its position.

    Args:
        requests: The data set.
        number: Size of the sample.
        seed: Seed of the draw.
        by_relation: Whether each relation keeps its share (by largest remainders).
    """
    groups: dict[str | None, list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        groups[request.relation if by_relation else None].append(place)
    shares = {relation: number * len(places) / max(1, len(requests)) for relation, places in groups.items()}
    wanted = {relation: int(share) for relation, share in shares.items()}
    by_remainder = sorted(shares, key=lambda relation: (wanted[relation] - shares[relation], str(relation)))
    for relation in by_remainder[: max(0, min(number, len(requests)) - sum(wanted.values()))]:
        wanted[relation] += 1
    chosen = [
        place
        for relation, places in groups.items()
        for place in sorted(places, key=lambda place: hash_seed(seed, str(requests[place].case_id)))[: wanted[relation]]
    ]
    return [requests[place] for place in sorted(chosen)]
