"""The folder of a run: what it may hold before a run begins, and what a new run replaces."""

import shutil
from pathlib import Path

from filelock import Timeout

from rome_pl.errors import OptionError, RomeError
from rome_pl.ledger import lock_of

__all__ = ["RunFolderError", "can_resume", "check_save_folder", "claim_run_folder"]

_RUN_FILES = (
    *("config.yaml", "manifest.json", "results.json", "ledger", "tensorboard", "figures"),
    *("records.jsonl", "table.md", "table.csv", "report.html", "easyedit.json", "kmeng01.json"),
    "edit.yaml",
)


class RunFolderError(RomeError):
    """A run folder that holds an earlier run."""


def can_resume(folder: Path, resume: str | None, overwrite: bool) -> bool:
    """Whether there is a run to go on with, and it is asked for."""
    if resume is None:
        return False
    if overwrite:
        raise OptionError("resume goes on with an earlier run, overwrite replaces it; give one of the two")
    there = (folder / "ledger" / "edits.jsonl").is_file()
    if resume != "auto" and not there:
        raise RunFolderError(f"resume: {resume} holds no run (ledger/edits.jsonl); give the folder of one, or auto")
    if resume != "auto" and Path(resume).expanduser().resolve() != folder.resolve():
        raise OptionError(f"resume: {resume} is not the run folder; set trainer.default_root_dir to it")
    return there


def check_save_folder(folder: Path, sequential: bool, overwrite: bool) -> None:
    """Refuse a folder for the final model that holds something, and a run that has no final model."""
    if not sequential:
        raise OptionError("save_model: in single-edit mode every edit is taken back; set model.sequential_edit: true")
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"save_model: {folder} is a file; give a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise RunFolderError(f"save_model: {folder} is not empty; choose another folder, or add --overwrite")


def claim_run_folder(folder: Path, overwrite: bool) -> None:
    """Make sure that the folder holds nothing but what a run may write.

    Files that a run leaves when it fails before its first edit are no earlier run.
    """
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()}
    kept = {"results.json"} & names
    if (folder / "ledger" / "edits.jsonl").exists():
        kept.add("ledger")
    if foreign := names - set(_RUN_FILES):
        kept |= foreign
    if kept and not overwrite:
        raise RunFolderError(
            f"{folder} is not empty ({', '.join(sorted(kept)[:5])}); choose another --trainer.default_root_dir, "
            "or add --overwrite, which replaces an earlier run there and nothing else"
        )
    try:
        with lock_of(folder / "ledger").acquire(timeout=0):
            pass
    except Timeout as error:
        raise RunFolderError(f"{folder}: another run is writing there; choose another folder") from error
    except OSError:  # no ledger
        pass
    for path in (folder / name for name in _RUN_FILES):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
