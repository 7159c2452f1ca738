"""The code blocks of the documents, and running them as a reader would: in order, in one folder, one Python session."""

import contextlib
import io
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rome_pl.cli.app import main

ROOT = Path(__file__).parents[1]

_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        where: File and line, for messages.
        language: What stands after the fence.
        code: What is in it.
        shown: The ``text`` block that follows directly, which shows what this one prints; else nothing.
    """

    where: str
    language: str
    code: str
    shown: str | None


def blocks_of(name: str) -> list[Block]:
    """The blocks of a document, given by its path in the repository, without those that show output."""
    page = (ROOT / name).read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(page))
    blocks = []
    for match, following in zip(found, [*found[1:], None], strict=True):
        shown = None
        if following is not None and following[2] == "text" and not page[match.end() : following.start()].strip():
            shown = following[3]
        if match[2] != "text":
            line = page.count("\n", 0, match.start()) + 1
            blocks.append(Block(f"{name}:{line}", match[2], textwrap.dedent(match[3]), shown))
    return blocks


def commands_of(block: Block) -> list[str]:
    """The calls of ``rome-pl`` in a block of shell; what installs and tests is for CI to run."""
    commands = (part.strip() for part in re.split(r"&&|\n", block.code))
    return [command.removeprefix(".venv/bin/") for command in commands if re.match(r"(\.venv/bin/)?rome-pl ", command)]


def run(block: Block, session: dict[str, Any]) -> str:
    """Run a block in the current folder.

    Args:
        block: The block. A YAML block whose first line is a comment is the file of that name.
        session: The names that the page's Python blocks share.

    Returns:
        What it printed to standard output.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if block.language == "python":
            exec(compile(block.code, block.where, "exec"), session)
        elif block.language == "bash":
            for command in commands_of(block):
                assert main(shlex.split(command)[1:]) == 0, f"{block.where}: {command}"
        elif block.language == "yaml":
            Path(block.code.splitlines()[0].removeprefix("# ")).write_text(block.code, encoding="utf-8")
        else:
            raise AssertionError(f"{block.where}: nothing here runs a {block.language} block")
    return printed.getvalue()


_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def missing(shown: str, printed: str, tolerance: float = 0.05) -> list[str]:
    """The lines of an output as a page shows it that were not printed, in that order.

    Lines are compared by their words, and by their numbers as far as last bits of another machine allow. A page may
    leave lines out; ``…`` says where.

    Args:
        shown: What the page shows.
        printed: What was printed.
        tolerance: Of a number: relative to it, or absolute where it is below 1.
    """
    left = [" ".join(line.split()) for line in printed.splitlines()]
    lost = []
    for line in (" ".join(line.split()) for line in shown.splitlines()):
        if line in ("", "…"):
            continue
        place = next((place for place, candidate in enumerate(left) if _alike(line, candidate, tolerance)), None)
        if place is None:
            lost.append(line)
        else:
            left = left[place + 1 :]
    return lost


def _alike(one: str, two: str, tolerance: float) -> bool:
    if _NUMBER.sub("#", one) != _NUMBER.sub("#", two):
        return False
    pairs = zip(map(float, _NUMBER.findall(one)), map(float, _NUMBER.findall(two)), strict=True)
    return all(abs(a - b) <= tolerance * max(1.0, abs(a)) for a, b in pairs)
