r"""An offset found at the last rewrite layer, shared among all of them (Meng et al. 2023, MEMIT, Algorithm 1).

The offset :math:`\delta` moves the hidden state that leaves the last rewrite layer at the lookup token. With :math:`m`
rewrite layers the lowest one writes :math:`\delta / m`; each further one looks at how far the hidden state has come
under the writes below it and writes an even share of what is missing; the last one writes all that is left.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rome_pl.keys import EditKeys
from rome_pl.metric import Metric
from rome_pl.objective import EditRows
from rome_pl.prefix import PrefixPass
from rome_pl.rank_one import Assertion, Preset, Update

__all__ = ["Spread"]


class Spread:
    """The lookup tokens of a batch of edits, run again from the lowest rewrite layer to the last.

    Args:
        prefix: Prefix pass at the last rewrite layer, with those below.
        layout: How its rows belong to edits.
    """

    def __init__(self, prefix: PrefixPass, layout: EditRows) -> None:
        self._lowest, self._layout = prefix.below[0], layout
        self._sites = [*(lower.site for lower in prefix.below), prefix.site]
        self._before = self._lowest.through(self._sites)[-1].hidden

    def assertions(
        self, place: int, edits: Sequence[tuple[int, Tensor]], preset: Preset, metric: Metric, updates: Sequence[Update]
    ) -> list[Assertion]:
        """What edits assert at one layer, with the writes below it in the weights or given.

        Args:
            place: Which rewrite layer, 0 for the lowest.
            edits: The edits by their number in the layout, each with its offset, ``[d_value]``.
            preset: The variant of the closed form.
            metric: That of the layer.
            updates: What the layers below change that is not in the weights, for one edit.
        """
        rows = [row for edit, _ in edits for row in self._layout.contexts[edit]]
        each = [Update(one.left.expand(len(rows), -1), one.right.expand(len(rows), -1)) for one in updates]
        seen = self._lowest.select(rows).through(self._sites, each)
        moved = seen[-1].hidden.double() - self._before[torch.tensor(rows, device=self._before.device)].double()
        assertions, first = [], 0
        for edit, offset in edits:
            own = slice(first, first := first + len(self._layout.contexts[edit]))
            keys = EditKeys.of(seen[place].keys[own], seen[place].outputs[own], preset, metric)
            missing = offset.double() - keys.mix(moved[own], preset.at)
            assertions.append(keys.assertion(preset, missing / (len(self._sites) - place)))
        return assertions
