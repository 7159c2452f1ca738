"""Whether the options of :class:`rome_pl.RomeModule` are within their ranges."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from rome_pl.errors import OptionError
from rome_pl.search.value_search import SearchOptions
from rome_pl.write.presets import PRESETS

__all__ = ["check_options"]

_LEAST = {
    "v_num_grad_steps": 1,
    "v_lr": 0,
    "v_weight_decay": 0,
    "clamp_norm_factor": 0,
    "kl_factor": 0,
    "mom2_n_samples": 1,
    "mom2_update_weight": 0,
    "nullspace_threshold": 0,
    "L2": 0,
    "stop_loss": 0,
    "stop_probability": 0,
    "contexts_per_step": 0,
    "retry_below": 0,
}

_POSITIVE = ("anchor_norm", "largest_update")

_RETRY = {field.name for field in fields(SearchOptions)} - {"seed"} | {"layers"}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse what cannot be meant.

    Raises:
        OptionError: For the first such option, with what to do.
    """
    if options["keep_original_weight"] is not None:
        raise OptionError(
            "keep_original_weight is not an option here: 'sequential_edit: false' evaluates each edit on the original "
            "weights, 'sequential_edit: true' keeps every edit"
        )
    _check_layers(options["layers"])
    for other in options["retries"]:
        if unknown := sorted(set(other) - _RETRY):
            raise OptionError(f"retries: {unknown[0]} is no option of the search; expected some of {sorted(_RETRY)}")
        _check_layers(other.get("layers"))
    if options["preset"] not in PRESETS:
        raise OptionError(f"preset: expected one of {sorted(PRESETS)}, got {options['preset']!r}")
    for given in (options, *options["retries"]):
        for name, least in _LEAST.items():
            value = given.get(name)
            if value is not None and not least <= value < math.inf:
                raise OptionError(f"{name}: expected a number from {least} on, got {value}")
    for name in _POSITIVE:
        value = options[name]
        if value is not None and not 0 < value < math.inf:
            raise OptionError(f"{name}: expected a number above 0, got {value}")


def _check_layers(layers: Any) -> None:
    if layers is None:
        return
    if not isinstance(layers, list | tuple) or not layers or len(set(layers)) < len(layers):
        raise OptionError(f"layers: expected one layer, or several different ones, got {layers}")
