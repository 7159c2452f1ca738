"""A prefix pass without padding on the left, for models that it disturbs.

Some models count a token's position by its column, others let padding into a recurrence. Their rows run as a whole,
those with the lookup token in one column together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rome_pl.encoding.aligned_rows import align, to_device
from rome_pl.encoding.encoded_rows import EncodedRow
from rome_pl.forward.prefix_pass import Lookup, PrefixPass, run_prefix
from rome_pl.model.architecture import RewriteSite

__all__ = ["UnpaddedPass", "run_unpadded"]


@dataclass
class UnpaddedPass(PrefixPass):
    """The results of prefix passes, one for each column of lookup tokens. Its hidden states are in its parts.

    Args:
        parts: The passes, each with the numbers of its rows.
    """

    parts: tuple[tuple[tuple[int, ...], PrefixPass], ...] = ()

    def logits(self, delta: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """Logits at chosen positions with ``delta`` added; see :meth:`PrefixPass.logits`."""
        rows, columns = positions
        found, order = [], []
        for numbers, part in self.parts:
            index = _index(numbers, rows.device)
            places = torch.isin(rows, index).nonzero().squeeze(1)
            if not len(places):
                continue
            local = torch.zeros(len(self.rows.source), dtype=torch.long, device=rows.device)
            local[index] = torch.arange(len(numbers), device=rows.device)
            here = (local[rows[places]], columns[places] - self.rows.prefix + part.rows.prefix)
            found.append(replace(part, stand_ins=self.stand_ins).logits(delta[index], here))
            order.append(places)
        return torch.cat(found)[torch.cat(order).argsort()]

    def select(self, rows: Sequence[int]) -> PrefixPass:
        """Return the pass for some of the rows, in the order given."""
        if list(rows) == list(range(len(self.rows.source))):
            return self
        parts = []
        for numbers, part in self.parts:
            chosen = [(place, numbers.index(row)) for place, row in enumerate(rows) if row in numbers]
            if chosen:
                parts.append((tuple(place for place, _ in chosen), part.select([local for _, local in chosen])))
        return replace(_joined(parts), stand_ins=self.stand_ins)

    def through(self, sites: Sequence[RewriteSite], changes: Sequence[tuple[Tensor, Tensor]] = ()) -> list[Lookup]:
        """Run the lookup column from this pass's layer on; see :meth:`PrefixPass.through`."""
        seen = []
        for numbers, part in self.parts:
            index = _index(numbers, self.keys.device)
            seen.append(part.through(sites, [(left[index], right[index]) for left, right in changes]))
        return [
            Lookup(
                *(self._whole([getattr(one[place], name) for one in seen]) for name in ("keys", "outputs", "hidden"))
            )
            for place in range(len(sites))
        ]

    def _whole(self, found: Sequence[Tensor]) -> Tensor:
        return _scattered([numbers for numbers, _ in self.parts], found)


@torch.no_grad()
def run_unpadded(
    model: Any, site: RewriteSite, rows: Sequence[EncodedRow], pad_id: int, below: Sequence[RewriteSite] = ()
) -> UnpaddedPass:
    """Run rows without padding on the left; see :func:`rome_pl.forward.prefix_pass.run_prefix`."""
    columns = sorted({row.lookup for row in rows})
    groups = [tuple(number for number, row in enumerate(rows) if row.lookup == column) for column in columns]
    parts = [
        (numbers, run_prefix(model, site, [rows[number] for number in numbers], pad_id, True, below))
        for numbers in groups
    ]
    lower = tuple(_joined([(numbers, part.below[place]) for numbers, part in parts]) for place in range(len(below)))
    return replace(_joined(parts), below=lower)


def _joined(parts: Sequence[tuple[tuple[int, ...], PrefixPass]]) -> UnpaddedPass:
    some, numbers = parts[0][1], [numbers for numbers, _ in parts]
    source = dict(pair for rows, part in parts for pair in zip(rows, part.rows.source, strict=True))

    def whole(read: Callable[[PrefixPass], Tensor]) -> Tensor:
        return _scattered(numbers, [read(part) for _, part in parts])

    return UnpaddedPass(
        model=some.model,
        site=some.site,
        rows=align([source[number] for number in range(len(source))], some.pad_id, some.hidden.device),
        pad_id=some.pad_id,
        keys=whole(lambda part: part.keys),
        outputs=whole(lambda part: part.outputs),
        hidden=some.hidden,
        cache=[],
        answer=some.answer,
        start=0,
        parts=tuple(parts),
    )


def _scattered(numbers: Sequence[tuple[int, ...]], found: Sequence[Tensor]) -> Tensor:
    """Join rows of several tensors in the order of their numbers."""
    whole = torch.cat(list(found))
    return whole[_index([number for part in numbers for number in part], whole.device).argsort()]


def _index(numbers: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor(list(numbers)), device)
