"""Rules about the source tree itself."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "rome_pl": ROOT / "rome_pl",
    "rome_pl.callbacks": ROOT / "callbacks",
    "rome_pl.data_modules": ROOT / "data_modules",
}
LIGHTNING = {
    "covariance_module", "edit_module", "evaluation_module", "trace_module",
    "layer_trial", "editor", "inner_trainer", "trainer", "cli",
}  # fmt: skip
CORE = {path.stem for path in FOLDERS["rome_pl"].glob("*.py")} - LIGHTNING - {"__init__"}
NUMERICS = {"rank_one", "metric", "second_moment", "moment_file", "weights", "hooks", "architecture"}
LEAVES = {"errors", "files", "file_kinds", "folder_swap", "checksums", "schemas"}


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


def modules():
    for package, folder in FOLDERS.items():
        for path in sorted(folder.glob("*.py")):
            yield pytest.param(package, path, id=f"{package}.{path.stem}")
    for path in sorted((ROOT / "rome_pl" / "metrics").glob("*.py")):
        yield pytest.param("rome_pl.metrics", path, id=f"rome_pl.metrics.{path.stem}")


@pytest.mark.parametrize(("package", "path"), list(modules()))
def test_imports_go_one_way(package, path):
    names = imports(path)
    own = {name.removeprefix("rome_pl.").split(".")[0] for name in names if name.startswith("rome_pl.")}
    if package in ("rome_pl.callbacks", "rome_pl.data_modules"):
        assert not own & LIGHTNING, "callbacks and data modules do not import the modules that use them"
        siblings = {name for name in names if name.startswith(f"{package}.")}
        request_data = {f"{package}.request_data"}
        parent = dict.fromkeys(("counterfact", "facts", "knowedit", "zsre"), request_data).get(path.stem, set())
        if path.stem != "__init__":
            assert siblings <= parent
        other = {"rome_pl.callbacks": "data_modules", "rome_pl.data_modules": "callbacks"}[package]
        assert other not in own
    elif package == "rome_pl.metrics" or path.stem in CORE:
        assert not own & (LIGHTNING | {"callbacks", "data_modules"})
        assert not any(name.split(".")[0] == "lightning" for name in names)
    if path.stem in NUMERICS:
        assert not own - NUMERICS - LEAVES
    if path.stem in LEAVES:
        assert not own - LEAVES


@pytest.mark.parametrize(("package", "path"), list(modules()))
def test_every_module_imports_and_declares_what_is_public(package, path):
    name = package if path.stem == "__init__" else f"{package}.{path.stem}"
    module = importlib.import_module(name)
    assert module.__doc__
    if path.stem != "__init__":
        assert module.__all__
        assert all(hasattr(module, public) for public in module.__all__)


def test_no_module_is_long():
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for f in FOLDERS.values() for path in f.rglob("*.py")
    }
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
        ".".join(("rome_pl", *path.parent.relative_to(ROOT / "rome_pl").parts))
        for path in (ROOT / "rome_pl").rglob("__init__.py")
    } | {f"rome_pl.{name}" for name in ("callbacks", "data_modules", "configs")}
    assert declared == found


@pytest.mark.parametrize("name", ["callbacks", "data_modules"])
def test_the_folders_at_the_root_refuse_a_second_name(name):
    result = subprocess.run(
        [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode != 0
    assert f"rome_pl.{name}" in result.stderr


def test_public_names_resolve():
    import rome_pl

    assert all(getattr(rome_pl, name).__name__ == name for name in rome_pl.__all__ if name[0].isupper())
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = rome_pl.nothing_here
