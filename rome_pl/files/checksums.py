"""Checksums of files and lines: reading finds a flipped bit, a lost line or half a file.

They protect against damage, not against somebody who recomputes them.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["SEAL", "chained", "checksum", "is_intact", "sealed", "tensor_checksum", "unchained"]

SEAL = "checksum"
"""Name of the field that holds the checksum of everything else in a JSON file."""

_END = re.compile(rb', "check": "([0-9a-f]{32})"\}$')
"""The end of a line with a checksum. The checksum covers the other bytes of the line."""


def checksum(value: Any) -> str:
    """SHA-256 of a value that JSON can hold; the order of keys does not count."""
    plain = json.loads(json.dumps(value))  # as a reader gets it: lists for tuples, texts for keys
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its checksum, to be written as JSON."""
    return {**content, SEAL: checksum(content)}


def is_intact(content: Mapping[str, Any]) -> bool:
    """Whether sealed content is unchanged. Content without a checksum is not intact."""
    rest = {name: value for name, value in content.items() if name != SEAL}
    return content.get(SEAL) == checksum(rest)


def tensor_checksum(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """SHA-256 of tensors with their names, types and shapes, and of a text about them."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def chained(line: str, before: str) -> tuple[str, str]:
    """Add a checksum to a line of JSON. It covers this line and, through their checksums, all earlier lines.

    Args:
        line: A JSON object.
        before: The checksum of the line before; empty for the first.

    Returns:
        The line and its checksum.
    """
    check = _link(line.encode("utf-8"), before)
    return f'{line[:-1]}, "check": "{check}"}}', check


def unchained(line: bytes, before: str) -> tuple[bytes, str | None, bool]:
    """Split a line into the text before :func:`chained`, its checksum if it has one, and whether that is right.

    A line without a checksum is returned unchanged and counts as right.
    """
    found = _END.search(line)
    if found is None:
        return line, None, True
    body, check = line[: found.start()] + b"}", found.group(1).decode()
    return body, check, check == _link(body, before)


def _link(body: bytes, before: str) -> str:
    return hashlib.sha256(before.encode() + body).hexdigest()[:32]
