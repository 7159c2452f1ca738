"""Rules about the source tree itself: what may import what, how long a file may be, what is public."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.variants import QUICK_VARIANTS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rome_pl"
AT_THE_ROOT = ("callbacks", "data_modules")
"""Packages whose folders stand at the root of the repository, and are links inside the package."""

ORDER = [
    "errors",
    "files",
    "utils",
    "requests",
    "encoding",
    "model",
    "forward",
    "second_moments",
    "search",
    "write",
    "metrics",
    "ledger",
    "editing",
    "tracing",
    "export",
    "reports",
    "interop",
    "data_modules",
    "callbacks",
    "modules",
    "cli",
    "editor",
]
"""Every package and module of its own, in the order in which they may import each other: only what stands before."""

ONLY = {
    "lightning": {"data_modules", "callbacks", "modules", "cli", "editor"},
    "rich": {"utils", "reports", "callbacks", "cli"},  # in utils: the console alone
    "matplotlib": {"reports"},
    "torch": set(ORDER) - {"errors", "requests"},
}
"""Libraries that only some of them may use."""

NEVER = {
    ("search", "write"),  # a search for a value knows no weight,
    ("write", "search"),  # and a weight no loss
    ("callbacks", "data_modules"),
    ("data_modules", "callbacks"),
    ("export", "editing"),
    ("tracing", "editing"),
    ("metrics", "ledger"),
}


def files():
    """Every file of the package with the name of the package or module of its own that it belongs to."""
    for path in sorted(PACKAGE.rglob("*.py")):  # does not follow links
        parts = path.relative_to(PACKAGE).parts
        if parts[0] not in ("__init__.py", "assets", *AT_THE_ROOT):
            yield path, parts[0].removesuffix(".py")
    for name in AT_THE_ROOT:
        for path in sorted((ROOT / name).glob("*.py")):
            yield path, name


FILES = [pytest.param(path, here, id=f"{here}/{path.stem}") for path, here in files()]


def imports(path):
    """Names of the modules a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize(("path", "here"), FILES)
def test_a_package_imports_only_what_stands_before_it(path, here):
    names = imports(path)
    for there in {name.split(".")[1] for name in names if name.startswith("rome_pl.")} - {here}:
        assert ORDER.index(there) < ORDER.index(here), f"{path} imports {there}"
        assert (here, there) not in NEVER, f"{path} imports {there}"
    for library, allowed in ONLY.items():
        if here not in allowed:
            assert library not in {name.split(".")[0] for name in names}, f"{path} imports {library}"


@pytest.mark.parametrize("path", [param.values[0] for param in FILES], ids=[param.id for param in FILES])
def test_every_module_imports_and_declares_what_is_public(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "rome_pl" else ("rome_pl", *parts)).removesuffix(".__init__")
    module = importlib.import_module(name)
    assert module.__doc__
    if path.stem != "__init__":
        assert module.__all__
        assert all(hasattr(module, public) for public in module.__all__)


def test_every_package_has_its_place_and_is_neither_small_nor_large():
    sizes = {}
    for path, here in files():
        if path.name != "__init__.py" and path.parent != PACKAGE:
            sizes[here] = sizes.get(here, 0) + 1
    single = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert sizes.keys() | single == set(ORDER)
    assert {name: size for name, size in sizes.items() if not 5 <= size <= 14} == {}


def test_no_module_is_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path, _ in files()}
    assert {path.name: length for path, length in lengths.items() if length > 350} == {}


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, rome_pl; print([m for m in ('torch', 'transformers', 'lightning') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_the_wheel_holds_every_package():
    declared = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    )
    found = {
        ".".join(("rome_pl", *path.parent.relative_to(PACKAGE).parts)) for path in PACKAGE.rglob("__init__.py")
    } | {f"rome_pl.{name}" for name in ("callbacks", "data_modules", "configs")}
    assert declared == found


@pytest.mark.parametrize("name", AT_THE_ROOT)
def test_the_folders_at_the_root_refuse_a_second_name(name):
    result = subprocess.run(
        [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode != 0
    assert f"rome_pl.{name}" in result.stderr


@pytest.mark.parametrize("name", QUICK_VARIANTS)
def test_a_test_that_keeps_few_variants_in_the_quick_set_exists(name):
    file, _, function = name.partition("::")
    found = [path for path in (ROOT / "tests").rglob(file) if f"def {function}(" in path.read_text(encoding="utf-8")]
    assert len(found) == 1


def test_public_names_resolve():
    import rome_pl

    assert all(getattr(rome_pl, name).__name__ == name for name in rome_pl.__all__ if name[0].isupper())
    assert set(rome_pl.__all__) == set(rome_pl._PUBLIC)
    stub = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    checked = {
        (alias.name, node.module) for node in ast.walk(stub) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(rome_pl._PUBLIC.items()) == {(name, module) for name, module in checked if module.startswith("rome_pl")}
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = rome_pl.nothing_here
