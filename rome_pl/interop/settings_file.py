"""Settings files of EasyEdit, kmeng01/rome and related projects: YAML or JSON with checked values."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rome_pl.errors import RomeError, shortened
from rome_pl.files import strict_json, strict_yaml
from rome_pl.files.readable_files import FileError, read_text
from rome_pl.files.strict_json import Fault
from rome_pl.utils.did_you_mean import did_you_mean

__all__ = ["METHODS", "ConversionError", "Settings", "read_settings"]


class ConversionError(RomeError):
    """A file of settings that cannot be converted."""


METHODS = ("ROME", "R-ROME", "MEMIT", "EMMET", "AlphaEdit")
"""``alg_name`` of the methods that can be converted."""

_REMEDY = "take one of the two out"

_TELLING = {"nullspace_threshold": "AlphaEdit", "emmet_lambda": "EMMET", "mom2_update_weight": "MEMIT"}
"""Keys that identify the method of a file that does not name it. A file with none of them is ROME's."""


@dataclass(frozen=True)
class Settings:
    """A file of settings.

    Args:
        path: The file.
        method: One of :data:`METHODS`.
        values: Its content.
    """

    path: Path
    method: str
    values: Mapping[str, Any]

    @property
    def shared(self) -> bool:
        """Whether the method searches for one hidden state and shares it among layers."""
        return self.method in ("MEMIT", "EMMET", "AlphaEdit")

    @property
    def statistics(self) -> bool:
        """Whether the second moment is used: ROME checks ``mom2_adjustment``, the others always use it."""
        return self.shared or self.flag("mom2_adjustment")

    def error(self, key: str, message: str) -> ConversionError:
        """Make an error that names file and key."""
        return ConversionError(f"{self.path}, key '{key}': {message}")

    def number(self, key: str) -> float:
        """Return a number. YAML reads ``5e-1``, without a point, as text."""
        value = self.values[key]
        try:
            if isinstance(value, bool):
                raise TypeError
            return float(value)
        except (TypeError, ValueError):
            raise self.error(key, f"expected a number, got {shortened(value)}") from None

    def whole(self, key: str) -> int:
        """Return a whole number."""
        number = self.number(key)
        if not number.is_integer():
            raise self.error(key, f"expected a whole number, got {shortened(self.values[key])}")
        return int(number)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, got {shortened(value)}")
        return value

    def text(self, key: str) -> str:
        """A text."""
        value = self.values[key]
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, f"expected text, got {shortened(value)}")
        return value

    def numbers(self, key: str) -> list[int]:
        """Return whole numbers from 0 on."""
        value = self.values[key]
        if not _are_whole(value):
            raise self.error(key, f"expected whole numbers from 0 on, such as [5], got {shortened(value)}")
        return list(value)

    def pairs(self, key: str) -> list[list[int]]:
        """Return pairs of positive whole numbers."""
        value = self.values[key]
        if not isinstance(value, list) or not all(_are_whole(pair) and len(pair) == 2 and all(pair) for pair in value):
            raise self.error(
                key, f"expected pairs [tokens, number], such as [[5, 10], [10, 10]], got {shortened(value)}"
            )
        return [list(pair) for pair in value]


def read_settings(path: Path) -> Settings:
    """Read a file of settings.

    Raises:
        ConversionError: If it cannot be read, or its method is not supported.
    """
    values = _read(path)
    return Settings(path, _method(path, values), values)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path, "give a YAML or JSON file of settings")
    except FileError as error:
        raise ConversionError(str(error)) from None
    match path.suffix.lower():
        case ".json":
            try:
                values = strict_json.read_value(text, _REMEDY)
            except json.JSONDecodeError as error:
                raise ConversionError(
                    f"{path}, line {error.lineno}: malformed JSON at column {error.colno}: {error.msg}"
                ) from error
        case ".yaml" | ".yml":
            values = strict_yaml.read_value(text, _REMEDY)
        case suffix:
            raise ConversionError(f"{path}: unknown file type '{suffix}'; expected .yaml, .yml or .json")
    if isinstance(values, Fault):
        raise ConversionError(f"{path}, line {values.line}: {values.message}")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConversionError(f"{path}: expected keys with values, got {type(values).__name__}")
    if not values:
        raise ConversionError(f"{path}: holds no settings")
    return values


def _method(path: Path, values: Mapping[str, Any]) -> str:
    """Return the method that a file names, else that of its folder, as in ``hparams/MEMIT``, else that of its keys."""
    known = {_plain(method): method for method in METHODS}
    if (named := values.get("alg_name")) is not None:
        if (method := known.get(_plain(str(named)))) is None:
            raise ConversionError(
                f"{path}, key 'alg_name': {shortened(named)} is not here{did_you_mean(str(named), METHODS)}; settings "
                f"of {', '.join(METHODS)} can be converted"
            )
        return method
    if (method := known.get(_plain(path.absolute().parent.name))) is not None:
        return method
    if "layers" in values and "mom2_adjustment" in values:
        return next((method for key, method in _TELLING.items() if key in values), "ROME")
    raise ConversionError(
        f"{path}: names no method ('alg_name'), and has not the keys of one that is here; settings of "
        f"{', '.join(METHODS)} can be converted"
    )


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _are_whole(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in value)
    )
