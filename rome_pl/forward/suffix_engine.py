"""Running suffixes with a cached prefix if the model's cache allows it, else with whole rows, else without padding."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rome_pl.encoding.encoded_rows import EncodedRow
from rome_pl.forward.hooks import add_at_column
from rome_pl.forward.prefix_pass import PrefixPass, run_prefix
from rome_pl.forward.unpadded_pass import run_unpadded
from rome_pl.model.architecture import RewriteSite, UnsupportedModelError, decoder_layers, dtype_of_delta
from rome_pl.utils.restored_state import frozen

__all__ = ["SuffixEngine"]

log = logging.getLogger(__name__)

LARGEST_ERROR = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Largest difference of logits from those of a plain forward, in their standard deviations; 0.2 in half precision."""


LARGEST_PRODUCT_ERROR = 0.05
"""Largest relative difference between the weight times the key and what a mixture of experts gives."""

LARGEST_SHARE_ERROR = 0.2
"""Largest relative difference between an offset and the change of the hidden state, including rounding to bfloat16."""


_WAYS = (
    (False, False, ""),
    (True, False, "%s cannot continue from a cached prefix (%s): every step runs whole rows, which is slower"),
    (
        True,
        True,
        "%s gives other results for rows that are padded on the left (%s): every step runs whole rows, those of one "
        "length at a time, which is slower",
    ),
)
"""How suffixes may run, the fastest first: whether as whole rows, whether without padding on the left; a warning."""


class _RunsAgainError(UnsupportedModelError):
    """A layer that runs more than once in a forward."""


