"""Writing files and folders completely or not at all."""

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from rome_pl.errors import OptionError
from rome_pl.files.file_kinds import FOLDER, LINK, kind_of
from rome_pl.files.folder_swap import (
    clear_leftovers,
    filled_inside,
    keep_others,
    make_folder,
    put_in_place,
    sync_folder,
    temporary_folder,
)

__all__ = [
    "check_free",
    "check_own",
    "check_place",
    "check_regular",
    "check_room",
    "local_path",
    "make_folder",
    "open_own",
    "plain",
    "read_regular",
    "sync_folder",
    "whole_file",
    "whole_folder",
    "write_json",
    "write_lines",
    "write_text",
]

REPLACED_LAST = "config.json"
"""The file that makes a folder a checkpoint. It is replaced last."""


def check_regular(path: Path) -> None:
    """Refuse anything but a regular file before opening it: reading a FIFO would block forever.

    Raises:
        OSError: If it is missing, or a folder, FIFO, socket or device.
    """
    if kind := kind_of(path.stat().st_mode):
        raise OSError(errno.EINVAL, f"is no regular file but {kind}", str(path))


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file. Raises like :func:`check_regular`."""
    check_regular(path)
    return path.read_bytes()


def local_path(path: str | Path) -> Path:
    """The path that an option or argument names: ``~`` is the user's home."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser raises for a user who is not there


def check_own(path: Path) -> None:
    """Refuse a path to write to that is not a regular file or folder: a link could lead outside the run's folder.

    Args:
        path: A file or folder; it need not exist.

    Raises:
        OptionError: If it is a link, a pipe, a device or a socket.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:  # not there
        return
    kind = kind_of(mode)
    if kind == LINK:
        raise OptionError(f"{path}: a link, which is never followed when a run is written; put its file there instead")
    if kind not in (None, FOLDER):
        raise OptionError(f"{path}: {kind}, where a run has a file or folder; remove it")


def open_own(path: Path, flags: int) -> BinaryIO:
    """Open a file for writing. Unlike ``open``, follow no link and do not block on a pipe.

    Args:
        path: The file.
        flags: Flags of :func:`os.open`.

    Raises:
        OptionError: Like :func:`check_own`.
        OSError: If it cannot be opened.
    """
    check_own(path)
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags | safe, 0o666), "ab" if flags & os.O_APPEND else "r+b")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to. Sync it and rename it to ``path`` afterwards; remove it after an exception.

    An older file of that name stays intact until the new one is complete, even if the disk is full or the process is
    killed.

    Args:
        path: The file; its folder is created if missing.

    Raises:
        OSError: If it cannot be written, naming the file.
    """
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    work = Path(name)
    try:
        yield work
        with work.open("rb") as file:
            os.fsync(file.fileno())
        work.chmod(0o666 & ~_umask())  # a temporary file is private
        work.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error} (nothing was changed)", str(path)) from error
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.EIO, f"{error} (nothing was changed)", str(path)) from error
    finally:
        work.unlink(missing_ok=True)
    sync_folder(path.parent)


def check_free(folder: Path, option: str) -> None:
    """Refuse a folder that is not empty or cannot be written.

    Args:
        folder: The folder; it need not exist.
        option: The option that names it.

    Raises:
        OptionError: If it is a file, not empty, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{option}: {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise OptionError(f"{option}: {folder} is not empty; choose another folder")
    check_place(folder, option)


def check_place(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be written. Test this by making a temporary folder beside it.

    Args:
        folder: The folder; it need not exist.
        option: The option that names it.

    Raises:
        OptionError: If it cannot be written or replaced.
    """
    folder = folder.resolve()
    if filled_inside(folder) and (folder / REPLACED_LAST).exists():
        raise OptionError(
            f"{option}: {folder} holds a model, and cannot be replaced as a whole: it is a mount point, the working "
            "folder, or in a folder that cannot be written; choose another, such as one below it"
        )
    above = _place(folder)
    try:
        Path(tempfile.mkdtemp(dir=above, prefix=f".{folder.name}.", suffix=".rome-pl")).rmdir()
    except OSError as error:
        raise OptionError(
            f"{option}: {folder} cannot be written: {error.strerror or error} in {above} (nothing was written); "
            "choose another folder"
        ) from error


def check_room(folder: Path, num_bytes: int, option: str) -> None:
    """Refuse a folder on a disk without enough room.

    Args:
        folder: The folder; it need not exist.
        num_bytes: Bytes to write there, in addition to the present content.
        option: The option that names it.

    Raises:
        OptionError: If there is not enough room, with both sizes.
    """
    above = _place(folder.resolve())
    free = shutil.disk_usage(above).free
    if num_bytes > free:
        raise OptionError(
            f"{option}: the model takes at least {num_bytes / 1e6:,.1f} MB, and the disk of {above} has "
            f"{free / 1e6:,.1f} MB free (an older folder goes only once the new one is whole); make room, or choose "
            "another folder"
        )


def _place(folder: Path) -> Path:
    """The nearest existing folder that a new folder goes into."""
    wanted = folder if filled_inside(folder) else folder.parent
    return next((above for above in (wanted, *wanted.parents) if above.exists()), wanted)


@contextmanager
def whole_folder(path: Path, replaced: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """Yield a temporary folder to fill. Sync it and rename it to ``path`` afterwards; remove it after an exception.

    An older folder of that name stays intact until the new one is complete, even if the disk is full or the process is
    killed. A mount point cannot be renamed, so it is filled instead, ``config.json`` last.

    Args:
        path: The folder. Folders above it are created if missing.
        replaced: Tells by name which entries of an older folder are removed; the others are kept. ``None`` (default):
            the folder has to be empty or not exist.

    Raises:
        OSError: If it cannot be written, naming the folder.
    """
    path = path.resolve()  # replace the target of a link, not the link
    try:
        inside = filled_inside(path)
        parent = path if inside else path.parent
        make_folder(parent)
        clear_leftovers(parent)
        with temporary_folder(path, parent) as work:
            yield work
            if replaced is not None and path.is_dir() and not inside:
                keep_others(path, work, replaced)
            for written in [*work.rglob("*"), work]:
                if written.is_dir():
                    sync_folder(written)
                elif written.is_file():
                    with written.open("rb") as file:
                        os.fsync(file.fileno())
            work.chmod(0o777 & ~_umask())  # a temporary folder is private
            if inside:
                _move_all(work, path)
            else:
                if replaced is None and path.is_dir() and any(path.iterdir()):  # somebody has filled it in the meantime
                    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
                put_in_place(work, path)
            sync_folder(parent)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error} (nothing was written)", str(path)) from error
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.EIO, f"{error} (nothing was written)", str(path)) from error


def _move_all(work: Path, path: Path) -> None:
    for entry in sorted(work.iterdir(), key=lambda entry: entry.name == REPLACED_LAST):
        if (path / entry.name).is_dir():
            shutil.rmtree(path / entry.name)
        entry.replace(path / entry.name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records as JSONL, completely or not at all."""
    with whole_file(path) as work, work.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Convert a value for JSON: numbers that are not finite become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file completely or not at all."""
    with whole_file(path) as work, work.open("w", encoding="utf-8") as file:
        json.dump(plain(content), file, indent=2, ensure_ascii=False, allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all. Lone surrogates, which UTF-8 cannot hold, become ``?``."""
    with whole_file(path) as work:
        work.write_text(text, encoding="utf-8", errors="replace", newline="")
