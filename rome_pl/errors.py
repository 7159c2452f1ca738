"""What can be wrong with what a user gave; every such error says what to do about it."""

__all__ = ["OptionError", "RomeError", "SourceError", "first_line"]


class RomeError(ValueError):
    """Base of the errors that a user can mend; the command line prints them as one line."""


class OptionError(RomeError):
    """An option whose value cannot be used, or that contradicts another."""


class SourceError(RomeError):
    """A model source that cannot be loaded, with what to do."""


def first_line(error: BaseException) -> str:
    """What an exception says, as one line without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
