"""The folder of a run: its allowed content before a run begins, and replacing an earlier run."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import BaseFileLock, Timeout

from rome_pl.errors import OptionError, RomeError
from rome_pl.files.file_kinds import FOLDER, kind_of
from rome_pl.files.whole_files import check_own, check_place, local_path, make_folder
from rome_pl.ledger.edit_log import lock_of

__all__ = [
    "RunFolderError",
    "can_resume",
    "check_files",
    "check_links",
    "check_save_folder",
    "claim_run_folder",
    "held_run_folder",
    "read_config",
]

_RUN_FILES = (
    *("config.yaml", "manifest.json", "results.json", "ledger", "tensorboard", "figures"),
    *("records.jsonl", "table.md", "table.csv", "report.html", "easyedit.json", "kmeng01.json"),
    "edit.yaml",
)

_IN_LEDGER = ("ledger/edits.jsonl", "ledger/shards", "ledger/.lock")

_FOLDERS = ("ledger", "ledger/shards", "tensorboard", "figures")

_LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")
"""Leftovers of :func:`rome_pl.files.whole_files.whole_file` in killed runs."""


class RunFolderError(RomeError):
    """A run folder that holds an earlier run, or other files."""


def can_resume(folder: Path, resume: str | None, overwrite: bool) -> bool:
    """Whether to resume a run: it is asked for and there is one."""
    if resume is None:
        return False
    if overwrite:
        raise OptionError("resume continues an earlier run, overwrite replaces it; give one of the two")
    there = (folder / "ledger" / "edits.jsonl").is_file()
    if resume != "auto" and not there:
        raise RunFolderError(f"resume: {resume} holds no run (ledger/edits.jsonl); give the folder of one, or auto")
    if resume != "auto" and local_path(resume).resolve() != folder.resolve():
        raise OptionError(f"resume: {resume} is not the run folder; set trainer.default_root_dir to it")
    return there


def check_save_folder(folder: Path, sequential: bool, overwrite: bool, run: Path, source: str) -> None:
    """Refuse a folder that cannot hold the final model, and a run without a final model.

    Args:
        folder: Folder for the final model.
        sequential: Whether edits accumulate.
        overwrite: Whether to replace a model in it.
        run: The run's folder.
        source: The model that is edited.

    Raises:
        OptionError: If it cannot be written, there is no final model, or the run needs the folder's content.
        RunFolderError: If it is a file, or holds files that may not be replaced.
    """
    if not sequential:
        raise OptionError(
            "save_model: in single-edit mode every edit is undone after its evaluation; set model.sequential_edit: true"
        )
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"save_model: {folder} is a file; give a folder")
    target, own = folder.resolve(), run.resolve()
    if target.is_dir() and target == local_path(source).resolve():
        raise OptionError(f"save_model: {folder} is the model that is edited, and the ledger needs it as it is")
    parts = target.relative_to(own).parts[:1] if target.is_relative_to(own) else ()
    if own.is_relative_to(target) or set(parts) & set(_RUN_FILES):
        raise OptionError(f"save_model: {folder} is where the run itself is written; choose another folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise RunFolderError(f"save_model: {folder} is not empty; choose another folder, or add --overwrite")
    check_place(folder, "save_model")


def claim_run_folder(folder: Path, overwrite: bool) -> None:
    """Make sure that the folder holds only files that a run may replace.

    Files of a run that failed before its first edit do not count as an earlier run.

    Raises:
        RunFolderError: If it holds other files, or another run is writing there.
        OptionError: If a file of the run is a link, a pipe, a device or a socket.
    """
    check_links(folder)
    _check_claim(folder, overwrite)
    if not folder.exists():
        return
    if (folder / "ledger").is_dir():
        _lock(folder).release()
    _clear(folder)
    if (folder / "ledger").is_dir():
        shutil.rmtree(folder / "ledger")
    (folder / "ledger").unlink(missing_ok=True)


@contextmanager
def held_run_folder(folder: Path, overwrite: bool, resuming: bool) -> Iterator[BaseFileLock]:
    """Claim the folder for a run of edits, and hold the lock of its ledger inside; other runs are refused.

    Args:
        folder: The run's folder.
        overwrite: Whether to remove an earlier run.
        resuming: Whether to resume the run in it. Only half-written files of killed runs are removed then.

    Raises:
        RunFolderError: Like :func:`claim_run_folder`.
        OptionError: Like :func:`claim_run_folder`.
    """
    check_links(folder)
    if not resuming:
        _check_claim(folder, overwrite)
    make_folder(folder / "ledger")
    lock = _lock(folder)
    try:
        if resuming:
            _clear_leftovers(folder)
        else:
            _check_claim(folder, overwrite)  # another run may have started and ended in between
            _clear(folder)
        yield lock
    finally:
        lock.release(force=True)


def check_links(folder: Path) -> None:
    """Refuse a run folder to write to in which files of a run are links, pipes, devices, sockets, or folders.

    The folder itself may be a link.

    Raises:
        OptionError: Naming the file.
    """
    for path in _own_files(folder):
        check_own(path)
    for name in (*_RUN_FILES, *_IN_LEDGER):
        path = folder / name
        if path.exists() and path.is_dir() != (name in _FOLDERS):
            raise OptionError(f"{path}: a {'folder' if path.is_dir() else 'file'}, where a run has none; remove it")


def check_files(folder: Path) -> None:
    """Refuse a run folder to read from in which files of a run are pipes, devices or sockets.

    Raises:
        RunFolderError: Naming the file.
    """
    for path in _own_files(folder):
        try:
            kind = kind_of(path.stat().st_mode)
        except OSError:
            continue
        if kind not in (None, FOLDER):
            raise RunFolderError(f"{path}: {kind}, where a run has a file or folder; remove it")


def read_config(folder: Path) -> dict[str, Any] | None:
    """Read the configuration of a run. ``None``: there is none.

    Raises:
        RunFolderError: If it is not a mapping of sections to options.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error}); remove it, or give --force") from error
    if not isinstance(content, Mapping):
        raise RunFolderError(f"{path}: no configuration of a run, which has sections with options; remove it")
    for name, section in content.items():
        if name in ("model", "data", "trainer") and section is not None and not isinstance(section, Mapping):
            raise RunFolderError(f"{path}, section '{name}': expected options, got {section!r:.80}; remove the file")
    return dict(content)


