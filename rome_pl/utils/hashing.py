"""Seeds and names that depend only on their parts."""

import hashlib
import json
from typing import Any

__all__ = ["content_key", "hash_seed"]


def content_key(*parts: Any) -> str:
    """Return a short name that depends only on the parts, which JSON has to be able to hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def hash_seed(*parts: object) -> int:
    """Return a seed that depends only on the parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
