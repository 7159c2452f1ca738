"""Reading the lines of a ledger, and checking that they are complete, valid, unchanged and in order."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rome_pl.errors import RomeError
from rome_pl.files.checksums import unchained
from rome_pl.files.schemas import checked, parsed, refuse
from rome_pl.files.whole_files import read_regular
from rome_pl.ledger.run_schemas import LEDGER_END, ledger_line

__all__ = ["END", "LedgerError", "Line", "check_end", "read_lines", "read_with_chain"]

END = "end.json"
"""File in a ledger's folder with its end when it was last closed."""

log = logging.getLogger(__name__)


class LedgerError(RomeError):
    """A ledger that is missing, damaged, in use, or of another model."""


@dataclass(frozen=True)
class Line:
    """A complete line of a ledger.

    Args:
        start: Its offset in the file, in bytes.
        end: The offset of the next line.
        record: Its content, without the checksum.
        check: The start of the next line's checksum: its own checksum, which covers the lines before it too, or, for
            earlier versions without checksums, a hash of all lines so far.
    """

    start: int
    end: int
    record: dict[str, Any]
    check: str


def read_lines(path: Path) -> list[Line]:
    """Read the complete lines of a ledger. A half-written end of a killed run is left out, with a warning.

    Raises:
        LedgerError: If the file cannot be read, a line is damaged, or lines were lost, doubled or moved.
    """
    return read_with_chain(path)[0]


def read_with_chain(path: Path) -> tuple[list[Line], str]:
    """Return the lines as :func:`read_lines` does, and the start of the next line's checksum."""
    try:
        content = read_regular(path)
    except OSError as error:
        refuse(LedgerError, str(path), error, "give the folder of a run")
    lines, start, before = list[Line](), 0, ""
    unchecked, all_unchecked = hashlib.sha256(), True
    while (end := content.find(b"\n", start) + 1) > 0:
        # Texts may contain characters at which splitlines() would split.
        try:
            body, check, right = unchained(content[start : end - 1], before)
            record: dict[str, Any] = parsed(body)
            checked(ledger_line(record), record)
            if not right:
                raise ValueError(
                    "its checksum does not fit: it was changed, or lines before it are missing, doubled or moved"
                )
            if check is None and not all_unchecked:
                raise ValueError("its checksum is missing")
        except ValueError as error:
            raise LedgerError(
                f"{path}, line {len(lines) + 1}: damaged ({error}). Do not edit ledgers: take the file from a copy, or "
                "make the run again"
            ) from error
        if check is None:
            unchecked.update(content[start:end])
        else:
            all_unchecked = False
        before = check or unchecked.hexdigest()
        lines.append(Line(start, end, record, before))
        start = end
    if lines and all_unchecked:
        log.warning("%s: of an earlier version, whose lines have no checksums: damage shows less", path)
    lines = _without_half_a_write(lines)
    if dropped := len(content) - (lines[-1].end if lines else 0):
        log.warning("%s: the last %d bytes are no complete record and are left out", path, dropped)
    return lines, lines[-1].check if lines else ""


def _without_half_a_write(lines: list[Line]) -> list[Line]:
    """Drop lines at the end whose group is not complete."""
    place, count = (lines[-1].record.get("together") if lines else None) or (0, 0)
    return lines[: max(0, len(lines) - place)] if place < count else lines


def check_end(folder: Path, lines: Sequence[Line]) -> None:
    """Refuse a ledger whose last lines are missing since it was last closed.

    Args:
        folder: The ledger's folder.
        lines: Its lines.

    Raises:
        LedgerError: If lines are missing.
    """
    path = folder / END
    if not path.exists():  # the run was killed, or is of an earlier version
        return
    try:
        known = parsed(read_regular(path))
        checked(LEDGER_END, known)
    except (OSError, ValueError) as error:
        refuse(LedgerError, str(path), error, "take it from a copy")
    if len(lines) < known["lines"] or lines[known["lines"] - 1].check != known["check"]:
        raise LedgerError(
            f"{folder / 'edits.jsonl'}: holds {len(lines)} complete lines, but was closed with {known['lines']} and "
            "another end: lines are missing. Take the file from a copy, or resume the run, which makes them again"
        )
