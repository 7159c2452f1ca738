"""The examples in docstrings hold."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITH_EXAMPLES = sorted(
    path.relative_to(ROOT).with_suffix("").parts
    for path in (ROOT / "rome_pl").rglob("*.py")
    if any(">>> " in line and "+SKIP" not in line for line in path.read_text(encoding="utf-8").splitlines())
)


@pytest.mark.parametrize("parts", WITH_EXAMPLES, ids=["/".join(parts[1:]) for parts in WITH_EXAMPLES])
def test_examples_give_what_they_show(parts):
    result = doctest.testmod(importlib.import_module(".".join(parts)))
    assert result.attempted
    assert result.failed == 0
