r"""An offset found at the last rewrite layer, shared among all of them (Meng et al. 2023, MEMIT, Algorithm 1).

The offset :math:`\delta` moves the hidden state that leaves the last rewrite layer at the lookup token. With :math:`m`
rewrite layers the lowest one writes :math:`\delta / m`; each further one looks at how far the hidden state has come
under the writes below it and writes a share of what is missing; the last one writes all that is left.

MEMIT's shares are even. Where layer :math:`l` writes the share :math:`s_l`, ordinary text is disturbed by
:math:`\sum_l s_l^2 \|\delta\|^2 / k_l^\top M_l k_l` (the mean square of :math:`\Delta W k` over text, for
:math:`M = C^{-1}`), which is least for shares in proportion to :math:`k_l^\top M_l k_l`: a layer that takes the subject
for something common writes little.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rome_pl.encoding.row_layout import RowLayout
from rome_pl.forward.prefix_pass import PrefixPass
from rome_pl.write.closed_form import Assertion, Update
from rome_pl.write.edit_keys import EditKeys
from rome_pl.write.key_metric import KeyMetric
from rome_pl.write.presets import Preset

__all__ = ["LayerShares", "keys_at"]


def keys_at(prefix: PrefixPass, rows: Sequence[int], preset: Preset, metrics: Sequence[KeyMetric]) -> list[EditKeys]:
    """The keys of one edit at every rewrite layer, the lowest first, with the weights as the prefix pass saw them.

    Args:
        prefix: Prefix pass at the last rewrite layer, with those below.
        rows: The edit's rows, one behind the other, the bare prompt's first.
        preset: The variant of the closed form.
        metrics: Those of the layers.
    """
    own = slice(rows[0], rows[-1] + 1)
    pairs = zip((*prefix.below, prefix), metrics, strict=True)
    return [EditKeys.of(one.keys[own], one.outputs[own], preset, metric) for one, metric in pairs]


class LayerShares:
    """The lookup tokens of a batch of edits, run again from the lowest rewrite layer to the last.

    Args:
        prefix: Prefix pass at the last rewrite layer, with those below.
        layout: How its rows belong to edits.
        preset: The variant of the closed form.
        metrics: Those of the rewrite layers, the lowest first.
        weights: For each edit how specific its key is at each layer, see :meth:`EditedLayers.specificity`.
    """

    def __init__(
        self,
        prefix: PrefixPass,
        layout: RowLayout,
        preset: Preset,
        metrics: Sequence[KeyMetric],
        weights: Sequence[Sequence[float]],
    ) -> None:
        self._lowest, self._layout = prefix.below[0], layout
        self._preset, self._metrics, self._weights = preset, tuple(metrics), weights
        self._sites = [*(lower.site for lower in prefix.below), prefix.site]
        self._before = self._lowest.through(self._sites)[-1].hidden

    def assertions(
        self, place: int, edits: Sequence[tuple[int, Tensor]], updates: Sequence[Update] = ()
    ) -> list[Assertion]:
        """What edits assert at one layer, with the writes below it in the weights or given.

        Args:
            place: Which rewrite layer, 0 for the lowest.
            edits: The edits by their number in the layout, each with its offset, ``[d_value]``.
            updates: What the layers below change that is not in the weights, for one edit.
        """
        preset, metric = self._preset, self._metrics[place]
        rows = [row for edit, _ in edits for row in self._layout.contexts[edit]]
        each = [(one.left.expand(len(rows), -1), one.right.expand(len(rows), -1)) for one in updates]
        seen = self._lowest.select(rows).through(self._sites, each)
        moved = seen[-1].hidden.double() - self._before[torch.tensor(rows, device=self._before.device)].double()
        assertions, first = [], 0
        for edit, offset in edits:
            own = slice(first, first := first + len(self._layout.contexts[edit]))
            keys = EditKeys.of(seen[place].keys[own], seen[place].outputs[own], preset, metric)
            missing = offset.double() - keys.mix(moved[own], preset.at)
            assertions.append(keys.assertion(preset, self._share(edit, place) * missing))
        return assertions

    def _share(self, edit: int, place: int) -> float:
        """Which part of what is missing a layer writes."""
        left = self._weights[edit][place:] if self._preset.shares == "specific" else [1.0] * (len(self._sites) - place)
        return left[0] / sum(left)
