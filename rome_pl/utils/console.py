"""Safe printing: no text of a user or model controls the terminal, and no failing output ends a run.

Printed texts come from facts, ledgers and models. Control characters that change how a terminal shows text are printed
as escapes. A character that the output cannot encode is replaced. A closed or full output is dropped, and the run
continues.
"""

import codecs
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape as escape_markup
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from typing_extensions import override

__all__ = [
    "VisibleFormatter",
    "console",
    "escape",
    "guarded",
    "lenient_output",
    "progress_bar",
    "visible",
    "write_line",
]

REPLACED = "rome_pl.replaced"
"""Name of the :mod:`codecs` error handler that replaces characters an output cannot encode."""

PLAIN = {"→": "->", "…": "...", "\u2013": "-", "—": "-", "“": '"', "”": '"', "≥": ">=", "≤": "<="}
"""Replacements for the signs in our own tables."""

JOINERS = "\u200c\u200d"
"""Harmless format characters that scripts and emoji need."""

_SUSPECT = re.compile(r"[^\n\t -~]")

log = logging.getLogger(__name__)


def visible(text: str) -> str:
    r"""Replace characters that could control a terminal by escapes such as ``\x1b``; keep line breaks and tabs.

    These are the controls (C0, DEL, C1), format characters such as bidirectional marks, separators of lines and
    paragraphs, and lone surrogates.
    """
    return _SUSPECT.sub(lambda match: _shown(match[0]), text)


def _shown(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in JOINERS:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def escape(text: str) -> str:
    """Escape Rich's markup in a text, and apply :func:`visible`."""
    return escape_markup(visible(text))


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    shown = (PLAIN.get(one) or one.encode("ascii", "backslashreplace").decode("ascii") for one in text)
    return "".join(shown), error.end


codecs.register_error(REPLACED, _replace)


class _Guarded:
    """Wraps a stream: writing accepts every text and never raises."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text; replace characters that the stream cannot encode."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with suppress(LookupError):
            text = text.encode(encoding, REPLACED).decode(encoding)
        with suppress(OSError, ValueError):  # closed, full, or gone
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream if possible."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guarded(stream: TextIO) -> TextIO:
    """Wrap a stream, so that writing accepts every text and never raises."""
    return cast(TextIO, _Guarded(stream))


class _SafeConsole(Console):
    """A Rich console that never raises while printing, and applies :func:`visible` to texts."""

    @override
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    @override
    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except Exception:  # the results do not depend on what is printed
            log.warning("Something could not be printed; the files of the run hold it", exc_info=True)


def console(*, error: bool = False, **options: Any) -> Console:
    """Return the console for everything that is printed.

    Args:
        error: Whether to print to the standard error.
        options: Options of Rich's console.
    """
    stream = sys.stderr if error else sys.stdout
    return _SafeConsole(file=guarded(stream), **options) if stream is not None else _SafeConsole(quiet=True, **options)


@contextmanager
def progress_bar(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on the standard error until the block ends.

    Args:
        title: Name of the work.
        total: Amount of work, in ``unit``.
        unit: Name of the unit.

    Yields:
        A function to call with the amount of work done since the last call.
    """
    columns = (TextColumn(title), BarColumn(), TextColumn(f"{{task.completed}}/{{task.total}} {unit}"))
    with Progress(*columns, TimeRemainingColumn(), transient=True, console=console(error=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda done: progress.update(task, advance=done)


def write_line(text: str, *, error: bool = False) -> None:
    """Write plain text and a line break to the standard output, or to the standard error."""
    stream = sys.stderr if error else sys.stdout
    if stream is not None:  # as in a process without a console
        out = guarded(stream)
        out.write(visible(text) + "\n")
        out.flush()


class VisibleFormatter(logging.Formatter):
    """Applies :func:`visible` to log records, tracebacks included."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextmanager
def lenient_output() -> Iterator[None]:
    """Let the standard streams replace characters they cannot encode; afterwards drop unwritten output.

    Otherwise a stream that fails when Python flushes it at exit would change the exit code.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    before = [stream.errors for stream in streams]
    for stream in streams:
        _set_errors(stream, REPLACED)
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            _set_errors(stream, errors)
            try:
                stream.flush()
            except (OSError, ValueError):
                _give_up(stream)


def _set_errors(stream: Any, errors: str | None) -> None:
    with suppress(OSError, ValueError):  # it flushes first
        stream.reconfigure(errors=errors)


def _give_up(stream: Any) -> None:
    """Discard the buffered output of a stream."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
