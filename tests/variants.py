"""Variants of a test of which one or two are enough for the quick set; the slow set runs the others too."""

from typing import Any

import pytest


def slow(*values: Any, **options: Any) -> Any:
    """A variant for the slow set alone."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)
