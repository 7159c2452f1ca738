"""Writing files whole or not at all, and naming them by what they hold."""

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rome_pl.errors import OptionError

__all__ = ["check_free", "check_regular", "content_key", "read_regular", "whole_file", "whole_folder"]


def content_key(*parts: Any) -> str:
    """A short name that depends on every part and on nothing else; parts are what JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def check_regular(path: Path) -> None:
    """Refuse what is no regular file, before it is opened: a FIFO would make its reader wait for ever.

    Raises:
        OSError: If it is missing, or a folder, FIFO, socket or device.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))


def read_regular(path: Path) -> bytes:
    """The content of a regular file; raises as :func:`check_regular` does."""
    check_regular(path)
    return path.read_bytes()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to; synced and renamed to ``path`` afterwards, removed after an exception.

    Whatever happens, also a full disk or a killed process, an older file of that name stays whole until the new one is.

    Args:
        path: The file; its folder is created if missing.

    Raises:
        OSError: If it cannot be written, naming the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
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
    except SafetensorError as error:  # how a full disk shows there
        raise OSError(errno.EIO, f"{error} (nothing was changed)", str(path)) from error
    finally:
        work.unlink(missing_ok=True)


def check_free(folder: Path, option: str) -> None:
    """Refuse a folder to write to that holds something already.

    Args:
        folder: The folder; it need not exist.
        option: The option that names it.

    Raises:
        OptionError: If it is a file, or not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{option}: {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise OptionError(f"{option}: {folder} is not empty; choose another folder")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; synced and renamed to ``path`` afterwards, removed after an exception.

    Args:
        path: The folder; it does not exist, or is empty. Folders above it are created if missing.

    Raises:
        OSError: If it cannot be written, naming the folder.
    """
    path = path.resolve()  # what a link names is to be replaced, not the link
    work = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        yield work
        for written in work.rglob("*"):
            if written.is_file():
                with written.open("rb") as file:
                    os.fsync(file.fileno())
        work.chmod(0o777 & ~_umask())  # a temporary folder is private
        if path.is_dir():
            path.rmdir()  # not every system renames onto a folder
        work.rename(path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error} (nothing was written)", str(path)) from error
    except SafetensorError as error:  # how a full disk shows there
        raise OSError(errno.EIO, f"{error} (nothing was written)", str(path)) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
