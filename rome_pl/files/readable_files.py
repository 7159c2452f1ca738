"""Reading text files that a user names. Anything else, such as a pipe, is refused without opening it."""

from pathlib import Path

from rome_pl.errors import RomeError
from rome_pl.files.file_kinds import kind_of

__all__ = ["FileError", "check_file", "check_text", "is_there", "read_text"]

_BEGINNINGS = (
    (b"\x1f\x8b", "is compressed (gzip); unpack it first"),
    (b"BZh", "is compressed (bzip2); unpack it first"),
    (b"\xfd7zXZ\x00", "is compressed (xz); unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed (zstd); unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "is an archive (7z); unpack it first"),
    (b"PK\x03\x04", "is an archive (zip); unpack it first"),
    (b"PAR1", "is a Parquet file; write its rows as JSON lines (.jsonl)"),
    (b"ARROW1", "is an Arrow file; write its rows as JSON lines (.jsonl)"),
    (b"SQLite format 3\x00", "is a SQLite data base; write its rows as JSON lines (.jsonl)"),
    (b"\x89HDF", "is an HDF5 file; write its rows as JSON lines (.jsonl)"),
)
_OTHER_ENCODINGS = (b"\xff\xfe", b"\xfe\xff")  # UTF-16, whose every second byte is NUL in Latin text


class FileError(RomeError):
    """A file that cannot be read as text. The message names it and tells what to do."""


def is_there(path: Path) -> bool:
    """Whether a path exists. A name that is too long or invalid does not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def check_file(path: Path, wanted: str) -> None:
    """Make sure that a path is a file, without opening it: opening a pipe would block until somebody writes to it.

    Args:
        path: The path.
        wanted: What to give instead, for the error.

    Raises:
        FileError: If there is no such file, or it is something else.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileError(f"{path}: no such file; {wanted}") from None
    except (OSError, ValueError) as error:  # a name that is too long or holds a NUL character; no right to look
        raise FileError(f"{str(path)[:200]!r}: cannot be looked at: {_reason(error)}; {wanted}") from None
    if kind := kind_of(mode):
        raise FileError(f"{path}: is {kind}, not a file; {wanted}")


def read_text(path: Path, wanted: str) -> str:
    """Read a file as UTF-8 text, without its byte order mark.

    Args:
        path: The file.
        wanted: What to give instead, for the error.

    Raises:
        FileError: If it does not exist, or is not a file, not text, or not UTF-8.
    """
    check_file(path, wanted)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {_reason(error)}") from None
    check_text(path, content)
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None


def check_text(path: Path, content: bytes) -> None:
    """Make sure that content is text, and not an archive, a table or another binary file.

    Args:
        path: The file, for the error.
        content: Its first bytes, or all of them.

    Raises:
        FileError: If it is binary.
    """
    for beginning, what in _BEGINNINGS:
        if content.startswith(beginning):
            raise FileError(f"{path}: {what}")
    if b"\0" in content and not content.startswith(_OTHER_ENCODINGS):
        place = content.index(b"\0")
        raise FileError(f"{path}: is no text: byte {place} is NUL. If it is UTF-16, save the file as UTF-8")


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
