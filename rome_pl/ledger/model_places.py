"""The location of a run's model: recorded with the run, and searched when its ledger is used."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rome_pl.errors import RomeError, SourceError
from rome_pl.files.whole_files import local_path
from rome_pl.model.language_model import LanguageModel

__all__ = ["find_model", "noted_places"]


def noted_places(source: str, run: Path) -> dict[str, str]:
    """Return the location of a source for the manifest of a run. Empty unless it is a file or folder.

    Args:
        source: The source as given, possibly relative to the working folder.
        run: The run's folder.

    Returns:
        ``folder``, the absolute path, and ``from_run``, the path relative to the run's folder, which stays valid if
        both are moved together.
    """
    path = local_path(source)
    if not path.exists():
        return {}
    absolute = path.resolve()
    try:
        return {"folder": str(absolute), "from_run": os.path.relpath(absolute, run.resolve())}
    except ValueError:  # on another drive
        return {"folder": str(absolute)}


def find_model(
    about: Mapping[str, Any],
    run: Path,
    load: Callable[[str], LanguageModel],
    pretrained: str | None = None,
    kind: str = "ledger",
) -> LanguageModel:
    """Load the model that a run began with, even if it was moved.

    Without ``pretrained`` these locations are tried in order: the path relative to the run's folder, the absolute path,
    the source as given, and that path below the parent folders of the run. The first one with the run's model is used.
    A model with its weights but another config or tokenizer is used only if there is no exact match.

    Args:
        about: The model's section of the run's manifest.
        run: The run's folder.
        load: Loads a source.
        pretrained: Location of the model. ``None`` (default): as recorded by the run.
        kind: Kind of object that was made from the model, for messages.

    Raises:
        SourceError: If it is not found, with all locations that were tried and the option that names another.
    """
    tried: list[str] = []
    other, alike = False, None
    for place in [pretrained] if pretrained is not None else _places(about, run):
        try:
            loaded = load(place)
        except RomeError as error:
            tried.append(f"{place}: {error}")
            continue
        if loaded.fingerprint == about["fingerprint"]:
            if _same_rules(loaded, about):
                return loaded
            alike = alike or loaded
            continue
        other = True
        tried.append(f"{place}: {loaded.fingerprint[:12]}")
    if alike is not None:  # the caller reports the difference
        return alike
    fault = f"a {kind} of another model than the one loaded" if other else f"the model of this {kind} was not found"
    raise SourceError(
        f"{run}: {fault} (it began with {about['source']}, {str(about['fingerprint'])[:12]}). Say where that one is "
        f"by --pretrained. Tried {'; '.join(tried)}"
    )


def _same_rules(loaded: LanguageModel, about: Mapping[str, Any]) -> bool:
    """Whether config and tokenizer are the recorded ones. Manifests of earlier versions lack them."""
    known = about.get("config") is not None
    return not known or (loaded.config_fingerprint, loaded.tokenizer_fingerprint) == (
        about["config"],
        about["tokenizer"],
    )


def _places(about: Mapping[str, Any], run: Path) -> list[str]:
    source, run = str(about["source"]), run.resolve()
    noted = [run / about["from_run"]] if about.get("from_run") else []
    noted += [Path(about["folder"])] if about.get("folder") else []
    places = [str(path.resolve()) for path in noted if path.exists()]
    if source.startswith("package:") or local_path(source).is_absolute():
        return list(dict.fromkeys([*places, source]))
    here = Path(source)
    below = [folder / here for folder in (run, *run.parents) if (folder / here).exists()]
    places += [str(here.resolve()) if here.exists() else source]
    return list(dict.fromkeys([*places, *map(str, below)]))
