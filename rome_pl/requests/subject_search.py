"""Finding the subject in its prompt, literally or by what looks alike, and explaining a failure."""

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

from rome_pl.errors import shortened
from rome_pl.requests.clean_text import code_points
from rome_pl.requests.words import character_edges, character_spans, is_whole_word

__all__ = ["find_alike", "hint_of_difference", "locate_subject"]

MOST_ALIGNED = 100
"""Largest number of characters, from the first difference on, that are compared."""

MOST_COMPARED = 1_000_000
"""Largest number of character pairs compared in search of a text that resembles a missing subject."""

_IGNORED = frozenset(
    "\N{SOFT HYPHEN}\N{ZERO WIDTH SPACE}\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}\N{WORD JOINER}"
    "\N{ZERO WIDTH NO-BREAK SPACE}\N{LEFT-TO-RIGHT MARK}\N{RIGHT-TO-LEFT MARK}\N{ARABIC LETTER MARK}"
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # marks of direction
)
_ALIKE = {
    **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
    **dict.fromkeys("\u2010\u2011\u2212", "-"),
}


@dataclass(frozen=True)
class _Folded:
    """A text in which characters that look alike are replaced by one of them.

    Args:
        text: The text.
        source: For each character its span in the original text.
    """

    text: str
    source: tuple[tuple[int, int], ...]

    def find(self, sought: str) -> Iterator[tuple[int, int]]:
        """Yield the spans in the original text that match a folded text, whole characters only."""
        position = self.text.find(sought) if sought else -1
        while position >= 0:
            first, last = position, position + len(sought) - 1
            begins = first == 0 or self.source[first - 1] != self.source[first]
            ends = last + 1 == len(self.text) or self.source[last + 1] != self.source[last]
            if begins and ends:
                yield self.source[first][0], self.source[last][1]
            position = self.text.find(sought, position + 1)


def locate_subject(prompt: str, subject: str) -> tuple[int, int] | None:
    """Find the subject in the prompt: its last whole-word occurrence, else its last occurrence.

    An occurrence that would cut a character in half, such as a letter without its accent, does not count.

    Args:
        prompt: Text to search.
        subject: Text to find, case-sensitive.

    Returns:
        Character span ``(start, end)``, or ``None`` if the subject does not occur.

    Example:
        >>> locate_subject("Rome, the romance of Rome in Romea", "Rome")
        (21, 25)
    """
    found = []
    position = prompt.find(subject)
    if position < 0:
        return None
    edges = character_edges(prompt)
    while position >= 0:
        if position in edges and position + len(subject) in edges:
            found.append((position, position + len(subject)))
        position = prompt.find(subject, position + 1)
    return _last(prompt, found)


def find_alike(prompt: str, subject: str) -> tuple[tuple[int, int] | None, list[str]]:
    """Find a text in the prompt that looks like the subject, if the subject itself is not there.

    These count as the same: composed and decomposed letters, all spaces, straight and curly quotes, hyphens and the
    minus sign, and texts that differ in invisible characters. If nothing is found, also capitals and small letters.

    Args:
        prompt: Text to search.
        subject: Text to find.

    Returns:
        The span of the last whole word, else of the last occurrence; ``None`` if there is none, or several that differ.
        And the distinct texts that were found.
    """
    for fold in (_fold, _fold_case):
        spans = list(_folded(prompt, fold).find(_folded(subject, fold).text))
        if spans:
            texts = list(dict.fromkeys(prompt[start:end] for start, end in spans))
            return (_last(prompt, spans) if len(texts) == 1 else None), texts
    return None, []


def hint_of_difference(prompt: str, subject: str, found: list[str]) -> str:
    """Describe texts in the prompt that look like the subject, or nearly so. Empty if there are none.

    Args:
        prompt: The prompt.
        subject: The subject, which does not occur in it.
        found: The texts that :func:`find_alike` found.
    """
    if not found:
        resembling = _nearly(prompt, subject)
        found = [] if resembling is None else [resembling]
    shown = found[:2]
    more = f"; and {len(found) - 2} more" if len(found) > 2 else ""
    return "; ".join(_difference(subject, text, brief=len(shown) > 1) for text in shown) + more


def _last(prompt: str, spans: list[tuple[int, int]]) -> tuple[int, int] | None:
    whole = [span for span in spans if is_whole_word(prompt, *span)] or spans
    return whole[-1] if whole else None


def _folded(text: str, fold: Callable[[str], str]) -> _Folded:
    parts = [(fold(text[start:end]), (start, end)) for start, end in character_spans(text)]
    return _Folded("".join(part for part, _ in parts), tuple(span for part, span in parts for _ in part))


def _fold(character: str) -> str:
    if character == "\r\n":
        return " "
    return "".join(
        " " if part.isspace() else _ALIKE.get(part, part)
        for part in unicodedata.normalize("NFD", character)
        if part not in _IGNORED
    )


def _fold_case(character: str) -> str:
    return unicodedata.normalize("NFD", _fold(character).casefold())


def _bare(character: str) -> str:
    """A character in its plainest form: without accents, no spaces, one kind of dash."""
    plain = unicodedata.normalize("NFKD", _fold_case(character)).casefold()
    kinds = ((part, unicodedata.category(part)) for part in plain)
    return "".join("-" if kind == "Pd" else part for part, kind in kinds if kind not in ("Mn", "Zs"))


def _nearly(prompt: str, subject: str) -> str | None:
    """The part of the prompt that differs from the subject in the fewest characters. ``None``: none is close."""
    sought, bare = _folded(subject, _bare).text, _folded(prompt, _bare)
    if (span := next(bare.find(sought), None)) is not None:
        return prompt[slice(*span)]
    length = len(sought)
    if not length or len(bare.text) < length or len(bare.text) * length > MOST_COMPARED:
        return None
    misses, start = min(
        (sum(one != other for one, other in zip(bare.text[start : start + length], sought, strict=True)), start)
        for start in range(len(bare.text) - length + 1)
    )
    if misses > length // 4:
        return None
    return prompt[bare.source[start][0] : bare.source[start + length - 1][1]]


def _difference(subject: str, text: str, brief: bool = False) -> str:
    """Describe by code points how a text of the prompt differs from the subject; if ``brief``, only once."""
    most, each = (1, 1) if brief else (3, 2)
    parts = []
    there, here = _without_common_ends(text, subject)
    matcher = SequenceMatcher(None, there, here, autojunk=False)
    for kind, a_start, a_end, b_start, b_end in matcher.get_opcodes():
        if kind != "equal":
            other = code_points(there[a_start:a_end], each) or "nothing"
            own = code_points(here[b_start:b_end], each) or "nothing"
            parts.append(f"{other} where the subject has {own}")
    shown = ", ".join(parts[:most]) + (" and more" if len(parts) > most else "")
    return f"the prompt has {shortened(text)} with {shown}"


def _without_common_ends(one: str, other: str) -> tuple[str, str]:
    """Two texts without their common beginnings and ends, cut to the length that is aligned."""
    start = _length_in_common(one, other)
    one, other = one[start:], other[start:]
    end = _length_in_common(one[::-1], other[::-1])
    return one[: len(one) - end][:MOST_ALIGNED], other[: len(other) - end][:MOST_ALIGNED]


def _length_in_common(one: str, other: str) -> int:
    """Length of the common beginning of two texts."""
    differ = (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differ, min(len(one), len(other)))
