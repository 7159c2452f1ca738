"""Text as it was meant: what is cut off at its edges, what no tokenizer reads, what only fills a place.

All texts of a request pass here, whatever file or call they come from.
"""

import unicodedata
from typing import Any

__all__ = ["FILLER", "code_points", "cut_edges", "first_accepted", "is_edge", "no_answer", "note_of_cut", "unreadable"]

INVISIBLE = frozenset(
    "\N{ZERO WIDTH SPACE}\N{WORD JOINER}\N{ZERO WIDTH NO-BREAK SPACE}\N{LEFT-TO-RIGHT MARK}\N{RIGHT-TO-LEFT MARK}"
)
"""What shows nothing but is no white space to Python."""

MOST_LISTS = 8
"""Most lists in one another that are looked into for an answer."""

FILLER = "<|endoftext|>"
"""What EasyEdit puts where there is no answer."""


def is_edge(character: str) -> bool:
    """Whether a character is cut off at the edges of texts: white space of any kind, or nothing that shows."""
    return character.isspace() or character in INVISIBLE


def cut_edges(text: str) -> tuple[str, str, str]:
    """What stands before a text's first character to keep, the text itself, and what stands after it.

    Example:
        >>> cut_edges(" Rome  ")
        (' ', 'Rome', '  ')
    """
    start, end = 0, len(text)
    while start < end and is_edge(text[start]):
        start += 1
    while end > start and is_edge(text[end - 1]):
        end -= 1
    return text[:start], text[start:end], text[end:]


def note_of_cut(field: str, head: str, tail: str) -> str:
    """What was cut off a field's text, for a reader.

    Args:
        field: Name of the field.
        head: What was cut off at the beginning.
        tail: What was cut off at the end.
    """
    parts = [f"{code_points(cut)} at the {edge}" for edge, cut in (("beginning", head), ("end", tail)) if cut]
    return f"{field}: cut off {' and '.join(parts)}"


def code_points(text: str, most: int = 3) -> str:
    """Characters by number and name, such as ``U+00A0 NO-BREAK SPACE``.

    Args:
        text: The characters.
        most: Most that are named.
    """
    named = ", ".join(f"U+{ord(character):04X} {_name(character)}" for character in text[:most])
    return named + (f" and {len(text) - most} more" if len(text) > most else "")


def no_answer(text: str) -> bool:
    """Whether a text stands for no answer: it is empty, or what other projects fill the place with."""
    return cut_edges(text)[1] in ("", FILLER)


def first_accepted(answer: Any) -> Any:
    """Of several accepted answers, which may be lists of lists, the first."""
    for _ in range(MOST_LISTS):  # a list may hold itself
        if not (isinstance(answer, list) and answer):
            break
        answer = answer[0]
    return answer


def unreadable(text: str) -> str | None:
    """What keeps a text from being encoded, if anything does."""
    if "\0" in text:
        return "holds a NUL character (U+0000), which ends a text in some tools; remove it"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate), which no tokenizer reads"
    return None


def _name(character: str) -> str:
    controls = {"\n": "LINE FEED", "\r": "CARRIAGE RETURN", "\t": "TAB"}
    return unicodedata.name(character, None) or controls.get(character, "(no name)")
