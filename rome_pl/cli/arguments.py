"""What may be written on the command line, turned into what the parsers want."""

import inspect
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

from rome_pl.errors import OptionError
from rome_pl.files.whole_files import local_path
from rome_pl.utils.did_you_mean import did_you_mean

__all__ = ["named", "normalised"]

_SWITCHES = ("--dry_run", "--overwrite", "--list", "--force")


def named(function: Callable[..., Any], args: Sequence[str]) -> list[str]:
    """Arguments of a plain verb; those that it cannot do without may come first, in order and without their names."""
    parameters = inspect.signature(function).parameters.values()
    wanted = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    bare = list(takewhile(lambda argument: not argument.startswith("-"), args))[: len(wanted)]
    return [part for pair in zip(wanted, bare, strict=False) for part in (f"--{pair[0]}", pair[1])] + [
        *args[len(bare) :]
    ]


def normalised(args: Sequence[str]) -> list[str]:
    """Arguments as the parser wants them: switches with a value, shipped configs by their path."""
    found: list[str] = []
    previous = ""
    for argument, following in zip(args, [*args[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        switch = flag.replace("-", "_").replace("__", "--", 1)
        if switch in _SWITCHES and not equals and following not in ("true", "false"):
            argument = f"{switch}=true"
        elif flag in ("--config", "-c") and equals:
            argument = f"{flag}={_config_path(value)}"
        elif previous in ("--config", "-c"):
            argument = _config_path(argument)
        found.append(argument)
        previous = argument
    return found


def _config_path(name: str) -> str:
    """Path of a shipped config, unless a file of that name is here."""
    folder = Path(str(files("rome_pl") / "configs"))
    shipped = folder / f"{name.removesuffix('.yaml').removeprefix('configs/')}.yaml"
    if local_path(name).is_file():
        return str(local_path(name))
    if not shipped.is_file() and re.fullmatch(r"[\w./-]+", name):  # and no options in place of a name
        names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
        raise OptionError(
            f"--config: there is no file '{name}', and no shipped config of that name"
            f"{did_you_mean(name, sorted(names))}"
        )
    return str(shipped) if shipped.is_file() else name
