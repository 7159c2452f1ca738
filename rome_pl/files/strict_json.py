"""Strict JSON: a repeated key, NaN, a huge number and deep nesting are faults, with their line."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DEEPEST", "LONGEST_NUMBER", "Fault", "list_entries", "read_value"]

WHITE_SPACE = (" ", "\t", "\n", "\r")

DEEPEST = 64
"""Deepest allowed nesting of lists and mappings."""

LONGEST_NUMBER = 300
"""Most digits of a whole number."""


@dataclass(frozen=True)
class Fault:
    """A reason why a value is not accepted.

    Args:
        message: What is wrong and what to do.
        line: Line in the file, from 1.
        whole: Whether the rest of the text cannot be read either.
    """

    message: str
    line: int
    whole: bool = False


@dataclass
class _Reader:
    """Reads values and remembers the faults of the last one.

    Args:
        text: The text to read.
        doubled: Keys that occur twice in a mapping.
        others: Other faults.
    """

    text: str
    doubled: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._decode = json.JSONDecoder(
            object_pairs_hook=self._mapping, parse_int=self._whole, parse_constant=self._constant
        ).raw_decode

    def value(self, start: int) -> tuple[Any, int]:
        """Read the value at a position. Return it and the position after it."""
        self.doubled.clear()
        self.others.clear()
        return self._decode(self.text, start)

    def fault(self, value: Any, start: int, remedy: str) -> Fault | None:
        """The fault of the value that was read last, which begins at ``start``; ``None`` if it has none."""
        line = self.line(start)
        if _is_deep(value):
            return Fault(f"lists and mappings stand in one another more than {DEEPEST} deep; flatten them", line)
        if self.doubled:
            key = self.doubled[0]
            return Fault(f"the key {key[:80]!r} occurs twice in one mapping; {remedy}", self.line(self._second(start)))
        return Fault(self.others[0], line) if self.others else None

    def line(self, place: int) -> int:
        """The line number of a position, from 1."""
        return self.text.count("\n", 0, place) + 1

    def skip(self, place: int) -> int:
        """The first position from ``place`` on that is not white space."""
        while self.text[place : place + 1] in WHITE_SPACE:
            place += 1
        return place

    def _second(self, start: int) -> int:
        """The position of the second occurrence of a repeated key."""
        text, decode = self.text, json.JSONDecoder(parse_int=str).raw_decode
        keys: set[str] = set()
        place = self.skip(start + 1)
        while text[place] not in "]}":
            if text[start] == "{":
                key, end = decode(text, place)
                if key in keys:
                    return place
                keys.add(key)
                place = self.skip(self.skip(end) + 1)
            if text[place] in "[{" and (found := self._second(place)) >= 0:
                return found
            place = self.skip(decode(text, place)[1])
            if text[place] == ",":
                place = self.skip(place + 1)
        return -1

    def _mapping(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            self.doubled.append(Counter(name for name, _ in pairs).most_common(1)[0][0])
        return values

    def _whole(self, digits: str) -> int:
        if len(digits) > LONGEST_NUMBER:
            self.others.append(f"the number {digits[:20]}... has {len(digits)} digits; put it in quotes, or shorten it")
            return 0
        return int(digits)

    def _constant(self, name: str) -> None:
        self.others.append(f"{name} is no JSON value; give a number, or null")


def read_value(text: str, remedy: str) -> Any:
    """Read a text that holds one value.

    Args:
        text: The text.
        remedy: What to do about a key that occurs twice.

    Returns:
        The value, or a :class:`Fault` in its place.

    Raises:
        JSONDecodeError: If it is not JSON.
    """
    reader = _Reader(text)
    start = reader.skip(0)
    try:
        value, end = reader.value(start)
    except RecursionError:
        return Fault("lists and mappings stand in one another too deep to be read; flatten them", 1, whole=True)
    if reader.skip(end) != len(text):
        raise json.JSONDecodeError("Extra data", text, reader.skip(end))
    return reader.fault(value, start, remedy) or value


def list_entries(text: str, remedy: str) -> Iterator[Any]:
    """Read the entries of a list one by one, so that a fault affects only its own entry.

    Args:
        text: A text that begins with a list.
        remedy: What to do about a key that occurs twice.

    Yields:
        The entries, and a :class:`Fault` in the place of each that has one.

    Raises:
        JSONDecodeError: If it is not JSON.
    """
    reader = _Reader(text)
    place = reader.skip(reader.skip(0) + 1)
    while text[place : place + 1] != "]":
        start = place
        try:
            value, end = reader.value(start)
        except RecursionError:
            message = "lists and mappings stand in one another too deep to be read; flatten them"
            yield Fault(message, reader.line(start), whole=True)
            return
        yield reader.fault(value, start, remedy) or value
        place = reader.skip(end)
        if text[place : place + 1] == ",":
            place = reader.skip(place + 1)
            if text[place : place + 1] == "]":
                raise json.JSONDecodeError("Expecting value", text, place)
        elif text[place : place + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
    if (end := reader.skip(place + 1)) != len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent if isinstance(parent, list) else ())
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
