"""Runs of the command line in children of this process, and the faults that are thrown at them.

A child begins with everything imported, which a new interpreter would take longer for than for the run.
"""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest

from rome_pl.cli.app import main
from tests.integration.helpers import FAST, lighthouses, saved_model

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.link", "tempfile.mkdtemp")
"""What Python tells an audit hook of work with files."""

SECONDS = 240
"""Longest that a run may take: one that waits for a pipe takes for ever."""

PRODUCTS = (
    *("config.yaml", "manifest.json", "results.json", "records.jsonl", "table.md", "table.csv", "report.html"),
    *("easyedit.json", "kmeng01.json"),
)


def prepared(folder, records=4):
    """A folder with a model and records, and the arguments of a run over them."""
    saved_model(folder)
    (folder / "records.json").write_text(json.dumps(lighthouses(records)), encoding="utf-8")
    options = {f"model.{name}": value for name, value in FAST.items()} | {
        "model.pretrained": folder / "model", "model.sequential_edit": True, "data.path": folder / "records.json",
        "trainer.accelerator": "cpu", "verification.least_probability": 0,
        "probe_evaluation.measure_perplexity": False, "run_report.formats": "[easyedit, kmeng01]",
        "model.v_num_grad_steps": 3, "run_report.generations": 1, "tensorboard_report.generations": 0,
        "tensorboard_report.pictures": 0, "tensorboard_report.figures": False,
    }  # fmt: skip
    return ["edit", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


def command(arguments, place):
    """The command that is given again and again: a run in ``place/run``, its model in ``place/saved``."""
    where = ("--trainer.default_root_dir", place / "run", "--save_model", place / "saved")
    return [*arguments, *map(str, where), "--resume", "auto"]


def run_child(arguments, folder, fault=None, out=None):
    """Run a command in a child; its exit code, or minus the signal that ended it.

    Args:
        arguments: Of the command line.
        folder: Whose files the fault is about.
        fault: Called in the child before the run, with ``folder``.
        out: File for what it prints; nowhere if there is none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: this process has none that work
        child = os.fork()
    if child == 0:
        code = 99
        try:
            handle = os.open(out or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
            os.environ["ROME_PL_CACHE"] = str(folder / "cache")
            huggingface_hub.constants.HF_HUB_OFFLINE = True
            if fault is not None:
                fault(folder)
            code = main(arguments)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 98
        finally:
            os._exit(code)
    for _ in range(SECONDS * 50):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"no end within {SECONDS} s: {arguments[:1]}")


def at_event(number, do):
    """A fault: at that event of work with files below the folder, counted from 0."""

    def set_up(folder):
        left = [number]

        def hook(event, details):
            if event in EVENTS and any(str(one).startswith(str(folder / "work")) for one in details[:2]):
                left[0] -= 1
                if left[0] == -1:
                    do()

        sys.addaudithook(hook)

    return set_up


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def counting(path):
    """A fault that is none: every event of work with files adds a byte to a file."""

    def set_up(folder):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

        def hook(event, details):
            if event in EVENTS and any(str(one).startswith(str(folder / "work")) for one in details[:2]):
                os.write(handle, b".")

        sys.addaudithook(hook)

    return set_up


@contextmanager
def small_disk(place, size):
    """A disk of so many bytes at a place; yields what changes it: ``size=…``, ``ro`` or ``rw``."""
    place.mkdir(parents=True, exist_ok=True)

    def mount(*options):
        return subprocess.run(["mount", *options, str(place)], capture_output=True, check=False).returncode == 0

    if os.name != "posix" or os.geteuid() != 0 or not mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        pytest.skip("needs the right to mount a small disk")
    try:
        yield lambda option: mount("-o", f"remount,{option}")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def contents(folder):
    """Every file of a folder, with what it holds; links are told by what they name."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def assert_as_undisturbed(place, whole):
    """Weights, ledger and saved model bit for bit those of a run that nothing happened to; every product there."""
    found, expected = (contents(one / "run" / "ledger") for one in (place, whole))
    assert {name for name in found if not name.startswith(".")} == {
        name for name in expected if not name.startswith(".")
    }
    assert all(found[name] == content for name, content in expected.items() if name != ".lock")
    assert contents(place / "saved") == contents(whole / "saved")
    assert all((place / "run" / name).is_file() for name in PRODUCTS)
    results, wanted = (json.loads((one / "run" / "results.json").read_text("utf-8")) for one in (place, whole))
    assert results["finished"] is True
    assert results["products"] == wanted["products"]
    assert all((place / "run" / name).is_file() for name in results["products"])
    for name in ("base", "immediate", "final", "n_applied", "weight_change"):
        assert results[name] == wanted[name]
    assert [path.name for path in place.glob(".*")] == []
    assert [path.name for path in (place / "run").rglob(".*")] == [".lock"]
