"""The nearest known name for one that is not: what a misspelt option, key or argument was meant to be."""

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from typing_extensions import override

from rome_pl.utils.console import visible
from rome_pl.utils.did_you_mean import did_you_mean

__all__ = ["SuggestingParser"]


# What jsonargparse says of names that it does not know. An unknown option is followed by its value, which is none.
_UNKNOWN = (
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<name>[^']+)'"),
    re.compile(r"Subcommand '[^']+' does not accept option '(?P<name>[^']+)'"),
    re.compile(r"Option '(?P<name>[^']+)' is not accepted"),
)


class SuggestingParser(ArgumentParser):
    """A parser whose errors about names that it does not know say which name is near."""

    _given: Sequence[str] = ()

    @override
    def parse_args(  # type: ignore[override]  # argparse's overloads, which jsonargparse does not have either
        self, args: Sequence[str] | None = None, *others: Any, **options: Any
    ) -> Any:
        """Parse arguments; which verb they name is kept for what an error says."""
        self._given = list(args or ())
        return super().parse_args(args, *others, **options)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the message and the nearest name."""
        suggestion = self._suggestion(message, getattr(ex, "subcommand_parser", None))
        super().error(visible(message) + suggestion, ex)

    def _suggestion(self, message: str, parser: ArgumentParser | None) -> str:
        subcommands = _subcommands(self)
        verb = next((subcommands[given] for given in self._given if given in subcommands), None)
        names = list(_options(parser or verb or self))
        if message.startswith("unrecognized arguments:"):
            written = (part.partition("=")[0] for part in message.split() if part.startswith("--"))
            near = next(filter(None, (did_you_mean(name.removeprefix("--"), names) for name in written)), "")
            return near.replace("'", "'--", 1)  # as it is written there
        for pattern in _UNKNOWN:
            if match := pattern.search(message):
                parts = match.groupdict()
                return did_you_mean(".".join(filter(None, (parts.get("group"), parts["name"]))), names)
        return ""


def _subcommands(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    return {
        name: sub
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, sub in action.choices.items()
    }


def _options(parser: ArgumentParser) -> Iterator[str]:
    """The names of a parser's options, as they are written in a configuration."""
    for action in parser._actions:
        for option in action.option_strings:
            if option.startswith("--") and not option.endswith("+"):
                yield option.removeprefix("--")
