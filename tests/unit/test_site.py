"""The reference pages hold every public name; the rest of the site is checked by building it, see ``.ci/run``."""

import importlib
import re
from pathlib import Path

import pytest

from tests.unit.test_layout import ORDER

DOCS = Path(__file__).parents[2] / "docs"
REFERENCE = DOCS / "reference"
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


def test_the_page_and_the_picture_of_the_layout_have_every_package_in_order():
    page = (DOCS / "layout.md").read_text(encoding="utf-8")
    picture = (DOCS / "images" / "packages.svg").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.M) == ORDER
    assert re.findall(r'<text class="package"[^>]*>(\w+)</text>', picture) == ORDER


@pytest.mark.parametrize("page", ["layout.md", "glossary.md"])
def test_files_and_classes_that_are_named_exist(page):
    root, text = DOCS.parent, (DOCS / page).read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_]+/[a-z_]+\.py)`", text)
    assert [path for path in named if not ((root / path).is_file() or (root / "rome_pl" / path).is_file())] == []
    sources = [*(root / "rome_pl").rglob("*.py"), *(root / "callbacks").glob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    known = set(re.findall(r"^(?:class )?(\w+)(?:\(| =|:)", code, re.M))
    assert set(re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)*)(?:\.\w+)?`", text)) <= known


@pytest.mark.parametrize("page", sorted([*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")]), ids=lambda path: path.stem)
def test_lines_of_prose_are_short_enough_to_compare(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert [line for line in prose.splitlines() if len(line) > 140 and not line.startswith("|")] == []
