"""Ordinary text to compute statistics from: files, or data sets of the hub."""

import glob
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rome_pl.errors import RomeError
from rome_pl.files.readable_files import FileError, check_file, check_text, is_there, read_text
from rome_pl.files.strict_json import Fault, list_entries
from rome_pl.files.whole_files import local_path

__all__ = ["GENERATED", "Corpus", "CorpusError", "is_kind_of_file"]

GENERATED = "generated"
"""Name of the corpus that a model writes itself."""

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
"""Builder of the datasets library by kind of file. Other files are plain text."""


class CorpusError(RomeError):
    """Text that cannot be read. The message names the file and tells what to do."""


@dataclass(frozen=True)
class Corpus:
    """A source of texts, which are read one after the other.

    In a plain text file a document ends at a blank line; in a file without blank lines each line is a document.

    Args:
        source: File, pattern of files (``data/*.jsonl``), or name of a data set on the hub.
        column: Column that holds the text, where there are columns.
        split: Split of a hub data set.
        subset: Configuration of a hub data set, such as ``20231101.en`` of ``wikimedia/wikipedia``.
    """

    source: str
    column: str = "text"
    split: str = "train"
    subset: str | None = None

    @cached_property
    def files(self) -> list[Path]:
        """The files, in order of their names; none if the source names a data set on the hub.

        Raises:
            CorpusError: If the source is a folder, a pipe or a device, or only a kind of file such as ``json``.
        """
        path = local_path(self.source)
        if is_there(path):
            if path.is_dir():
                raise CorpusError(
                    f"corpus {self.source}: is a folder; give a pattern of its files, such as {path}/*.txt"
                )
            _readable(path)
            return [path]
        if is_kind_of_file(self.source):
            raise CorpusError(
                f"corpus {self.source}: is a kind of file, not a data set: the datasets library would read whatever "
                "lies in the working folder. Give the file itself"
            )
        names = sorted(glob.glob(str(path)))  # noqa: PTH207  # Path.glob takes no absolute patterns
        return [Path(name) for name in names if Path(name).is_file()]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the files' bytes; for a hub data set its name, split and subset."""
        if not self.files:
            return "/".join(part for part in (self.source, self.subset, self.split, self.column) if part)
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        if any(path.suffix.lower() in BUILDERS for path in self.files):
            digest.update(self.column.encode())
        return digest.hexdigest()

    def texts(self) -> Iterator[str]:
        """Yield the documents.

        Raises:
            CorpusError: If there is no such file or data set, no text in it, no such column, or a file is not UTF-8.
        """
        empty = True
        for path in self.files:
            if not path.stat().st_size:
                continue
            builder = BUILDERS.get(path.suffix.lower())
            _readable(path)
            for text in _plain(path) if builder is None else self._records(builder, path):
                empty = False
                yield text
        if not self.files:
            for text in self._records(None, None):
                empty = False
                yield text
        if empty:
            raise CorpusError(f"corpus {self.source}: is empty; give a file with text in it")

    def _records(self, builder: str | None, path: Path | None) -> Iterator[str]:
        import datasets

        where = f"corpus {path or self.source}"
        try:
            if builder == "json" and (entries := _json_list(path)) is not None:
                stream = entries
            elif builder is not None:
                stream = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True)
            else:
                stream = datasets.load_dataset(self.source, self.subset, split=self.split, streaming=True)
            for number, record in enumerate(stream):
                text = record.get(self.column)
                if text is None and self.column in record:  # tables have gaps
                    continue
                if not isinstance(text, str):
                    raise CorpusError(
                        f"{where}, record {number}: column '{self.column}' holds no text; columns: {sorted(record)}. "
                        "Name the column that does (data.column)"
                    )
                if text.strip():
                    yield text
        except CorpusError:
            raise
        except Exception as error:  # the library raises many kinds of exception
            kind = (
                "cannot be read" if builder else "no such file, and no data set of that name could be loaded (offline?)"
            )
            raise CorpusError(f"{where}: {kind}: {error.__cause__ or error}") from error


def _readable(path: Path) -> None:
    """Refuse anything but a text file, without blocking on a pipe.

    Raises:
        CorpusError: If it is not a text file.
    """
    try:
        check_file(path, "give a file with text")
        if path.suffix.lower() not in BUILDERS:
            with path.open("rb") as file:
                check_text(path, file.read(16))
    except (FileError, OSError) as error:
        raise CorpusError(f"corpus {error}") from None


def _json_list(path: Path | None) -> list[dict[str, Any]] | None:
    """Read the records of a file that holds one JSON list. ``None``: it holds something else.

    The library itself would silently use the second of two equal keys.

    Raises:
        CorpusError: If an entry is not a mapping or has a key twice.
    """
    if path is None:
        return None
    with path.open("rb") as file:
        if not file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return None
    records: list[dict[str, Any]] = []
    for number, entry in enumerate(list_entries(read_text(path, "give a file with text"), "take one of the two out")):
        if isinstance(entry, Fault):
            raise CorpusError(f"corpus {path}, line {entry.line}: {entry.message}")
        if not isinstance(entry, dict):
            raise CorpusError(f"corpus {path}, record {number}: expected a mapping, got {type(entry).__name__}")
        records.append(entry)
    columns = {name: None for record in records for name in record}
    return [columns | record for record in records]


def _plain(path: Path) -> Iterator[str]:
    try:
        blank = _has_paragraphs(path)
        lines: list[str] = []
        with path.open(encoding="utf-8-sig") as file:
            for line in itertools.chain(file, [""]):
                if line.strip():
                    lines.append(line)
                if lines and not (blank and line.strip()):
                    yield "".join(lines)
                    lines = []
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"corpus {path}: not UTF-8 (byte {error.object[error.start]:#04x}); save the file as UTF-8"
        ) from error


def _has_paragraphs(path: Path) -> bool:
    """Whether a blank line stands between two lines of text."""
    gap = text = False
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if not line.strip():
                gap = text
            elif gap:
                return True
            else:
                text = True
    return False


def is_kind_of_file(name: str) -> bool:
    """Whether the datasets library takes a name, such as ``json``, for a kind of file.

    It would then read any files of that kind in the working folder, instead of a data set of the hub.
    """
    from datasets import packaged_modules

    known = getattr(packaged_modules, "_PACKAGED_DATASETS_MODULES", ())
    return name.strip("/ ").lower() in {"csv", "json", "text", "parquet", "arrow", "pandas", *known}
