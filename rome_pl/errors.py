"""What can be wrong with what a user gave; every such error says what to do about it."""

from reprlib import Repr

__all__ = ["OptionError", "RomeError", "first_line", "shortened"]

_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 2, 160, 40, 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 4


class RomeError(ValueError):
    """Base of the errors that a user can mend; the command line prints them as one line."""


class OptionError(RomeError):
    """An option whose value cannot be used, or that contradicts another."""


def first_line(error: Exception) -> str:
    """What an exception says, as one line without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def shortened(value: object) -> str:
    """A value as an error quotes it, whatever its size, depth or type: short, on one line."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # a number of too many digits, or an object that cannot be shown
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:197]}..."
