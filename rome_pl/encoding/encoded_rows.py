"""Texts as rows of token ids."""

from dataclasses import dataclass

__all__ = ["EncodedEdit", "EncodedRow"]


@dataclass(frozen=True)
class EncodedRow:
    """One text as ids, cut after the last token that the model has to read.

    Args:
        ids: Token ids that the model reads, without the last target token.
        lookup: Index in ``ids`` of the lookup token.
        target: Ids to predict; ``target[t]`` follows ``ids[first + t]``.
        first: Index in ``ids`` of the position that predicts ``target[0]``.
    """

    ids: tuple[int, ...]
    lookup: int
    target: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class EncodedEdit:
    """All rows of one edit.

    Args:
        rows: The rewrite prompt under each context; row 0 is the bare prompt.
        kl_row: "{subject} is a" up to the position at which the divergence is taken, which is ``first``; no target.
        kept: Bare prompts and targets of earlier facts about the subject that the edit should preserve.
    """

    rows: tuple[EncodedRow, ...]
    kl_row: EncodedRow
    kept: tuple[EncodedRow, ...] = ()
