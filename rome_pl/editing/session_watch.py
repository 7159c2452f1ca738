"""Is a model that is edited still healthy? What holds for every model, and what only edits can do to one."""

from dataclasses import dataclass
from typing import Any

from rome_pl.editing.retention import retained_share
from rome_pl.editing.session import EditSession
from rome_pl.metrics.model_health import ModelWatch

__all__ = ["EditBounds", "SessionWatch"]

MOST_DROPPED = 0.2
"""A stream of which a larger share had to be dropped stops: the preset does not suit the model."""

FEW = 10
"""Of fewer edits than these a share means nothing: they count as so many."""


@dataclass(frozen=True)
class EditBounds:
    """What a model that is edited keeps to besides; see :class:`rome_pl.callbacks.StateCheck` for what each means.

    Raises:
        ValueError: If one is out of range.
    """

    largest_spectral_change: float | None
    least_retained: float | None
    retention_sample: int

    def __post_init__(self) -> None:
        if self.largest_spectral_change is not None and not self.largest_spectral_change > 0:
            raise ValueError(f"largest_spectral_change: expected a positive number, got {self.largest_spectral_change}")
        if self.least_retained is not None and not 0 <= self.least_retained <= 1:
            raise ValueError(f"least_retained: expected a share in [0, 1], got {self.least_retained}")
        if self.retention_sample < 1:
            raise ValueError(f"retention_sample: expected a number from 1 on, got {self.retention_sample}")

    @property
    def only_for_edits(self) -> str | None:
        """Why the training of another module cannot keep to them, if so."""
        if self.largest_spectral_change is not None:
            return "largest_spectral_change is of rewrite layers, and this module has none; leave it out"
        if self.least_retained is not None:
            return "least_retained is of edits, and this module makes none; leave it out"
        return None


class SessionWatch:
    """Looks at the model of a sequential run.

    Args:
        session: The run.
        watch: Knows what the model was at first.
        bounds: What counts as bad besides.
    """

    def __init__(self, session: EditSession, watch: ModelWatch, bounds: EditBounds) -> None:
        self.session, self._watch, self._bounds = session, watch, bounds
        self._dropped = 0

    def look(self) -> dict[str, Any]:
        """The model's state; ``failures`` says what of it is bad."""
        bounds, found = self._bounds, self._watch.look()
        if bounds.largest_spectral_change is not None:
            found["spectral_change"] = spectral = self.session.layers.spectral_change
            if not spectral <= bounds.largest_spectral_change:
                found["failures"].append(
                    f"the change's largest singular value is {spectral:.2f} of the weight's "
                    f"(largest_spectral_change: {bounds.largest_spectral_change})"
                )
        if bounds.least_retained is not None:
            found["retained"] = retained = retained_share(self.session, bounds.retention_sample)
            if retained is not None and retained < bounds.least_retained:
                found["failures"].append(
                    f"{retained:.0%} of earlier edits are retained (least_retained: {bounds.least_retained})"
                )
        return found

    def verdict(self, dropped: int, failures: list[str]) -> str | None:
        """Why the stream has to end after a recovery, if so.

        Args:
            dropped: How many edits this recovery has dropped.
            failures: What is bad after it.
        """
        self._dropped += dropped
        done = len(self.session.edits)
        if self._dropped > MOST_DROPPED * max(done, FEW):
            return (
                f"{self._dropped} of {done} edits had to be dropped to keep the model healthy: the preset does not "
                "suit this model; try another preset or layer, or fewer edits"
            )
        return f"the model's state stays bad without them: {'; '.join(failures)}" if failures else None
