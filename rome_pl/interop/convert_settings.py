"""Converting settings of EasyEdit, kmeng01/rome and related projects to a configuration of ``rome-pl edit``."""

import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rome_pl.files.whole_files import local_path, whole_file
from rome_pl.interop.setting_rules import IMPLIED, REQUIRED, RULES, Fate
from rome_pl.interop.settings_file import ConversionError, read_settings
from rome_pl.utils.did_you_mean import did_you_mean

__all__ = ["Converted", "Row", "convert_settings", "shown", "write_config"]


@dataclass(frozen=True)
class Row:
    """The conversion of one key.

    Args:
        key: The key.
        value: Its value, as YAML. ``None``: the file lacks it.
        fate: The result of its conversion.
    """

    key: str
    value: str | None
    fate: Fate


@dataclass(frozen=True)
class Converted:
    """Converted settings.

    Args:
        path: Their file.
        method: Its method, one of :data:`rome_pl.interop.settings_file.METHODS`.
        config: The configuration for ``rome-pl edit --config``.
        rows: The conversion of every key, in the file's order, then of keys that it lacks.
    """

    path: Path
    method: str
    config: dict[str, dict[str, Any]]
    rows: list[Row]


def convert_settings(path: str | Path, force: bool = False) -> Converted:
    """Convert a file of settings.

    Args:
        path: A YAML or JSON file, such as EasyEdit's ``hparams/ROME/gpt2-xl.yaml``.
        force: Whether to leave out unknown keys instead of refusing them.

    Raises:
        ConversionError: If the file cannot be read, its method is not supported, it lacks a key, or has an unknown key
            or a value of the wrong type.
    """
    path = local_path(path)
    settings = read_settings(path)
    values = settings.values
    unknown = [key for key in values if key not in RULES]
    if unknown and not force:
        raise ConversionError(
            f"{path}, key '{unknown[0]}': unknown{did_you_mean(unknown[0], RULES)}. Mend or remove it, or give --force "
            "to leave out what is unknown"
        )
    if missing := [key for key in REQUIRED if key not in values]:
        raise ConversionError(f"{path}: lacks the key '{missing[0]}', which every file of {settings.method} has")
    rows = [
        Row(key, shown(value), RULES[key](settings, key) if key in RULES else Fate("differs", "unknown, left out"))
        for key, value in values.items()
    ]
    rows += [Row(key, None, rule(settings, key)) for key, rule in IMPLIED.items() if key not in values]
    config: dict[str, dict[str, Any]] = {"model": {}}
    for row in rows:
        for name, value in row.fate.options.items():
            section, _, option = name.partition(".")
            config.setdefault(section, {})[option] = value
    config.setdefault("trainer", {})["default_root_dir"] = f"runs/{path.stem}"
    return Converted(path, settings.method, config, rows)


def write_config(converted: Converted, output: Path) -> None:
    """Write the configuration, with a comment on its origin, how to run it, and differences."""
    lines = [
        f"Converted from {converted.path} ({converted.method}).",
        f"Run:   rome-pl edit --config {shlex.quote(str(output))} --data.path FACTS",
    ]
    differing = [row for row in converted.rows if row.fate.kind == "differs"]
    lines += ["What differs:"] if differing else []
    for row in differing:
        lines += textwrap.wrap(
            f"{row.key}: {row.fate.remark}",
            117,
            initial_indent="  - ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
    header = "".join(f"# {line}\n" for line in lines)
    body = "".join(
        f"{section}:\n" + "".join(f"  {name}: {shown(value)}\n" for name, value in options.items())
        for section, options in converted.config.items()
    )
    with whole_file(output) as work:
        work.write_text(header + body, encoding="utf-8")


def shown(value: Any) -> str:
    """A value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")
