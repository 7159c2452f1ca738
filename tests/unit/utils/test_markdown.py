import html
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rome_pl.utils.markdown import backslash_escaped, entity_escaped, markdown_table

NASTY = "a|b *c* <b>d</b> `e` $f$ ~~g~~ &amp; \\ [h](i)"


@pytest.mark.parametrize("escape", [backslash_escaped, entity_escaped])
def test_every_row_has_the_columns_of_the_head(escape):
    table = markdown_table(("x", "y", "n"), [(NASTY, "two\nlines", "1"), ("z",)], numbers=1, escape=escape)
    lines = table.splitlines()
    assert lines[:2] == ["| x | y | n |", "|---|---|---:|"]
    assert [line.replace("\\|", "").count("|") for line in lines] == [4, 4, 4, 4]
    assert lines[2].endswith(" | two lines | 1 |")
    assert lines[3] == "| z | | |"


def test_cells_that_are_markdown_stay_as_they_are():
    assert markdown_table(("x",), [("**3** [0, 1]",)], escape=str).splitlines()[-1] == "| **3** [0, 1] |"


def test_tensorboard_shows_a_cell_as_it_is():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what TensorBoard brings along
        from tensorboard.plugin_util import markdown_to_safe_html
    shown = markdown_to_safe_html(markdown_table(("x",), [(NASTY,)], escape=entity_escaped))
    cell = shown.partition("<td>")[2].partition("</td>")[0]
    assert html.unescape(cell) == NASTY


@given(st.text())
def test_an_escaped_text_is_one_line_without_an_open_bar(text):
    for escape in (backslash_escaped, entity_escaped):
        escaped = escape(text)
        assert len(escaped.splitlines()) <= 1
        assert "|" not in escaped.replace("\\\\", "").replace("\\|", "")
    assert html.unescape(entity_escaped(text)).isprintable()
