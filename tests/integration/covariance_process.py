"""A run of ``rome-pl covariance`` in a process of its own, which can be made to halt anywhere, and be killed there."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's client reads it when it is imported
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

import torch
from safetensors.torch import save_file

from rome_pl.cli.app import main
from rome_pl.second_moments.moment_pass import MomentPass
from rome_pl.second_moments.second_moment import SecondMoment

torch.set_num_threads(1)


@dataclass(frozen=True)
class Halt:
    """Where a process stops for good.

    Args:
        before: ``step``: the sum of a block; ``name``: a file that is written gets its name; ``delete``: a file goes.
        number: How often that comes to pass until the process stops, which does not do this one.
        files: Pattern of the names that count.
    """

    before: Literal["step", "name", "delete"]
    number: int = 1
    files: str = "process-*"


def run(
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    rank: int = 0,
    halt: Halt | None = None,
    wait_for: str | None = None,
) -> None:
    """The command line; ends the process with its exit code.

    Args:
        arguments: What follows ``rome-pl``.
        folder: Gets what the process says, ``log-RANK``, the matrices before they are rounded, ``exact``, and an empty
            file ``halted-RANK`` once it has halted.
        environment: Variables to set.
        rank: This process among those that share the job.
        halt: Where to stop for good.
        wait_for: Pattern of files below the cache; the first step waits for one that is younger than this process.
    """
    log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(environment)
    (folder / "exact").mkdir(exist_ok=True)
    _keep_exact(folder / "exact")
    if wait_for is not None:
        _wait_at_first_step(Path(environment["ROME_PL_CACHE"]), wait_for, time.time_ns())
    if halt is not None:
        _halt(halt, folder / f"halted-{rank}")
    sys.exit(main(arguments))


def _keep_exact(folder: Path) -> None:
    original = SecondMoment.save

    def save(self: SecondMoment, path: Path) -> None:
        save_file({"matrix": self.matrix.contiguous()}, folder / f"{self.info.layer}.safetensors")
        original(self, path)

    SecondMoment.save = save


def _before_steps(action: Callable[[], None]) -> None:
    original = MomentPass.step

    def step(self, block):
        action()
        return original(self, block)

    MomentPass.step = step


def _wait_at_first_step(cache: Path, pattern: str, started: int) -> None:
    number, deadline = count(), time.monotonic() + 30

    def wait() -> None:
        first = next(number) == 0
        while first and time.monotonic() < deadline and not any(_age(path) > started for path in cache.rglob(pattern)):
            time.sleep(0.01)

    _before_steps(wait)


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


def _halt(halt: Halt, marker: Path) -> None:
    number = count(1)

    def here() -> None:
        if next(number) == halt.number:
            marker.touch()
            while True:
                time.sleep(60)

    replace, unlink = Path.replace, Path.unlink

    def halting_replace(self: Path, target: Path) -> Path:
        if Path(target).match(halt.files):
            here()
        return replace(self, target)

    def halting_unlink(self: Path, missing_ok: bool = False) -> None:
        if self.match(halt.files):
            here()
        unlink(self, missing_ok)

    if halt.before == "step":
        _before_steps(here)
    elif halt.before == "name":
        Path.replace = halting_replace
    else:
        Path.unlink = halting_unlink
