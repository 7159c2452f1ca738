"""Deciding from scripts and punctuation whether a space joins two texts."""

import re
import unicodedata

from rome_pl.requests.words import writes_without_spaces

__all__ = ["joined_by_space"]

_DASHES = frozenset("/-\N{EN DASH}\N{EM DASH}")
_JOINS_LEFT = frozenset(".,;:!?%…'\N{RIGHT SINGLE QUOTATION MARK}") | _DASHES
"""Characters without a space before them, besides closing brackets and quotes."""

_CLITIC = re.compile(r"['\N{RIGHT SINGLE QUOTATION MARK}](s|t|re|ve|ll|d|m)(?![^\W\d_])")
"""English endings that follow a word without a space."""


def joined_by_space(prompt: str, target: str) -> bool | None:
    """Whether a space joins a prompt and its target. ``None``: it depends on the tokenizer."""
    left, right = prompt[-1], target[0]
    if left.isspace() or writes_without_spaces(left) or writes_without_spaces(right):
        return False
    if _opens(prompt):
        return False
    if right in _JOINS_LEFT:
        return _sign_opens_word(left, target)
    if unicodedata.category(right) in ("Pe", "Pf"):
        return False
    # Other signs of a word or number, such as a currency or a minus. The tokenizer cannot decide: its vocabulary may
    # lack them with a space for other reasons.
    opens = right == '"' or right.isalnum() or unicodedata.category(right) in ("Ps", "Pi", "Mn", "Mc", "Me")
    return True if not opens and _is_spaced(target[1:2]) else None


def _sign_opens_word(left: str, target: str) -> bool:
    """Whether a sign belongs to the word or number after it, as in "-27" or ".NET", and not to the text before."""
    after = target[1:2]
    if not _is_spaced(after) or _CLITIC.match(target):
        return False
    return not (left.isdigit() and after.isdigit())  # "3" and ".14", "1990" and "-1995"


def _is_spaced(character: str) -> bool:
    """Whether a character is a letter or digit of a script with spaces between words."""
    return character.isalnum() and not writes_without_spaces(character)


def _opens(prompt: str) -> bool:
    """Whether no space follows the prompt's end: an opening bracket or quote, a sign, a hyphen."""
    left, before = prompt[-1], prompt[-2:-1]
    if left in "'\"":  # the straight quotes open after a space and close after a word
        return not before or before.isspace() or unicodedata.category(before) in ("Ps", "Pi")
    if left in _DASHES:  # a hyphen joins what follows; a dash after a space does not
        return not before.isspace()
    return left in "@#$€£_¿¡" or unicodedata.category(left) in ("Ps", "Pi")
