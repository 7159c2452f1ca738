"""Probe scores of unedited models: each request is measured once, and all runs share the result."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from rome_pl.files.json_lines_cache import JsonLinesCache
from rome_pl.metrics.probes import MEASURED_TOGETHER, ProbeScores, probe_scores
from rome_pl.metrics.score_forms import SCORES, scores_from_json
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest
from rome_pl.utils.environment import cache_folder

__all__ = ["KnownScores"]


class KnownScores:
    """Probe scores of an unedited model, kept in the cache by the content of the request.

    Each combination of model, config, tokenizer, precision and kind of device has a file of its own. An entry depends
    on everything that is measured for the request, but not on its ``case_id``, relation, source or notes.

    Args:
        language_model: The model, before any edit.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self.language_model = language_model
        self.path: Path = cache_folder() / "scores" / f"{language_model.measurement_key()}.jsonl"
        self._cache = JsonLinesCache(self.path, SCORES)
        self._known = {key: scores_from_json(entry) for key, entry in self._cache.read().items()}

    @cached_property
    def _usable(self) -> bool:
        """Whether the model has the weights it was loaded with. Checked once."""
        return self.language_model.as_first_seen

    def measure(self, requests: Sequence[EditRequest]) -> list[ProbeScores]:
        """Return the scores of requests; measure and keep those that are not known yet.

        Args:
            requests: The requests. The model has to be as it was loaded.
        """
        if not self._usable:
            return probe_scores(self.language_model, requests)
        keys = [_content(request) for request in requests]
        missing = [index for index, key in enumerate(keys) if key not in self._known]
        found: dict[str, ProbeScores] = {}
        for start in range(0, len(missing), MEASURED_TOGETHER):
            group = missing[start : start + MEASURED_TOGETHER]
            measured = probe_scores(self.language_model, [requests[index] for index in group])
            found |= zip([keys[index] for index in group], measured, strict=True)
        if found:
            self._cache.append({key: asdict(scores) for key, scores in found.items()})
            self._known |= found
        return [self._known[key] for key in keys]


def _content(request: EditRequest) -> str:
    measured = asdict(request) | {"case_id": 0, "relation": None, "source": None, "notes": ()}
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:32]
