"""Where an edit stands."""

from enum import StrEnum

__all__ = ["EditStatus"]


class EditStatus(StrEnum):
    """Where an edit stands."""

    PENDING = "pending"
    """Not decided yet."""
    APPLIED = "applied"
    """Written and kept (in single mode: kept until it was evaluated)."""
    REJECTED = "rejected"
    """A check refused it; the weights are as they were before it."""
    SKIPPED = "skipped"
    """It could not be tried: bad input, or a numerical failure."""
    ROLLED_BACK = "rolled_back"
    """Applied, and undone later because the model's state had become bad."""
    UNDONE = "undone"
    """Applied, and taken out after the run."""
