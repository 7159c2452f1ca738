"""Replacing a folder by a filled one: a kill at any moment leaves the old folder or the new one.

A temporary folder stays locked while its process lives. A folder left by a killed process is not locked, and the next
run that writes beside it removes it.
"""

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = [
    "clear_leftovers",
    "filled_inside",
    "keep_others",
    "make_folder",
    "put_in_place",
    "sync_folder",
    "temporary_folder",
]

SUFFIX = ".rome-pl"
"""Suffix of temporary folders."""

ASIDE = f"{SUFFIX}-old"
"""Suffix of folders that are being replaced, on systems that cannot exchange two names at once."""

_LEFTOVER = re.compile(rf"\.(?P<name>.*)\.[a-z0-9_]{{8}}(?P<suffix>{re.escape(SUFFIX)}(-old)?)")

_FOLDER = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder, so that a rename survives a power cut. Do nothing on systems without this."""
    try:
        handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES, errno.EROFS):
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, and sync their names. Do nothing if it exists.

    Raises:
        OSError: If it cannot be made.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync_folder(place.parent)


def filled_inside(path: Path) -> bool:
    """Whether a folder can be filled but not replaced: a mount point, the working folder, or in a read-only folder."""
    if not path.is_dir():
        return False
    return path.is_mount() or path == Path.cwd() or not os.access(path.parent, os.W_OK | os.X_OK)


@contextmanager
def temporary_folder(path: Path, parent: Path) -> Iterator[Path]:
    """Make a locked temporary folder that is to become ``path``. Remove it afterwards if it still exists.

    Args:
        path: The final folder.
        parent: An existing folder that holds the temporary one.

    Raises:
        OSError: If it cannot be made.
    """
    while True:
        work = Path(tempfile.mkdtemp(dir=parent, prefix=f".{path.name}.", suffix=SUFFIX))
        handle = _lock(work, wait=True)
        if work.is_dir():
            break
        _close(handle)  # another run removed it as a leftover before it was locked
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _close(handle)


def put_in_place(work: Path, path: Path) -> None:
    """Rename a folder to ``path``. The folder that was there gets the old name of ``work``, or is removed.

    Raises:
        OSError: If renaming fails. The old folder is kept.
    """
    if not path.is_dir():
        work.rename(path)
    elif not any(path.iterdir()):
        path.rmdir()  # not every system renames onto a folder
        work.rename(path)
    elif not _exchanged(work, path):
        aside = work.with_name(work.name.removesuffix(SUFFIX) + ASIDE)
        path.rename(aside)
        try:
            work.rename(path)
        except BaseException:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def keep_others(old: Path, new: Path, replaced: Callable[[str], bool]) -> None:
    """Link the files of an old folder that are not replaced into a new one."""
    for entry in old.iterdir():
        there = new / entry.name
        if replaced(entry.name) or os.path.lexists(there) or _LEFTOVER.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, there, symlinks=True, copy_function=_link)
        else:
            _link(str(entry), str(there))


def clear_leftovers(folder: Path) -> None:
    """Remove the temporary folders that killed runs have left in a folder.

    If a run was killed between two renames, the old folder gets its name back.
    """
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = _LEFTOVER.fullmatch(entry.name)
            if found is None or not entry.is_dir(follow_symlinks=False):
                continue
            path = Path(entry.path)
            handle = _lock(path, wait=False)
            if handle is None:  # in use, or locks are not available
                continue
            try:
                place = path.with_name(found["name"])
                if found["suffix"] == ASIDE and not os.path.lexists(place):
                    path.rename(place)
                else:
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                _close(handle)


def _lock(folder: Path, wait: bool) -> int | None:
    """Lock a folder while the handle is open. ``None``: it is locked already, or the system has no such locks."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY | _FOLDER)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange the names of two folders at once. Return whether the system could."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or an old one
        return False
    here, exchange = -100, ctypes.c_uint(2)  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
