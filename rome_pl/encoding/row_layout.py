"""The rows of a batch of edits."""

from collections.abc import Sequence
from dataclasses import dataclass

from rome_pl.encoding.encoded_rows import EncodedEdit, EncodedRow

__all__ = ["RowLayout", "row_layout"]


@dataclass(frozen=True)
class RowLayout:
    """Rows of several edits in one batch.

    Args:
        rows: All rows.
        contexts: For each edit the indices of its prompt under each context, the bare prompt first.
        kl: For each edit the index of the row in which the divergence is measured.
        kl_offset: For each edit the number of tokens between the lookup token and the divergence's position.
        kept: For each edit the indices of earlier facts to preserve.
    """

    rows: tuple[EncodedRow, ...]
    contexts: tuple[tuple[int, ...], ...]
    kl: tuple[int, ...]
    kl_offset: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]


def row_layout(edits: Sequence[EncodedEdit]) -> RowLayout:
    """Lay out the rows of a batch.

    If the bare prompt begins with the divergence row, as it does when the prompt begins with the subject, both share a
    row at no cost.
    """
    rows: list[EncodedRow] = []
    contexts, kl, kept = [], [], []
    for edit in edits:
        contexts.append(tuple(range(len(rows), len(rows) + len(edit.rows))))
        rows += edit.rows
        bare, apart = edit.rows[0], edit.kl_row
        if bare.lookup == apart.lookup and bare.ids[: len(apart.ids)] == apart.ids:
            kl.append(contexts[-1][0])
        else:
            kl.append(len(rows))
            rows.append(apart)
        kept.append(tuple(range(len(rows), len(rows) + len(edit.kept))))
        rows += edit.kept
    offsets = tuple(edit.kl_row.first - edit.kl_row.lookup for edit in edits)
    return RowLayout(tuple(rows), tuple(contexts), tuple(kl), offsets, tuple(kept))
