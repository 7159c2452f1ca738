"""What the command line owes whoever types: an overview of the verbs, short errors, completion."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from jsonargparse import ArgumentParser, auto_cli, capture_parser

from rome_pl.errors import OptionError
from rome_pl.utils.did_you_mean import did_you_mean

__all__ = ["SHELLS", "SWITCHES", "completion_script", "overview", "split_switches", "unexpected", "unknown"]

SHELLS = ("bash", "zsh", "tcsh")
"""Shells that completion is there for."""

SWITCHES = {"--quiet": "only warnings, errors and the tables at the end", "--debug": "tracebacks of errors"}
"""Switches that every verb takes, at any place, with what they do."""

Verbs = Mapping[str, Callable[..., Any]]


def split_switches(args: Sequence[str]) -> tuple[list[str], set[str]]:
    """The arguments without the switches that every verb takes, and those of these that were there."""
    return [argument for argument in args if argument not in SWITCHES], {one for one in args if one in SWITCHES}


def overview(verbs: Verbs) -> str:
    """The verbs, a line each, and what they have in common."""
    width = max(map(len, [*verbs, *SWITCHES, "--version"]))
    lines = [
        f"rome-pl {version('rome_pl')}: changes single facts in language models",
        "",
        "usage: rome-pl VERB ...",
    ]
    lines += ["", *(f"  {name:{width}}  {_summary(function)}" for name, function in verbs.items()), ""]
    lines += ["for every verb:", *(f"  {name:{width}}  {meaning}" for name, meaning in SWITCHES.items())]
    lines += [f"  {'--help':{width}}  its options", "", "rome-pl edit --config quickstart is a first run."]
    return "\n".join(lines)


def unknown(verb: str, verbs: Verbs) -> str:
    """What to say about a verb that there is not."""
    return f"there is no verb '{verb}'{did_you_mean(verb, verbs)}"


def unexpected(error: BaseException) -> str:
    """What to say about an exception that nobody foresaw."""
    told = " ".join(str(error).split()) or "without a message"
    return (
        f"unexpected {type(error).__name__}: {told}\n"
        "This is no mistake that rome-pl knows how to explain. Add --debug to the command to see where it comes from"
    )


def completion_script(shell: str, parser: ArgumentParser, verbs: Verbs) -> str:
    """The script that completes verbs and options in a shell.

    Args:
        shell: One of :data:`SHELLS`.
        parser: Parser with the verbs that have a Trainer.
        verbs: The plain verbs, to be added to it.

    Raises:
        OptionError: For another shell, or if ``shtab``, which writes the script, is not installed.
    """
    if shell not in SHELLS:
        raise OptionError(f"completion: expected one of {', '.join(SHELLS)}, got '{shell}'")
    if find_spec("shtab") is None:
        raise OptionError("completion needs the package shtab: pip install shtab")
    subcommands: Any = parser._subcommands_action  # holds the verbs with a Trainer; a parser takes only one such action
    for name, function in verbs.items():
        plain = capture_parser(auto_cli, function, as_positional=False)
        subcommands.add_subcommand(name, plain, help=_summary(function))
    own = ArgumentParser()
    own.add_argument("shell", choices=SHELLS)
    subcommands.add_subcommand("completion", own, help=_summary(completion_script))
    for verb in subcommands.choices.values():
        for switch, meaning in SWITCHES.items():
            verb.add_argument(switch, action="store_true", help=meaning)
    return str(parser.get_completion_script(f"shtab-{shell}"))


def _summary(function: Callable[..., Any]) -> str:
    """First sentence of a function's docstring."""
    return (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
