"""The reference pages hold every public name; the rest of the site is checked by building it, see ``.ci/run``."""

import importlib
import re
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
SHOWN = set(
    re.findall(r"^::: ([\w.]+)$", "\n".join(p.read_text(encoding="utf-8") for p in REFERENCE.glob("*.md")), re.M)
)


def public(package):
    module = importlib.import_module(package)
    if hasattr(module, "__all__"):
        return set(module.__all__)
    source = Path(module.__file__).read_text(encoding="utf-8")
    return {a or b for a, b in re.findall(r"^from \S+ import (\w+) as \w+$|^def ([a-z]\w*)", source, re.M)}


@pytest.mark.parametrize("package", ["rome_pl", "rome_pl.callbacks", "rome_pl.data_modules", "rome_pl.metrics"])
def test_every_public_name_is_in_the_reference(package):
    names = public(package)
    assert names
    assert {f"{package}.{name}" for name in names} <= SHOWN


def test_what_the_reference_shows_exists():
    for name in SHOWN:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
