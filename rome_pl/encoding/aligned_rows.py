"""Token rows padded so that the lookup tokens are in one column."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rome_pl.encoding.encoded_rows import EncodedRow

__all__ = ["AlignedRows", "align", "to_device"]


@dataclass(frozen=True)
class AlignedRows:
    """Rows padded so that all lookup tokens are in the same column.

    Tokens before the lookup token are padded on the left, tokens after it on the right.

    Args:
        source: The rows.
        input_ids: Shape ``[rows, prefix + suffix]``.
        attention_mask: Same shape, 0 for padding on the left. Padding on the right is not masked: no token looks ahead,
            and every column keeps something to attend to.
        position_ids: Same shape, counted from each row's first token to its last.
        prefix: Number of columns before the lookup column.
        predict_row: Row of every position that predicts a target token, shape ``[targets]``.
        predict_column: Its column in the whole row, shape ``[targets]``.
        labels: The target ids, shape ``[targets]``.
    """

    source: tuple[EncodedRow, ...]
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    prefix: int
    predict_row: Tensor
    predict_column: Tensor
    labels: Tensor

    @property
    def suffix(self) -> int:
        """Number of columns from the lookup column on."""
        return self.input_ids.shape[1] - self.prefix


def align(rows: Sequence[EncodedRow], pad_id: int, device: torch.device | str = "cpu") -> AlignedRows:
    """Pad rows around their lookup tokens.

    Args:
        rows: At least one row.
        pad_id: Id of padding; any id of the vocabulary will do.
        device: Device of the tensors.
    """
    prefix = max(row.lookup for row in rows)
    width = prefix + max(len(row.ids) - row.lookup for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    last = torch.tensor([len(row.ids) - 1 for row in rows]).unsqueeze(1)
    predict: list[tuple[int, int, int]] = []
    for index, row in enumerate(rows):
        start = prefix - row.lookup
        input_ids[index, start : start + len(row.ids)] = torch.tensor(row.ids)
        mask[index, start:] = 1
        predict += [(index, start + row.first + step, label) for step, label in enumerate(row.target)]
    rows_columns_labels = to_device(torch.tensor(predict, dtype=torch.long).reshape(-1, 3), device)
    return AlignedRows(
        source=tuple(rows),
        input_ids=to_device(input_ids, device),
        attention_mask=to_device(mask, device),
        # Padding on the right repeats the last position: counting further could exceed a model's table of positions.
        position_ids=to_device((mask.cumsum(1) - 1).clamp(min=0).minimum(last), device),
        prefix=prefix,
        predict_row=rows_columns_labels[:, 0],
        predict_column=rows_columns_labels[:, 1],
        labels=rows_columns_labels[:, 2],
    )


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor from the host to a device; to a GPU from pinned memory, so that the host does not wait."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
