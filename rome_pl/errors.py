"""Errors that a user can fix, and how they quote values. Every message tells what to do."""

from reprlib import Repr

__all__ = ["OptionError", "RomeError", "SourceError", "first_line", "named", "shortened"]

_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 2, 160, 40, 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 4


class RomeError(ValueError):
    """Base of the errors that a user can fix. The command line prints them as one line."""


class OptionError(RomeError):
    """An option whose value cannot be used, or that contradicts another."""


class SourceError(RomeError):
    """A model source that cannot be loaded."""


def first_line(error: BaseException) -> str:
    """The message of an exception, as one line without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def named(name: object) -> str:
    """The name of a field or argument for an error: unchanged if it is printable and short."""
    return name[:80] if isinstance(name, str) and name.isprintable() else shortened(name)


def shortened(value: object) -> str:
    """A value of any type, size or depth for an error: short, on one line."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # a number of too many digits, or an object that cannot be shown
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:197]}..."
