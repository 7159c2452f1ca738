"""Tables in Markdown, and how a text stays as it is in one."""

import re
from collections.abc import Callable, Iterable, Sequence

__all__ = ["backslash_escaped", "entity_escaped", "markdown_table"]


def backslash_escaped(text: str) -> str:
    r"""A text on one line that a reader of Markdown shows as it is, in a cell too.

    Example:
        >>> print(backslash_escaped("a|b *c*"))
        a\|b \*c\*
    """
    return re.sub(r"([\\`*_{}\[\]<>#|~$!&])", r"\\\1", " ".join(text.split()))


def entity_escaped(text: str) -> str:
    """The same for TensorBoard, whose Markdown knows no backslash before ``<``, ``$`` or ``~``.

    A character that cannot be printed is replaced.

    Example:
        >>> entity_escaped("a|b *c*")
        'a&#124;b &#42;c&#42;'
    """
    shown = (char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))
    return "".join(char if char.isalnum() or char == " " or ord(char) > 127 else f"&#{ord(char)};" for char in shown)


def markdown_table(
    names: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: int = 0,
    escape: Callable[[str], str] = backslash_escaped,
) -> str:
    r"""A table in Markdown, without a line break at its end.

    Args:
        names: The columns' names, in Markdown.
        rows: The texts of each row's cells; those that a row lacks at its end are empty.
        numbers: How many of the last columns hold numbers, which stand to the right.
        escape: Makes Markdown of a cell's text; ``str`` for cells that are Markdown.

    Example:
        >>> print(markdown_table(("record", "%"), [("a|b", "50"), ("c",)], numbers=1))
        | record | % |
        |---|---:|
        | a\|b | 50 |
        | c | |
    """
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * (len(names) - numbers) + "---:|" * numbers]
    for row in rows:
        lines.append(f"| {' | '.join(map(escape, row))} |" + " |" * (len(names) - len(row)))
    return "\n".join(lines)
