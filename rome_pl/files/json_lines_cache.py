"""A cache of measurements that several runs share: one file, one sealed line of JSON for each entry."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import TypeAdapter

from rome_pl.files.checksums import is_intact, sealed
from rome_pl.files.schemas import checked, parsed
from rome_pl.files.whole_files import read_regular

__all__ = ["JsonLinesCache"]


class JsonLinesCache:
    """Entries by key, in a file that any number of processes may append to.

    Each line is ``{"key", "value", "checksum"}``. A line that a killed run cut short, or that was damaged, is skipped:
    its entry is measured and appended again. The last intact line of a key counts.

    Args:
        path: The file. The first append makes it and its folder.
        form: Schema of a value; a line with another value is skipped.
    """

    def __init__(self, path: Path, form: TypeAdapter[Any]) -> None:
        self.path = path
        self._form = form

    def read(self) -> dict[str, Any]:
        """Return the entries; none if there is no file."""
        entries: dict[str, Any] = {}
        try:
            lines = read_regular(self.path).split(b"\n")
        except OSError:  # not there, or not a file
            return entries
        for line in lines:
            try:
                content = parsed(line, finite=False)
                if not isinstance(content, dict) or not is_intact(content):
                    continue
                checked(self._form, content["value"])
                entries[str(content["key"])] = content["value"]
            except (ValueError, KeyError):  # cut short, damaged, or written by another version
                continue
        return entries

    def append(self, entries: Mapping[str, Any]) -> None:
        """Append entries, which JSON can hold, under a lock.

        Raises:
            OSError: If the file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")), self.path.open("a", encoding="utf-8") as file:
            for key, value in entries.items():
                file.write("\n" + json.dumps(sealed({"key": key, "value": value})))  # the line before may be cut short
