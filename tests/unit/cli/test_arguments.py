"""Arguments of plain verbs, with and without their names."""

import pytest

from rome_pl.cli.arguments import named


def verb(ledger: str, other: str, top: int = 10) -> None:
    """Two things it cannot do without, and one it can."""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], []),
        (["a"], ["--ledger", "a"]),
        (["a", "b"], ["--ledger", "a", "--other", "b"]),
        (["a", "b", "--top", "3"], ["--ledger", "a", "--other", "b", "--top", "3"]),
        (["a", "--other", "b"], ["--ledger", "a", "--other", "b"]),
        (["--other", "b", "--ledger", "a"], ["--other", "b", "--ledger", "a"]),
        (["a", "b", "3"], ["--ledger", "a", "--other", "b", "3"]),  # the parser says that it knows no such argument
        (["--help"], ["--help"]),
    ],
)
def test_required_arguments_may_come_first_without_names(given, expected):
    assert named(verb, given) == expected
