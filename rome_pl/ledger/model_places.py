"""Where the model of a run lies: noted when the run is made, and looked for when its ledger is used."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rome_pl.errors import RomeError, SourceError
from rome_pl.files.whole_files import local_path
from rome_pl.model.language_model import LanguageModel

__all__ = ["find_model", "noted_places"]


def noted_places(source: str, run: Path) -> dict[str, str]:
    """Where a source lies, for the manifest of a run; empty unless it is a file or folder.

    Args:
        source: The source as it was given, perhaps relative to the present folder.
        run: The run's folder.

    Returns:
        ``folder``, the absolute path, and ``from_run``, the path from the run's folder on, which holds where both were
        moved together.
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
    """Load the model that a run began with, wherever it lies now.

    Without ``pretrained`` these places are tried, in this order: the path from the run's folder on, the absolute path,
    the source as it was given, and that path below the folders that the run lies in. The first that holds the run's
    model is it; a model with its weights and another config or tokenizer only if no place holds that one.

    Args:
        about: What the run's manifest says of its model.
        run: The run's folder.
        load: Loads a source.
        pretrained: Where the model lies; ``None`` (default): as the run notes it.
        kind: What was made of the model, for messages.

    Raises:
        SourceError: If no place holds it, with all that were tried and the option that names another.
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
    if alike is not None:  # whoever uses it says what differs
        return alike
    fault = f"a {kind} of another model than the one loaded" if other else f"the model of this {kind} was not found"
    raise SourceError(
        f"{run}: {fault} (it began with {about['source']}, {str(about['fingerprint'])[:12]}). Say where that one is "
        f"by --pretrained. Tried {'; '.join(tried)}"
    )


def _same_rules(loaded: LanguageModel, about: Mapping[str, Any]) -> bool:
    """Whether config and tokenizer are those on record; manifests of earlier versions do not tell them."""
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
