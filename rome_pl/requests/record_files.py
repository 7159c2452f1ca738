"""Files of records: JSON, JSONL and YAML, read strictly. A fault affects only its own record."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rome_pl.errors import RomeError
from rome_pl.files import strict_json, strict_yaml
from rome_pl.files.readable_files import FileError, check_file, read_text
from rome_pl.files.strict_json import Fault

__all__ = ["SUFFIXES", "DataError", "Malformed", "read_records"]

SUFFIXES = (".json", ".jsonl", ".yaml", ".yml")
"""Suffixes of files of records."""

WANTED = "give a JSON, JSONL or YAML file of edit requests"

_DASH = "begin each record with a dash (-), or take one of the two out"
_BRACES = "give each record braces of its own, or take one of the two out"


class DataError(RomeError):
    """A file or data set that cannot be used at all."""


@dataclass(frozen=True)
class Malformed:
    """Marks a record that could not be read, so that the positions of the others stay those of the file.

    Args:
        place: File and line.
        message: The fault.
        field: ``(line)`` in JSON lines, else ``(record)``.
    """

    place: str
    message: str
    field: str = "(record)"


def read_records(path: str | Path) -> list[Any]:
    """Read the raw records of a JSON, JSONL or YAML file.

    Args:
        path: File ending in ``.json``, ``.jsonl``, ``.yaml`` or ``.yml``.

    Returns:
        One entry per record, in file order. A record that is malformed, has a key twice, or is too large or too deeply
        nested becomes a marker, which :func:`rome_pl.requests.record_forms.parse_records` reports as an invalid record.

    Raises:
        DataError: If the file is missing, not a regular file, not UTF-8, not parseable as a whole, empty, not a list of
            records, or has no readable record.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        if suffix not in SUFFIXES:
            check_file(path, WANTED)
        text = read_text(path, WANTED)
    except FileError as error:
        raise DataError(str(error)) from None
    match suffix:
        case ".jsonl":
            records = _read_json_lines(path, text)
        case ".json":
            records = _read_json(path, text)
        case ".yaml" | ".yml":
            records = _read_yaml(path, text)
        case _:
            raise DataError(f"{path}: unknown file type '{suffix}'; expected one of {', '.join(SUFFIXES)}")
    if not records:
        raise DataError(f"{path}: holds no records")
    if all(isinstance(record, Malformed) for record in records) and suffix != ".jsonl":
        raise DataError(f"{path}: {records[0].message}")
    return records


def _read_json_lines(path: Path, text: str) -> list[Any]:
    records: list[Any] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = strict_json.read_value(line, _BRACES)
        except json.JSONDecodeError as error:
            record = Malformed(place, f"malformed JSON at column {error.colno}: {error.msg}", "(line)")
        records.append(Malformed(place, record.message, "(line)") if isinstance(record, Fault) else record)
    if len(records) > 1 and all(isinstance(record, Malformed) for record in records) and _is_json(text):
        raise DataError(f"{path}: holds one JSON value over several lines, not one a line; name the file .json")
    return records


def _read_json(path: Path, text: str) -> list[Any]:
    start = text.lstrip()
    try:
        if start.startswith("["):
            return _marked(path, strict_json.list_entries(text, _BRACES))
        value = strict_json.read_value(text, _BRACES)
    except json.JSONDecodeError as error:
        hint = "; one record a line is JSON lines: name the file .jsonl" if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}: malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}{hint}"
        ) from error
    raise _no_list(path, value, "put records between brackets: [{...}, {...}]")


def _read_yaml(path: Path, text: str) -> list[Any]:
    entries = strict_yaml.list_entries(text, _DASH)
    if isinstance(entries, Iterator):
        return _marked(path, entries)
    raise _no_list(path, entries, 'begin each record with a dash: "- prompt: ..."')


def _marked(path: Path, entries: Iterator[Any]) -> list[Any]:
    """Return the entries of a list, faults as markers."""
    records: list[Any] = []
    for entry in entries:
        if isinstance(entry, Fault) and entry.whole:
            raise DataError(f"{path}: {_at_line(entry)}")
        records.append(Malformed(str(path), _at_line(entry)) if isinstance(entry, Fault) else entry)
    return records


def _no_list(path: Path, value: Any, remedy: str) -> DataError:
    if isinstance(value, Fault):
        return DataError(f"{path}: {_at_line(value)}")
    hint = f"; {remedy}" if isinstance(value, dict) and value else ""
    return DataError(f"{path}: expected a list of records, got {type(value).__name__}{hint}")


def _at_line(fault: Fault) -> str:
    return f"{fault.message} (line {fault.line})"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
