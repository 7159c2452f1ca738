"""Seeds and names that depend on their parts and on nothing else."""

import hashlib
import json
from typing import Any

__all__ = ["content_key", "hash_seed"]


def content_key(*parts: Any) -> str:
    """A short name that depends on every part and on nothing else; parts are what JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def hash_seed(*parts: object) -> int:
    """A seed that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
