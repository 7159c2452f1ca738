"""What the value optimisation minimises (Meng et al. 2022, Eq. 4), for several independent edits in one forward."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rome_pl.encoding.aligned_rows import to_device
from rome_pl.encoding.row_layout import RowLayout
from rome_pl.forward.prefix_pass import PrefixPass

__all__ = ["Losses", "ValueObjective", "clamp_norm_"]


@dataclass(frozen=True)
class Losses:
    """One evaluation for n edits; every field has shape ``[n]``.

    Args:
        nll: Mean over contexts of the length-normalised negative log-likelihood of the target.
        kl: Divergence of "{subject} is a" from the model without offset, times its factor.
        decay: Norm penalty, times its factor.
        kept: Mean over earlier facts that are to stay of the same for their targets; 0 without any.
        greedy: Whether under every context, and after the facts that are to stay, every target token is the likeliest.
        bare_greedy: Whether every target token is the likeliest after the bare prompt.
    """

    nll: Tensor
    kl: Tensor
    decay: Tensor
    kept: Tensor
    greedy: Tensor
    bare_greedy: Tensor

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return self.nll + self.kl + self.decay + self.kept

    @property
    def probability(self) -> Tensor:
        """Geometric mean over contexts and target tokens of the target's probability; detached."""
        return self.nll.detach().neg().exp()


@dataclass(frozen=True)
class _Selection:
    """The rows of one evaluation, and where its losses are read."""

    key: object
    prefix: PrefixPass
    owner: Tensor
    positions: tuple[Tensor, Tensor]
    target_term: Tensor
    target_share: Tensor
    of_bare: Tensor
    base_norm: Tensor


class ValueObjective:
    """The losses of a batch of edits as functions of their value offsets.

    Args:
        prefix: Prefix pass over the rows of :func:`edit_rows`, in this order.
        layout: How they belong to edits.
        kl_factor: Weight of the divergence.
        v_weight_decay: Weight of the norm penalty.
    """

    def __init__(self, prefix: PrefixPass, layout: RowLayout, kl_factor: float, v_weight_decay: float) -> None:
        self.prefix, self.layout = prefix, layout
        self.kl_factor, self.v_weight_decay = kl_factor, v_weight_decay
        bare = to_device(torch.tensor([rows[0] for rows in layout.contexts]), prefix.outputs.device)
        #: Output of the projection at each bare prompt's lookup token, ``[n, d_value]``.
        self.base_output = prefix.outputs[bare]
        floating = torch.promote_types(self.base_output.dtype, torch.float32)
        #: Its norm: ``‖m_0‖``, ``[n]``.
        self.base_norm: Tensor = torch.linalg.vector_norm(self.base_output.to(floating), dim=1)
        self._base_kl: dict[int, Tensor] = {}
        self._selection: _Selection | None = None

    def __call__(
        self, deltas: Tensor, members: Sequence[int] | None = None, contexts: Sequence[Sequence[int]] | None = None
    ) -> Losses:
        """Evaluate some edits of the batch.

        Args:
            deltas: Their offsets, ``[n, d_value]``. An edit's first must be zero, where its divergence has its
                reference.
            members: Which edits; nothing means all.
            contexts: For each of them which of its contexts count, as indices; nothing means all.
        """
        if members is None:
            members = range(len(self.layout.contexts))
        selection = self._select(members, contexts)
        count = len(members)
        logits = selection.prefix.logits(deltas[selection.owner], selection.positions)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        at_targets, labels = logits[:-count], selection.prefix.rows.labels
        tokens = functional.cross_entropy(at_targets, labels, reduction="none")
        terms = tokens.new_zeros(2 * count).index_add(0, selection.target_term, tokens * selection.target_share)
        nll, kept = terms[:count], terms[count:]
        # A row that serves for the divergence alone has targets too, which have no share.
        missed = ((at_targets.detach().argmax(-1) != labels) & (selection.target_share > 0)).to(nll.dtype)
        missed_bare = nll.new_zeros(2 * count).detach().index_add(0, selection.target_term, missed * selection.of_bare)
        greedy = (
            nll.new_zeros(2 * count).detach().index_add(0, selection.target_term, missed).view(2, count).sum(0) == 0
        )
        at_kl = logits[-count:].log_softmax(-1)
        for place, member in enumerate(members):
            self._base_kl.setdefault(member, at_kl[place].detach())
        base = torch.stack([self._base_kl[member] for member in members])
        kl = self.kl_factor * (at_kl.exp() * (at_kl - base)).sum(-1)
        decay = self.v_weight_decay * torch.linalg.vector_norm(deltas, dim=1) / selection.base_norm**2
        return Losses(nll, kl, decay, kept, greedy, missed_bare[:count] == 0)

    def _select(self, members: Sequence[int], contexts: Sequence[Sequence[int]] | None) -> _Selection:
        key = (tuple(members), contexts and tuple(map(tuple, contexts)))
        if self._selection is not None and self._selection.key == key:
            return self._selection
        layout = self.layout
        rows: list[int] = []
        owner: list[int] = []
        terms: list[int] = []
        shares: list[float] = []
        kl: list[int] = []
        bare: list[int] = []
        for place, member in enumerate(members):
            chosen = layout.contexts[member]
            if contexts is not None:
                chosen = tuple(chosen[context] for context in contexts[place])
            # Contexts agree on the target's length but for tokenisation: average over tokens first, then over contexts.
            shares += [1 / (len(layout.rows[row].target) * len(chosen)) for row in chosen]
            if layout.kl[member] in chosen:
                kl.append(len(rows) + chosen.index(layout.kl[member]))
            else:
                kl.append(len(rows) + len(chosen))
                chosen = (*chosen, layout.kl[member])
                shares.append(0.0)  # this row has no target
            kept = layout.kept[member]
            shares += [1 / (len(layout.rows[row].target) * len(kept)) for row in kept]
            bare += [int(row == layout.contexts[member][0]) for row in (*chosen, *kept)]
            rows += (*chosen, *kept)
            owner += [place] * (len(chosen) + len(kept))
            terms += [place] * len(chosen) + [len(members) + place] * len(kept)
        prefix = self.prefix.select(rows)
        aligned, device = prefix.rows, prefix.hidden.device
        # A row that serves for the divergence alone may be a prompt whose targets do not count.
        at = torch.tensor([aligned.prefix + layout.kl_offset[member] for member in members])
        predict_row, predict_column = aligned.predict_row, aligned.predict_column
        owners = to_device(torch.tensor(owner), device)
        row_shares = to_device(torch.tensor(shares, dtype=torch.float64), device)
        self._selection = _Selection(
            key=key,
            prefix=prefix,
            owner=owners,
            positions=(
                torch.cat([predict_row, to_device(torch.tensor(kl), device)]),
                torch.cat([predict_column, to_device(at, device)]),
            ),
            base_norm=self.base_norm[to_device(torch.tensor(list(members)), device)],
            target_term=to_device(torch.tensor(terms), device)[predict_row],
            target_share=row_shares[predict_row].to(torch.promote_types(prefix.outputs.dtype, torch.float32)),
            of_bare=to_device(torch.tensor(bare), device)[predict_row],
        )
        return self._selection


@torch.no_grad()
def clamp_norm_(delta: Tensor, largest: Tensor) -> None:
    """Project onto the ball ``‖δ‖ ≤ largest``, in place and without a host sync."""
    norm = delta.norm()
    delta.mul_(torch.where(norm > largest, largest / norm, torch.ones_like(norm)))