class SuffixEngine:
    """Runs prefix passes of one model and site.

    Before its first pass it compares two rows, with an offset added, with plain forwards of each. This finds a cache
    that cannot be cut before the lookup token, or a layer that padding disturbs, before the first edit. Such a model
    runs whole rows in every step, or whole rows without padding on the left, with a warning.

    Args:
        model: The language model.
        site: The projection at which offsets enter.
        pad_id: Id that fills the padding.
        compiled: Whether to run the decoder layers above the site through ``torch.compile``.
        below: Lower rewrite layers, the lowest first.
    """

    def __init__(
        self, model: Any, site: RewriteSite, pad_id: int, compiled: bool = False, below: Sequence[RewriteSite] = ()
    ) -> None:
        self.model, self.site, self.pad_id, self.below = model, site, pad_id, tuple(below)
        self.whole_rows: bool | None = None
        self.unpadded = False
        self._shared = self._linear = False
        self._stand_ins: Mapping[int, nn.Module] = {}
        if compiled:
            layers = decoder_layers(model)[1]
            above = range(site.layer + 1, len(layers))
            self._stand_ins = {index: torch.compile(layers[index]) for index in above}  # type: ignore[misc]

    @property
    def layers(self) -> tuple[int, ...]:
        """The rewrite layers, the lowest first."""
        return (*(site.layer for site in self.below), self.site.layer)

    def check(self, rows: Sequence[EncodedRow]) -> None:
        """Find out once how suffixes have to run.

        Raises:
            UnsupportedModelError: If padded rows give other results than single ones even as whole rows, or if an
                offset cannot be shared among several layers.
        """
        self._check_shares(rows[:1])
        longest = max(rows, key=lambda row: row.lookup)
        if self.whole_rows is not None or longest.lookup == 0:
            return  # rows without a prefix need neither cache nor padding: check with later rows
        cut = (longest.lookup + 1) // 2
        shorter = replace(longest, ids=longest.ids[cut:], lookup=longest.lookup - cut, first=longest.first - cut)
        two = [longest, shorter]
        reasons = []
        for whole, unpadded, slower in _WAYS:
            try:
                error, largest = self._error(two, whole, unpadded)
            except (torch.OutOfMemoryError, _RunsAgainError):
                raise
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as failure:
                reasons.append(f"{type(failure).__name__}: {failure}")  # another kind of cache may raise this
                continue
            if error is None:  # these rows overflow in a plain forward too: check with later rows
                return
            if error <= largest:
                if slower:
                    log.warning(slower, type(self.model).__name__, reasons[-1])
                self.whole_rows, self.unpadded = whole, unpadded
                return
            reasons.append(f"logits are off by {error:.1g} of their spread")
        raise UnsupportedModelError(
            f"{type(self.model).__name__} gives other results for rows in a batch than for single rows "
            f"({'; '.join(reasons)}), so edits on it could not be trusted"
        )

    def run(self, rows: Sequence[EncodedRow]) -> PrefixPass:
        """Run the prefix pass over rows; see :func:`run_prefix` and :meth:`check`."""
        self.check(rows)
        made = self._run(rows, bool(self.whole_rows), self.unpadded, self.below)
        self._check_products(made)
        return replace(made, stand_ins=self._stand_ins)

    def _run(
        self, rows: Sequence[EncodedRow], whole: bool, unpadded: bool, below: Sequence[RewriteSite] = ()
    ) -> PrefixPass:
        if unpadded:
            return run_unpadded(self.model, self.site, rows, self.pad_id, below)
        return run_prefix(self.model, self.site, rows, self.pad_id, whole, below)

    @torch.no_grad()
    def _error(self, rows: Sequence[EncodedRow], whole: bool, unpadded: bool) -> tuple[float | None, float]:
        """Largest difference to plain forwards, and the tolerance, in standard deviations of the logits.

        The difference is ``None`` if plain forwards are not finite either.
        """
        made = self._run(rows, whole, unpadded)
        delta = self._random_delta(made)
        last = torch.tensor([made.rows.prefix + len(row.ids) - 1 - row.lookup for row in rows], device=delta.device)
        logits = made.logits(delta, (torch.arange(len(rows), device=delta.device), last)).double()
        plain = torch.stack([self._plain(row, delta[index : index + 1]) for index, row in enumerate(rows)]).double()
        largest = LARGEST_ERROR.get(self.site.weight.dtype, 0.2)
        if not bool(plain.isfinite().all()):
            return None, largest
        seen = plain > torch.finfo(self.site.weight.dtype).min / 2  # some models mask tokens that they never write
        return float((logits - plain)[seen].abs().max() / plain[seen].std()), largest

    @torch.no_grad()
    def _check_products(self, made: PrefixPass) -> None:
        """Refuse a mixture of experts whose output is not the weight times the key: a write would do something else."""
        if self._linear:
            return
        for one in (*made.below, made):
            if one.site.experts == 1:
                continue
            given, matrix = one.outputs.double(), one.site.matrix(one.site.weight)
            error = float((one.keys.double() @ matrix.double().T - given).norm() / given.norm())
            if error > LARGEST_PRODUCT_ERROR:
                raise UnsupportedModelError(
                    f"layer {one.site.layer} of {type(self.model).__name__} gives something else than the sum of its "
                    f"experts' products by the router's weights ({error:.0%} off): an edit there could not be trusted; "
                    "choose another layer"
                )
        self._linear = True

    @torch.no_grad()
    def _check_shares(self, rows: Sequence[EncodedRow]) -> None:
        """Refuse several layers if the MLP's output is not simply added to the hidden state."""
        if not self.below or self._shared:
            return
        made = run_prefix(self.model, self.site, rows, self.pad_id, True, self.below)
        delta, sites = self._random_delta(made), [*self.below, self.site]
        before = made.below[0].through(sites)[-1].hidden
        with add_at_column(self.site.projection, delta, made.rows.prefix - made.start):
            after = made.below[0].through(sites)[-1].hidden
        error = float(((after - before).to(delta) - delta).norm() / delta.norm())
        self._shared = error <= LARGEST_SHARE_ERROR
        if not self._shared:
            raise UnsupportedModelError(
                f"layers: {type(self.model).__name__} changes what its MLP gives before adding it to the hidden state "
                f"(an offset arrives {error:.0%} off), so other layers cannot write shares of it; give one layer, in "
                "each of retries too"
            )

    def _random_delta(self, made: PrefixPass) -> Tensor:
        """Seeded offsets as large as the projection's output, ``[rows, d_value]``."""
        dtype = dtype_of_delta(self.site.weight)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(len(made.outputs), self.site.d_value, generator=generator, dtype=dtype)
        scale = made.outputs.to(dtype).norm(dim=1, keepdim=True) / direction.norm(dim=1, keepdim=True).to(made.outputs)
        delta: Tensor = direction.to(scale.device) * scale
        return delta

    def _plain(self, row: EncodedRow, delta: Tensor) -> Tensor:
        """Logits after one row's last token, from a forward of that row alone."""
        input_ids = torch.tensor([row.ids], device=delta.device)
        runs: list[None] = []
        with frozen(self.model), add_at_column(self.site.projection, delta, row.lookup):
            handle = self.site.projection.register_forward_hook(lambda *_: runs.append(None))
            try:
                logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits[0, -1]
            finally:
                handle.remove()
        if len(runs) > 1:
            raise _RunsAgainError(
                f"{type(self.model).__name__} runs layer {self.site.layer} {len(runs)} times for each token: one value "
                "cannot be asserted for all of them"
            )
        return logits
