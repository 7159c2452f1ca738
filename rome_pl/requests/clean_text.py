"""Cleaning texts: edges that are cut off, characters that no tokenizer reads, and placeholders for no answer.

All texts of a request are cleaned here, from any file or call.
"""

import unicodedata
from typing import Any

__all__ = ["FILLER", "code_points", "cut_edges", "first_accepted", "is_edge", "no_answer", "note_of_cut", "unreadable"]

INVISIBLE = frozenset(
    "\N{ZERO WIDTH SPACE}\N{WORD JOINER}\N{ZERO WIDTH NO-BREAK SPACE}\N{LEFT-TO-RIGHT MARK}\N{RIGHT-TO-LEFT MARK}"
)
"""Invisible characters that Python does not count as white space."""

MOST_LISTS = 8
"""Deepest nesting of lists that is searched for an answer."""

FILLER = "<|endoftext|>"
"""EasyEdit's placeholder for no answer."""


def is_edge(character: str) -> bool:
    """Whether a character is cut off at the edges of texts: any white space, or an invisible character."""
    return character.isspace() or character in INVISIBLE


def cut_edges(text: str) -> tuple[str, str, str]:
    """Split a text into the characters cut off at its beginning, the text to keep, and those cut off at its end.

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
    """Describe the characters that were cut off a field's text.

    Args:
        field: Name of the field.
        head: Characters cut off at the beginning.
        tail: Characters cut off at the end.
    """
    parts = [f"{code_points(cut)} at the {edge}" for edge, cut in (("beginning", head), ("end", tail)) if cut]
    return f"{field}: cut off {' and '.join(parts)}"


def code_points(text: str, most: int = 3) -> str:
    """Name characters by number and name, such as ``U+00A0 NO-BREAK SPACE``.

    Args:
        text: The characters.
        most: Largest number of characters to name.
    """
    named = ", ".join(f"U+{ord(character):04X} {_name(character)}" for character in text[:most])
    return named + (f" and {len(text) - most} more" if len(text) > most else "")


def no_answer(text: str) -> bool:
    """Whether a text stands for no answer: it is empty, or a placeholder of another project."""
    return cut_edges(text)[1] in ("", FILLER)


def first_accepted(answer: Any) -> Any:
    """Return the first of several accepted answers, which may be nested lists."""
    for _ in range(MOST_LISTS):  # a list may hold itself
        if not (isinstance(answer, list) and answer):
            break
        answer = answer[0]
    return answer


def unreadable(text: str) -> str | None:
    """Why a text cannot be encoded. ``None``: it can."""
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
