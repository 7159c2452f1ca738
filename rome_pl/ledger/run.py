"""A finished or interrupted run: its folder, its base model, its records by name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rome_pl.encoding.chat_template import ChatForm
from rome_pl.files.whole_files import local_path
from rome_pl.ledger.edit_log import LedgerError
from rome_pl.ledger.model_places import find_model
from rome_pl.ledger.replay import read_manifest
from rome_pl.ledger.run_folder import check_files
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.loading import load_language_model

__all__ = ["base_model", "chat_of", "known_names", "run_folder"]


def run_folder(ledger: str) -> Path:
    """Return the folder of a run, given the folder or its ``ledger/``.

    Raises:
        RunFolderError: If files of the run are pipes, devices or sockets.
    """
    folder = local_path(ledger)
    run = folder.parent if folder.name == "ledger" and (folder / "edits.jsonl").is_file() else folder
    check_files(run)
    return run


def base_model(run: Path, allow_pickle: bool, pretrained: str | None = None) -> LanguageModel:
    """Load the unedited model that a run began with, in the run's dtype and with its form of prompts.

    Args:
        run: The run's folder.
        allow_pickle: Whether to read weights that are not safetensors.
        pretrained: Location of the model. ``None`` (default): see :func:`rome_pl.ledger.model_places.find_model`.

    Raises:
        SourceError: If it is not found, or another model is.
    """
    manifest = read_manifest(run)
    about = manifest["model"]
    dtype = str(about["dtype"]).removeprefix("torch.")
    loaded = find_model(about, run, lambda source: load_language_model(source, dtype, allow_pickle), pretrained)
    return loaded.with_chat(chat_of(manifest))


def chat_of(manifest: Mapping[str, Any]) -> ChatForm | None:
    """Return how prompts of a run become conversations. ``None``: they are plain."""
    chat = manifest["model"].get("chat")
    return None if chat is None else ChatForm(**chat)


def known_names(cases: str, known: Mapping[str, Any], run: Path) -> Sequence[str]:
    """Split comma-separated names of records, without repetitions.

    Raises:
        LedgerError: If the run has no such record.
    """
    names = [name.strip() for name in cases.split(",") if name.strip()]
    if missing := [name for name in names if name not in known]:
        raise LedgerError(f"{run}: the ledger has no record {', '.join(missing)}; see rome-pl show --ledger {run}")
    return list(dict.fromkeys(names))
