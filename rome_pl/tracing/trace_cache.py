"""Traces that earlier runs have made: a fact is traced once under the same settings."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from rome_pl.files.json_lines_cache import JsonLinesCache
from rome_pl.files.schemas import Number
from rome_pl.model.language_model import LanguageModel
from rome_pl.tracing.trace import KINDS, Fact, Trace
from rome_pl.utils.environment import cache_folder
from rome_pl.utils.hashing import content_key

__all__ = ["KnownTraces"]


class TraceEntry(TypedDict):
    """A fact's trace in the cache."""

    clean: Number
    corrupted: Number
    restored: dict[str, list[list[Number]]]


TRACE: TypeAdapter[Any] = TypeAdapter(TraceEntry)


class KnownTraces:
    """The traces of one model under one choice of settings, in a file below the cache folder.

    An interrupted run resumes with them, and more facts or other trial edits cost only their own traces.

    Args:
        language_model: The model. If its weights have changed since it was loaded, nothing is kept or found.
        settings: Everything else that a trace depends on.
    """

    def __init__(self, language_model: LanguageModel, *settings: object) -> None:
        key = language_model.measurement_key([str(setting) for setting in settings])
        self._usable = language_model.as_first_seen
        self.path: Path = cache_folder() / "traces" / f"{key}.jsonl"
        self._cache = JsonLinesCache(self.path, TRACE)
        self._known = {name: _trace(entry) for name, entry in self._cache.read().items()} if self._usable else {}

    def find(self, fact: Fact) -> Trace | None:
        """Return the fact's trace, if it is known."""
        return self._known.get(_name(fact))

    def keep(self, fact: Fact, trace: Trace) -> None:
        """Remember a trace."""
        if not self._usable:
            return
        name = _name(fact)
        self._known[name] = trace
        restored = {kind: table.tolist() for kind, table in trace.restored.items()}
        self._cache.append({name: {"clean": trace.clean, "corrupted": trace.corrupted, "restored": restored}})


def _trace(entry: dict[str, Any]) -> Trace:
    tables = {kind: entry["restored"][kind] for kind in KINDS if kind in entry["restored"]}
    restored = {kind: torch.tensor(table, dtype=torch.float64) for kind, table in tables.items()}
    return Trace(float(entry["clean"]), float(entry["corrupted"]), restored)


def _name(fact: Fact) -> str:
    return content_key(asdict(fact))
