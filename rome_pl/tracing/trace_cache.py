"""Traces that other runs have made: a fact that was traced under the same settings is not traced again."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from rome_pl.files.checksums import is_intact, sealed
from rome_pl.files.schemas import Name, Number, checked, parsed
from rome_pl.files.whole_files import read_regular
from rome_pl.model.language_model import LanguageModel
from rome_pl.tracing.trace import KINDS, Fact, Trace
from rome_pl.utils.environment import cache_folder
from rome_pl.utils.hashing import content_key

__all__ = ["KnownTraces"]


class TraceLine(TypedDict):
    """A fact's trace in the cache."""

    fact: Name
    clean: Number
    corrupted: Number
    restored: dict[str, list[list[Number]]]


TRACE: TypeAdapter[Any] = TypeAdapter(TraceLine)


class KnownTraces:
    """Keeps the traces of one model under one choice of settings, below the cache folder, a line for each.

    An interrupted run so goes on where it was, and more facts or other trial edits cost only what is new.

    Args:
        language_model: The model. With weights that are not as they were first seen nothing is kept or found.
        settings: Whatever else a trace depends on.
    """

    def __init__(self, language_model: LanguageModel, *settings: object) -> None:
        key = language_model.measurement_key([str(setting) for setting in settings])
        self._usable = language_model.as_first_seen
        self.path: Path = cache_folder() / "traces" / f"{key}.jsonl"
        self._known = self._read() if self._usable else {}

    def find(self, fact: Fact) -> Trace | None:
        """The fact's trace, if it is known."""
        return self._known.get(_name(fact))

    def keep(self, fact: Fact, trace: Trace) -> None:
        """Remember a trace."""
        if not self._usable:
            return
        self._known[_name(fact)] = trace
        line = {"fact": _name(fact), "clean": trace.clean, "corrupted": trace.corrupted}
        line["restored"] = {kind: table.tolist() for kind, table in trace.restored.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")), self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(sealed(line)))  # the line before may have been cut short

    def _read(self) -> dict[str, Trace]:
        known: dict[str, Trace] = {}
        try:
            lines = read_regular(self.path).split(b"\n")
        except OSError:  # not there
            return known
        for line in lines:
            try:
                content: dict[str, Any] = parsed(line)
                checked(TRACE, content)
                if not is_intact(content):
                    continue
                tables = {kind: content["restored"][kind] for kind in KINDS if kind in content["restored"]}
                restored = {kind: torch.tensor(table, dtype=torch.float64) for kind, table in tables.items()}
                known[content["fact"]] = Trace(float(content["clean"]), float(content["corrupted"]), restored)
            except ValueError:  # cut short, when a run was killed, or damaged: it is traced again
                continue
        return known


def _name(fact: Fact) -> str:
    return content_key(asdict(fact))
