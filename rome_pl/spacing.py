"""Whether a space stands between two pieces of text: what scripts and punctuation say about it."""

import unicodedata

__all__ = ["joined_by_space"]

_JOINS_LEFT = frozenset(".,;:!?%/-\N{EN DASH}\N{EM DASH}…'\N{RIGHT SINGLE QUOTATION MARK}")
"""Characters that no space precedes, beside closing brackets and quotes."""


def joined_by_space(prompt: str, target: str) -> bool | None:
    """Whether a space joins a prompt and its target; ``None`` where that depends on the tokenizer."""
    left, right = prompt[-1], target[0]
    if left.isspace() or _writes_without_spaces(left) or _writes_without_spaces(right):
        return False
    if _opens(prompt) or right in _JOINS_LEFT or unicodedata.category(right) in ("Pe", "Pf"):
        return False
    return None


def _opens(prompt: str) -> bool:
    """Whether the prompt ends in something that no space follows: an opening bracket or quote, a dash, a sign."""
    left, before = prompt[-1], prompt[-2:-1]
    if left in "'\"":  # the straight quotes open after a space and close after a word
        return not before or before.isspace() or unicodedata.category(before) in ("Ps", "Pi")
    return left in "/-\N{EN DASH}\N{EM DASH}@#$€£_¿¡" or unicodedata.category(left) in ("Ps", "Pi")


def _writes_without_spaces(character: str) -> bool:
    """Whether the character's script puts no space between words."""
    script = unicodedata.name(character, "").split(" ")[0]
    if script in ("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"):
        return True
    # East Asian letters and punctuation are wide; Hangul is too, but puts spaces, and so do emoji (symbols).
    wide = unicodedata.east_asian_width(character) in ("W", "F") or script == "HALFWIDTH"
    return wide and script != "HANGUL" and unicodedata.category(character)[0] in "LP"
