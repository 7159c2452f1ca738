"""Boundaries of words and characters in a text."""

import unicodedata

import regex

__all__ = ["character_edges", "character_spans", "is_whole_word", "writes_without_spaces"]

_CHARACTER = regex.compile(r"\X")


def is_whole_word(text: str, start: int, end: int) -> bool:
    """Whether a span neither begins nor ends inside a word.

    Letters, digits, combining marks and the underscore continue a word. In scripts without spaces every position is a
    word boundary.

    Args:
        text: The text.
        start: First character of the span.
        end: The character after its last.

    Example:
        >>> is_whole_word("Rome and Romea", 9, 13)
        False
    """
    return not (_one_word(text, start) or _one_word(text, end))


def writes_without_spaces(character: str) -> bool:
    """Whether the character's script puts no space between words."""
    script = unicodedata.name(character, "").split(" ")[0]
    if script in ("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"):
        return True
    # East Asian letters and punctuation are wide; Hangul is too, but puts spaces, and so do emoji (symbols).
    wide = unicodedata.east_asian_width(character) in ("W", "F") or script == "HALFWIDTH"
    return wide and script != "HANGUL" and unicodedata.category(character)[0] in "LP"


def character_spans(text: str) -> list[tuple[int, int]]:
    """The spans of the characters that a reader sees: a letter with its marks, an emoji with its modifiers."""
    return [found.span() for found in _CHARACTER.finditer(text)]


def character_edges(text: str) -> set[int]:
    """The positions at which such characters begin or end."""
    return {0, *(end for _, end in character_spans(text))}


def _one_word(text: str, place: int) -> bool:
    """Whether the characters on both sides of a position belong to one word."""
    return 0 < place < len(text) and _continues(text[place - 1]) and _continues(text[place])


def _continues(character: str) -> bool:
    inside = character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"
    return inside and not writes_without_spaces(character)
