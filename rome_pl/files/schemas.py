"""Checking the JSON of this project against schemas. Errors name file, line and field."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, NoReturn

from pydantic import Field, TypeAdapter, ValidationError

from rome_pl.errors import RomeError

__all__ = ["Count", "Name", "Number", "checked", "parsed", "refuse"]

Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
"""A non-negative whole number."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number."""

Name = Annotated[str, Field(strict=True, min_length=1)]
"""A non-empty text."""


def parsed(content: bytes | str, finite: bool = True) -> Any:
    """Parse JSON, more strictly than the standard library.

    Args:
        content: The JSON.
        finite: Whether every number has to be finite.

    Raises:
        ValueError: If it is not JSON in UTF-8, has a key twice or a number that is not finite, or is nested too deeply.
    """
    text = content.decode("utf-8") if isinstance(content, bytes) else content
    numbers: dict[str, Any] = {"parse_constant": _no_number, "parse_float": _finite} if finite else {}
    try:
        return json.loads(text, object_pairs_hook=_once, **numbers)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def checked(schema: TypeAdapter[Any], value: Any) -> None:
    """Refuse a value that does not fit a schema.

    Raises:
        ValueError: With the field and the reason.
    """
    try:
        schema.validate_python(value, strict=True)
    except ValidationError as found:
        first = found.errors(include_url=False, include_context=False)[0]
        raise ValueError(f"{_field(first['loc'])}{_said(first)}") from found


def refuse(error: type[RomeError], where: str, reason: object, advice: str) -> NoReturn:
    """Raise an error in the form for all files: the file, the reason, and what to do."""
    raise error(f"{where}: missing or damaged ({reason}); {advice}")


def _field(place: Iterable[int | str]) -> str:
    named = ".".join(map(str, place))
    return f"field '{named}': " if named else ""


def _said(found: Any) -> str:
    if found["type"] == "missing":
        return "is missing"
    shown = repr(found["input"])
    return f"{found['msg'].removeprefix('Value error, ')}, got {shown if len(shown) <= 40 else shown[:37] + '...'}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {name[:80]!r} stands there twice")
    return content


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is no finite number")