def _own_files(folder: Path) -> Iterator[Path]:
    """Yield entries of a run folder with the names of a run's files, at any depth, without following links."""
    for name in _RUN_FILES:
        path = folder / name
        if not os.path.lexists(path):
            continue
        yield path
        if path.is_dir() and not path.is_symlink():
            for above, folders, files in os.walk(path):
                yield from (Path(above) / entry for entry in (*folders, *files))


def _check_claim(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is a file; choose another --trainer.default_root_dir")
    names = {path.name for path in folder.iterdir()}
    kept = {"results.json"} & names
    if (folder / "ledger" / "edits.jsonl").exists():
        kept.add("ledger")
    if foreign := {name for name in names - set(_RUN_FILES) if not _LEFTOVER.fullmatch(name)}:
        kept |= foreign
    if kept and not overwrite:
        raise RunFolderError(
            f"{folder} is not empty ({', '.join(sorted(kept)[:5])}); choose another --trainer.default_root_dir, "
            "or add --overwrite, which replaces an earlier run there and nothing else"
        )


def _lock(folder: Path) -> BaseFileLock:
    """Take the lock of a run's ledger."""
    lock = lock_of(folder / "ledger")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunFolderError(f"{folder}: another run is writing there; choose another folder") from error
    return lock


def _clear(folder: Path) -> None:
    """Remove an earlier run, but not the lock of its ledger, which is held."""
    _clear_leftovers(folder)
    for path in (*(folder / name for name in _RUN_FILES if name != "ledger"), *(folder / "ledger").glob("*")):
        if path.name == ".lock":
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _clear_leftovers(folder: Path) -> None:
    """Remove half-written files of killed runs. The caller holds the lock, so no run is writing them."""
    for place in (folder, folder / "ledger", folder / "ledger" / "shards", folder / "figures"):
        for path in place.glob(".*.tmp"):
            if _LEFTOVER.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                path.unlink(missing_ok=True)
