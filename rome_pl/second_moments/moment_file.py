"""The file of a second moment: its packed upper triangle in float32, its description, and checksums of both.

The files shipped with the package have no checksums of their own: ``assets/statistics.json`` holds them, and the part
of their identity that their headers lack.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import ConfigDict, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from rome_pl.errors import RomeError
from rome_pl.files.checksums import checksum, tensor_checksum
from rome_pl.files.schemas import Count, Number, checked, parsed
from rome_pl.files.whole_files import check_regular, whole_file

__all__ = ["MomentHeader", "StatisticsError", "pack_upper", "read_moment", "symmetric", "unpack_upper", "write_moment"]

TENSOR = "second_moment"

TOKENS = "tokens"
"""Of a mixture of experts: how many tokens each has got."""

ABOUT, ABOUT_SUM, WHOLE_SUM = "rome_pl", "about_checksum", "checksum"
"""Names in the header: the description, its checksum, and the checksum of description and matrix."""

log = logging.getLogger(__name__)


class StatisticsError(RomeError):
    """Statistics that are missing, damaged, or belong to another model or layer."""


class MomentHeader(TypedDict):
    """The description in a file, with the fields of :class:`rome_pl.second_moments.second_moment.MomentInfo`."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]  # pydantic's option

    weights: str
    tokenizer: str
    layer: Count
    count: Count
    corpus: str
    config: NotRequired[str]
    model: NotRequired[str]
    versions: NotRequired[str]
    dtype: NotRequired[str]
    date: NotRequired[str]
    source: NotRequired[str]
    agreement: NotRequired[Number | None]
    experts: NotRequired[Count]


HEADER: TypeAdapter[Any] = TypeAdapter(MomentHeader)


def write_moment(path: Path, packed: Tensor, about: Mapping[str, Any], tokens: Tensor | None = None) -> None:
    """Write a file completely or not at all.

    Args:
        path: The file.
        packed: The upper triangle, ``[d (d + 1) / 2]``, float32; of a mixture those of all experts.
        about: The description, see :class:`MomentHeader`.
        tokens: Of a mixture: how many tokens each expert has got, ``[experts]``.
    """
    text = json.dumps(dict(about))
    tensors = {TENSOR: packed} if tokens is None else {TENSOR: packed, TOKENS: tokens}
    notes = {ABOUT: text, ABOUT_SUM: checksum(text), WHOLE_SUM: tensor_checksum(tensors, text)}
    with whole_file(path) as work:
        save_file(tensors, work, metadata=notes)


def read_moment(path: Path, matrix: bool = True) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """Read the description and the packed matrix of a file, and of a mixture how many tokens each expert has got.

    Args:
        path: The file.
        matrix: Whether to read the matrix and check its checksum.

    Raises:
        StatisticsError: If it is missing, damaged, or not a file of this project.
    """
    if not path.exists():
        raise StatisticsError(f"{path}: no such statistics file")
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            notes: dict[str, str] = file.metadata() or {}
            about: dict[str, Any] = parsed(notes[ABOUT])
            checked(HEADER, about)
            if about["count"] < 1:
                raise ValueError("field 'count': expected a number from 1 on, got 0")
            part = file.get_slice(TENSOR)
            if part.get_dtype() != "F32" or len(part.get_shape()) != 1:
                raise ValueError(f"its matrix is {part.get_dtype()} {part.get_shape()}, not packed float32 numbers")
            packed = file.get_tensor(TENSOR) if matrix else torch.empty(0)
            tokens = file.get_tensor(TOKENS) if matrix and about.get("experts", 1) > 1 else None
            tensors = {TENSOR: packed} if tokens is None else {TENSOR: packed, TOKENS: tokens}
            if tokens is not None and (tokens.dtype, tokens.shape) != (torch.int64, (about["experts"],)):
                raise ValueError(f"it does not say how many tokens each of {about['experts']} experts has got")
        if ABOUT_SUM in notes or WHOLE_SUM in notes:
            if notes.get(ABOUT_SUM) != checksum(notes[ABOUT]):
                raise ValueError("the checksum of its description does not fit")
            if matrix and notes.get(WHOLE_SUM) != tensor_checksum(tensors, notes[ABOUT]):
                raise ValueError("the checksum of its matrix does not fit")
        else:
            about |= _shipped_identity(path)
        if matrix and not bool(packed.isfinite().all()):
            raise ValueError("its matrix holds numbers that are not finite")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise StatisticsError(
            f"{path}: damaged, or no second moment of this project ({error}); delete it, and compute it again"
        ) from error
    return about, packed, tokens


def _shipped_identity(path: Path) -> dict[str, str]:
    """Return the fields that the header of a shipped file lacks; empty for other files.

    Raises:
        ValueError: If it has the name of a shipped file and another content.
    """
    known = _shipped()
    if path.name not in known and path.stat().st_size not in {entry["bytes"] for entry in known.values()}:
        return {}
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    for entry in known.values():
        if entry["sha256"] == found:
            return {name: entry[name] for name in ("config", "tokenizer")}
    if path.name in known:
        raise ValueError("it is not the file of that name that comes with the package: its checksum does not fit")
    return {}


@cache
def _shipped() -> dict[str, dict[str, Any]]:
    """Size, checksum and identity of the shipped files, by name."""
    content: dict[str, dict[str, Any]] = parsed((files("rome_pl") / "assets" / "statistics.json").read_bytes())
    return content


def pack_upper(matrix: Tensor) -> Tensor:
    """The upper triangle of ``[d, d]``, row after row, ``[d (d + 1) / 2]``; of ``[n, d, d]`` those of all matrices."""
    if matrix.ndim == 3:
        return torch.cat([pack_upper(one) for one in matrix])
    return torch.cat([row[index:] for index, row in enumerate(matrix)])


def unpack_upper(packed: Tensor, experts: int = 1) -> Tensor:
    """The symmetric float64 matrix whose upper triangle is ``packed``; of several experts theirs, ``[experts, d, d]``.

    Raises:
        ValueError: If no triangle has this length.
    """
    if experts > 1:
        if packed.numel() % experts:
            raise ValueError(f"{packed.numel()} entries are no symmetric halves of {experts} experts")
        return torch.stack([unpack_upper(one) for one in packed.view(experts, -1)])
    size = int((2 * packed.numel()) ** 0.5)
    if size * (size + 1) // 2 != packed.numel():
        raise ValueError(f"{packed.numel()} entries are no symmetric half")
    matrix = torch.zeros(size, size, dtype=torch.float64)
    start = 0
    for index in range(size):
        matrix[index, index:] = packed[start : start + size - index]
        start += size - index
    return symmetric(matrix)


def symmetric(upper: Tensor) -> Tensor:
    """The symmetric matrix with the upper triangle of ``upper``, ``[…, d, d]``."""
    matrix = upper.triu()
    return matrix + matrix.triu(1).mT
