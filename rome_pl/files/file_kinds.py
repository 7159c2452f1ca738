"""Kinds of file system entries other than regular files."""

import stat

__all__ = ["FOLDER", "LINK", "kind_of"]

FOLDER, LINK = "a folder", "a link"

_KINDS = (
    (stat.S_ISLNK, LINK),
    (stat.S_ISDIR, FOLDER),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def kind_of(mode: int) -> str | None:
    """The kind of a file system entry, in words; ``None`` for a regular file.

    Args:
        mode: ``st_mode`` of its ``stat`` or ``lstat``. Opening it instead would block on a pipe.
    """
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), None)
