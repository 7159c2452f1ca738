"""How a pass over text sums second moments, and what it gives."""

from dataclasses import dataclass
from pathlib import Path

from rome_pl.second_moments.moment_sums import Place
from rome_pl.second_moments.second_moment import MomentInfo

__all__ = ["Finished", "PassOptions"]


@dataclass(frozen=True)
class PassOptions:
    """How second moments are summed.

    Args:
        tokens: Number of key vectors. ``None`` (default): 30 per dimension.
        block_length: Tokens of a row, at most the model's context.
        stop_agreement: The pass ends early where two halves of the text agree by at least this, at every layer (mean
            cosine of ``C⁻¹k`` over probe keys); above 1 never.
        split_half: Whether to sum the text in two halves. Without it, memory is halved and no agreement is measured.
        accumulate_on: Where to keep the sums; ``auto`` prefers the model's device.
        layers_per_pass: Largest number of layers in one pass over the text; others follow in further passes. ``None``
            (default): all.
        save_every: Tokens between two saves of a process's unfinished sums. ``None`` (default): saving takes at most 5
            % of the time.
    """

    tokens: int | None = None
    block_length: int = 512
    stop_agreement: float = 0.95
    split_half: bool = True
    accumulate_on: Place = "auto"
    layers_per_pass: int | None = None
    save_every: int | None = None


@dataclass(frozen=True)
class Finished:
    """A second moment that was found in the cache or computed.

    Args:
        layer: The decoder layer.
        path: The artefact.
        info: Its description.
        cached: Whether it was there before.
    """

    layer: int
    path: Path
    info: MomentInfo
    cached: bool = False
