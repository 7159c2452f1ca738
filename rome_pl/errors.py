"""What can be wrong with what a user gave; every such error says what to do about it."""

__all__ = ["OptionError", "RomeError"]


class RomeError(ValueError):
    """Base of the errors that a user can mend; the command line prints them as one line."""


class OptionError(RomeError):
    """An option whose value cannot be used, or that contradicts another."""
