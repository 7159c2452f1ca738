"""Table of the published variants of the closed form."""

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["PRESETS", "KeyChoice", "Preset", "PresetName"]


KeyChoice = Literal["mean", "bare", "balanced"]
"""The mean key over contexts, the bare prompt's key, or the one between them by :func:`balance`."""


PresetName = Literal[
    "rome", "r_rome", "p_rome", "balanced", "easyedit", "emmet", "memit", "accumulated", "alphaedit", "lifelong"
]


@dataclass(frozen=True)
class Preset:
    """A published variant.

    Args:
        name: What it is called.
        shape: The key that shapes the update, ``K_u``.
        at: The key at which the value is asserted, ``K_*``.
        mom2_adjustment: Whether the metric uses the second moment; otherwise it is the identity.
        value: The value asserted: ``bare``, the optimised offset on top of the bare prompt's output, as published; or
            ``own``, on top of the output at the asserted key, so that the residual is the offset itself.
        metric: How the second moment is used.
        ridge: λ.
        mom2_update_weight: ``n_0``: number of keys that the second moment counts for, relative to λ and the keys of
            other edits.
        shares: How several layers share an offset, see :mod:`rome_pl.write.layer_shares`: evenly, or by how specific
            each layer's key is.
    """

    name: PresetName
    shape: KeyChoice
    at: KeyChoice
    mom2_adjustment: bool
    value: Literal["bare", "own"] = "bare"
    metric: Literal["second_moment", "past_keys", "null_space"] = "second_moment"
    ridge: float = 0.0
    mom2_update_weight: float = 1.0
    shares: Literal["even", "specific"] = "even"


_PRESETS = (
    # Meng et al. 2022, as their public code does it: the residual is taken at the bare prompt's key.
    Preset("rome", shape="mean", at="bare", mom2_adjustment=True),
    # Gupta et al. 2024, "Rebuilding ROME": one key everywhere.
    Preset("r_rome", shape="mean", at="mean", mom2_adjustment=True),
    # The same paper: the bare prompt's key everywhere.
    Preset("p_rome", shape="bare", at="bare", mom2_adjustment=True),
    # Ours: the offset as it was optimised, added in full under the bare prompt and under the other contexts alike.
    Preset("balanced", shape="balanced", at="balanced", mom2_adjustment=True, value="own"),
    # EasyEdit's shipped settings: ROME's keys without statistics.
    Preset("easyedit", shape="mean", at="bare", mom2_adjustment=False),
    # Gupta et al. 2024, "A Unified Framework for Model Editing", Eq. 10; λ and n_0 as in their settings for GPT-2 XL.
    Preset(
        name="emmet",
        shape="mean",
        at="mean",
        mom2_adjustment=True,
        value="own",
        ridge=0.1,
        mom2_update_weight=1000.0,
    ),
    # Meng et al. 2023, Eq. 14 and Algorithm 1; n_0 as published for GPT-J.
    Preset(
        name="memit",
        shape="mean",
        at="mean",
        mom2_adjustment=True,
        value="own",
        ridge=1.0,
        mom2_update_weight=15000.0,
    ),
    # ROME by recursive least squares: keys of earlier edits join the metric, and are disturbed as little as text.
    Preset(
        name="accumulated",
        shape="mean",
        at="mean",
        mom2_adjustment=True,
        value="own",
        metric="past_keys",
        mom2_update_weight=1000.0,
    ),
    # Fang et al. 2025, Eq. 14.
    Preset(
        name="alphaedit", shape="mean", at="mean", mom2_adjustment=True, value="own", metric="null_space", ridge=1.0
    ),
    # Ours, for long streams: balanced keys in the metric of "accumulated", and shares that disturb text least.
    Preset(
        name="lifelong",
        shape="balanced",
        at="balanced",
        mom2_adjustment=True,
        value="own",
        metric="past_keys",
        mom2_update_weight=1000.0,
        shares="specific",
    ),
)
PRESETS: dict[PresetName, Preset] = {preset.name: preset for preset in _PRESETS}
assert set(PRESETS) == set(get_args(PresetName))
