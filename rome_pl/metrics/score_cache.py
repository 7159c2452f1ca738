"""Measuring requests on an unedited model, once: what was measured is kept and shared by all runs."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from rome_pl.files.checksums import is_intact, sealed
from rome_pl.files.schemas import checked, parsed
from rome_pl.files.whole_files import read_regular, whole_file
from rome_pl.metrics.probes import MEASURED_TOGETHER, ProbeScores, probe_scores
from rome_pl.metrics.score_forms import SCORES, scores_from_json
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest
from rome_pl.utils.environment import cache_folder

__all__ = ["KnownScores"]


class KnownScores:
    """Probe scores of an unedited model, kept in the cache by the content of the record.

    A file for each model, with its config, tokenizer, precision and device kind; a record's entry depends on everything
    that is measured for it, whatever its number or source. A damaged entry is measured again.

    Args:
        language_model: The model, before any edit.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self.language_model = language_model
        key = language_model.measurement_key()
        self.path: Path = cache_folder() / "scores" / f"{key}.json"
        self._known = self._read()

    @cached_property
    def _usable(self) -> bool:
        """Whether what is known is about this model: it may have been edited by other means. Looked at once."""
        return self.language_model.as_first_seen

    def measure(self, requests: Sequence[EditRequest]) -> list[ProbeScores]:
        """The scores of requests; those that are not known yet are measured and kept.

        Args:
            requests: The requests. The model has to be as it was loaded.
        """
        if not self._usable:
            return probe_scores(self.language_model, requests)
        keys = [_content(request) for request in requests]
        missing = [place for place, key in enumerate(keys) if not _is_whole(self._known.get(key))]
        found: dict[str, dict[str, Any]] = {}
        for start in range(0, len(missing), MEASURED_TOGETHER):
            places = missing[start : start + MEASURED_TOGETHER]
            for place, scores in zip(
                places, probe_scores(self.language_model, [requests[place] for place in places]), strict=True
            ):
                found[keys[place]] = sealed(asdict(scores))
        if found:
            self._keep(found)
        return [scores_from_json(self._known[key]) for key in keys]

    def _keep(self, found: dict[str, dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):  # other runs may have added to it
            self._known = self._read() | json.loads(json.dumps(found))
            with whole_file(self.path) as work:
                work.write_text(json.dumps(self._known), encoding="utf-8")

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            known = parsed(read_regular(self.path), finite=False)
        except (OSError, ValueError):  # not there, or of no use: it is measured again
            return {}
        return known if isinstance(known, dict) else {}


def _is_whole(content: Any) -> bool:
    """Whether what the cache holds are scores, as they were written there."""
    try:
        checked(SCORES, content)
    except ValueError:
        return False
    return is_intact(content)


def _content(request: EditRequest) -> str:
    measured = asdict(request) | {"case_id": 0, "relation": None, "source": None, "notes": ()}
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:32]
