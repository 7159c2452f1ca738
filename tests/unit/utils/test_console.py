"""Printing decides nothing, and no text steers the terminal."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from rome_pl.utils.console import VisibleFormatter, console, escape, guarded, lenient_output, visible, write_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, with\ttabs\nand lines", "plain text, with\ttabs\nand lines"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x00\x07\x08\r\x7f", r"\x00\x07\x08\x0d\x7f"),
        ("\x85\x9b31m", r"\x85\x9b31m"),
        ("\u202egnirts\u2069", r"\u202egnirts\u2069"),
        ("\u200e\u200f\u061c\u2066\ufeff\u200b", r"\u200e\u200f\u061c\u2066\ufeff\u200b"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\udc80", r"\udc80"),
        ("\U000e0041", r"\U000e0041"),
        ("東京 → Ångström é e\u0301 नमस्ते", "東京 → Ångström é e\u0301 नमस्ते"),
        ("👩\u200d🚀 क्\u200cष", "👩\u200d🚀 क्\u200cष"),  # joiners that emoji and scripts need
    ],
)
def test_what_steers_a_terminal_is_shown_by_its_escape(text, shown):
    assert visible(text) == shown


def test_markup_is_shown_as_it_is():
    assert escape("[bold]\x1b]0;title\x07") == r"\[bold]\x1b]0;title\x07"


def printed(what, encoding="utf-8", **options):
    """What a console writes to a standard output of an encoding."""
    bytes_ = io.BytesIO()
    before, sys.stdout = sys.stdout, io.TextIOWrapper(bytes_, encoding=encoding)
    try:
        console(width=60).print(what, **options)
        sys.stdout.flush()
        return bytes_.getvalue()
    finally:
        sys.stdout = before


def test_a_console_lets_no_control_through_also_where_nobody_escaped():
    table = Table("a\x1b[2Jb")
    table.add_row("c\u202ed", Text("e\x9bf"))
    for what in (table, "\x1b[2J", Text("\x1b]8;;http://x\x07")):
        shown = printed(what, markup=False).decode()
        assert not set(shown) & set("\x1b\x07\x9b\u202e")
        assert r"\x1b" in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437"])
def test_what_cannot_be_encoded_is_replaced(encoding):
    table = Table("true → new")
    table.add_row("Łódź → 東京 \udcff")
    shown = printed(table, encoding).decode(encoding)
    assert "true -> new" in shown or "→".encode(encoding, "ignore")
    assert r"\u6771\u4eac" in shown


class Broken(io.StringIO):
    """An output that is gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")


class Ugly:
    """What cannot be printed."""

    def __rich_console__(self, console, options):
        raise RuntimeError("no")
        yield


def test_no_failure_to_print_comes_out(monkeypatch, caplog):
    for stream in (Broken(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        console().print("text")
        write_line("text")
    closed = io.StringIO()
    closed.close()
    guarded(closed).write("text")
    monkeypatch.undo()
    console().print(Ugly())
    assert "could not be printed" in caplog.text


def test_log_lines_are_shown_too():
    record = logging.LogRecord("x", logging.ERROR, "x", 1, "record %s", ("\x1b[31m",), None)
    assert VisibleFormatter("%(message)s").format(record) == r"record \x1b[31m"


def test_streams_are_as_before_afterwards():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    before, sys.stdout = sys.stdout, stream
    try:
        with lenient_output():
            print("→ é", flush=True)
        assert stream.errors == "strict"
    finally:
        sys.stdout = before
    assert stream.buffer.getvalue() == b"-> \\xe9" + os.linesep.encode()


SHOW = "import sys; from rome_pl.cli.app import main; sys.exit(main(['--version']))"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_a_full_or_closed_output_leaves_the_exit_code():
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([sys.executable, "-c", SHOW], stdout=full, check=False).returncode == 0
    reading, writing = os.pipe()
    os.close(reading)
    assert subprocess.run([sys.executable, "-c", SHOW], stdout=writing, check=False).returncode == 0
    os.close(writing)
