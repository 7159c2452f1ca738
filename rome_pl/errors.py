"""What can be wrong with what a user gave; every such error says what to do about it."""

from reprlib import Repr

__all__ = ["OptionError", "RomeError", "SourceError", "first_line", "named", "shortened"]

_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 2, 160, 40, 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 4


class RomeError(ValueError):
    """Base of the errors that a user can mend; the command line prints them as one line."""


class OptionError(RomeError):
    """An option whose value cannot be used, or that contradicts another."""


class SourceError(RomeError):
    """A model source that cannot be loaded, with what to do."""


def first_line(error: BaseException) -> str:
    """What an exception says, as one line without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def named(name: object) -> str:
    """A field or argument as an error names it: as it is written, if it can be shown and is not too long."""
    return name[:80] if isinstance(name, str) and name.isprintable() else shortened(name)


def shortened(value: object) -> str:
    """A value as an error quotes it, whatever its size, depth or type: short, on one line."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # a number of too many digits, or an object that cannot be shown
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:197]}..."
