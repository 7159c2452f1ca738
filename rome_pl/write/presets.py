"""Table of the published variants of the closed form."""

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["PRESETS", "KeyChoice", "Preset", "PresetName"]


KeyChoice = Literal["mean", "bare", "balanced"]
"""The mean key over contexts, the bare prompt's key, or the one between them by :func:`balance`."""


@dataclass(frozen=True)
class Preset:
    """A published variant.

    Args:
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

    shape: KeyChoice
    at: KeyChoice
    mom2_adjustment: bool
    value: Literal["bare", "own"] = "bare"
    metric: Literal["second_moment", "past_keys", "null_space"] = "second_moment"
    ridge: float = 0.0
    mom2_update_weight: float = 1.0
    shares: Literal["even", "specific"] = "even"


PresetName = Literal[
    "rome", "r_rome", "p_rome", "balanced", "easyedit", "emmet", "memit", "accumulated", "alphaedit", "lifelong"
]


PRESETS: dict[PresetName, Preset] = {
    # Meng et al. 2022, as in their public code: the residual is taken at the bare prompt's key.
    "rome": Preset(shape="mean", at="bare", mom2_adjustment=True),
    # Gupta et al. 2024, "Rebuilding ROME": one key everywhere.
    "r_rome": Preset(shape="mean", at="mean", mom2_adjustment=True),
    # The same paper: the bare prompt's key everywhere.
    "p_rome": Preset(shape="bare", at="bare", mom2_adjustment=True),
    # Ours: the optimised offset is added in full both under the bare prompt and under the other contexts.
    "balanced": Preset(shape="balanced", at="balanced", mom2_adjustment=True, value="own"),
    # EasyEdit's shipped settings: ROME's keys without statistics.
    "easyedit": Preset(shape="mean", at="bare", mom2_adjustment=False),
    # Gupta et al. 2024, "A Unified Framework for Model Editing", Eq. 10; λ and n_0 as in their settings for GPT-2 XL.
    "emmet": Preset(shape="mean", at="mean", mom2_adjustment=True, value="own", ridge=0.1, mom2_update_weight=1000.0),
    # Meng et al. 2023, Eq. 14 and Algorithm 1; n_0 as published for GPT-J.
    "memit": Preset(shape="mean", at="mean", mom2_adjustment=True, value="own", ridge=1.0, mom2_update_weight=15000.0),
    # ROME by recursive least squares: keys of earlier edits join the metric, so that they are disturbed as little as
    # text.
    "accumulated": Preset(
        shape="mean", at="mean", mom2_adjustment=True, value="own", metric="past_keys", mom2_update_weight=1000.0
    ),
    # Fang et al. 2025, Eq. 14.
    "alphaedit": Preset(shape="mean", at="mean", mom2_adjustment=True, value="own", metric="null_space", ridge=1.0),
    # Ours, for long streams: balanced keys in the metric of "accumulated", and shares that disturb text least.
    "lifelong": Preset(
        shape="balanced",
        at="balanced",
        mom2_adjustment=True,
        value="own",
        metric="past_keys",
        mom2_update_weight=1000.0,
        shares="specific",
    ),
}
assert set(PRESETS) == set(get_args(PresetName))
