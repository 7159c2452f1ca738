"""Suggestions for misspelt names."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["did_you_mean"]


_ENOUGH = 0.6
"""Smallest similarity of two names, from 0 to 1."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'layers'?``, or an empty text if no known name is similar.

    Args:
        name: The name as written.
        known: The valid names. Names with dots are also compared part by part.

    Example:
        >>> did_you_mean("v_lrr", ["v_lr", "layers"])
        "; did you mean 'v_lr'?"
    """
    by_written = {other.lower(): other for other in known}
    near = get_close_matches(name.lower(), by_written, n=1, cutoff=_ENOUGH)
    if not near:  # the last part under another section
        by_end = {other.rpartition(".")[2]: other for other in by_written}
        near = [by_end[end] for end in get_close_matches(name.lower().rpartition(".")[2], by_end, n=1, cutoff=0.8)]
    return f"; did you mean '{by_written[near[0]]}'?" if near else ""
