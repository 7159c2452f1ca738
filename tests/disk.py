"""A full disk, as programs meet it."""

from contextlib import contextmanager

import pytest


@contextmanager
def no_room_on_disk(room: int = 4096):
    """Inside, no file grows beyond ``room`` bytes: a write beyond fails where it happens, also in compiled code."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
