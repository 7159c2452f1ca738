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
    """A check rejected it; the weights are as before."""
    SKIPPED = "skipped"
    """It could not be made: bad input, or a numerical failure."""
    ROLLED_BACK = "rolled_back"
    """Applied, and undone later because the model's state was bad."""
    UNDONE = "undone"
    """Applied, and undone after the run."""
