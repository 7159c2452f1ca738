"""What edits cost the rest of a model: the facts next to theirs, and ordinary text."""

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Damage", "DamageBounds"]

FEWEST = 5
"""Of fewer records a mean loss means little."""


@dataclass(frozen=True)
class DamageBounds:
    """What edits may cost; see :class:`rome_pl.callbacks.DamageCheck` for what each means.

    Raises:
        ValueError: If one is out of range.
    """

    largest_neighbour_loss: float | None
    largest_divergence: float | None

    def __post_init__(self) -> None:
        if self.largest_neighbour_loss is not None and not 0 <= self.largest_neighbour_loss < 1:
            raise ValueError(f"largest_neighbour_loss: expected a share in [0, 1), got {self.largest_neighbour_loss}")
        if self.largest_divergence is not None and not 0 < self.largest_divergence < math.inf:
            raise ValueError(f"largest_divergence: expected a positive number, got {self.largest_divergence}")


@dataclass(frozen=True)
class Damage:
    """What some edits cost.

    Args:
        edits: Number of edits in force that were looked at.
        records: Number of them with neighbourhood prompts.
        before: NS of these on the unedited model.
        after: NS of these with their edits.
        standard_error: Of the mean loss ``before - after``, over records.
        divergence: ``KL(unedited ‖ edited)`` of the next token of ordinary text for one edit, in nats. ``None``: not
            measured.
    """

    edits: int
    records: int = 0
    before: float | None = None
    after: float | None = None
    standard_error: float | None = None
    divergence: float | None = None

    def findings(self, bounds: DamageBounds) -> list[str]:
        """Describe each bound that is exceeded, a loss of NS by more than its standard error: less may be chance."""
        found = []
        loss, least = bounds.largest_neighbour_loss, self.records >= FEWEST
        if loss is not None and least and self.before is not None and self.after is not None:
            lost, error = self.before - self.after, self.standard_error or 0.0
            if lost - loss > error:
                found.append(
                    f"facts next to the edited ones suffer: NS is {self.after:.2f}, {self.before:.2f} without edits "
                    f"(mean of {self.records} records; largest_neighbour_loss: {loss:g})"
                )
        largest, divergence = bounds.largest_divergence, self.divergence
        if largest is not None and divergence is not None and not divergence <= largest:
            found.append(
                f"ordinary text suffers: an edit moves the next token by {divergence:.2g} nats "
                f"(largest_divergence: {largest:g})"
            )
        return found

    def line(self, bounds: DamageBounds) -> dict[str, Any]:
        """What results.json says of it."""
        return asdict(self) | {"findings": self.findings(bounds)}
