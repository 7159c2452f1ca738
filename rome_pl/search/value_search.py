"""The search for values: several edits at once, each with its own offset, clamp and end.

The loop around it belongs to the LightningModule::

    while (loss := search.evaluate()) is not None:
        loss.backward()
        optimizer.step()
        search.project()
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from rome_pl.encoding.aligned_rows import to_device
from rome_pl.model.architecture import dtype_of_delta
from rome_pl.search.objective import Losses, ValueObjective, clamp_norm_
from rome_pl.utils.hashing import hash_seed

__all__ = ["Evaluation", "SearchOptions", "SearchResult", "ValueSearch"]

STEPS_BETWEEN_SYNCS = 4
"""Steps between two checks for ended edits on a GPU. In between the host need not wait for the device."""


@dataclass(frozen=True)
class SearchOptions:
    """Options of the search, as in :class:`rome_pl.RomeModule`."""

    v_num_grad_steps: int
    clamp_norm_factor: float
    stop_loss: float
    stop_probability: float
    stop_greedy: bool
    contexts_per_step: int | None
    seed: int


@dataclass(frozen=True)
class Evaluation:
    """The losses of one evaluation."""

    loss: float
    nll: float
    kl: float
    decay: float
    probability: float
    kept: float = 0.0  # missing in ledgers of earlier versions


@dataclass(frozen=True)
class SearchResult:
    """The result of the search of one edit.

    Args:
        delta: The offset at its last evaluation, ``[d_value]``.
        steps: Its evaluations, in order.
        greedy_before: Whether greedy decoding after the bare prompt gives the target without an offset.
    """

    delta: Tensor
    steps: list[Evaluation]
    greedy_before: bool

    @property
    def finite(self) -> bool:
        """Whether the loss stayed finite."""
        return math.isfinite(self.steps[-1].loss)


class ValueSearch:
    """Optimises the offsets of some edits of an objective.

    An edit ends at the first evaluation at which a stopping rule holds, and its offset is the one evaluated there. An
    ended edit leaves the batch at the next check.

    Args:
        objective: The losses.
        members: Indices of the edits in the objective.
        names: Their identifiers, which seed the draws of contexts.
        options: The options of the search.
    """

    def __init__(
        self, objective: ValueObjective, members: Sequence[int], names: Sequence[str], options: SearchOptions
    ) -> None:
        self.objective, self.options = objective, options
        self._members, self._names = list(members), list(names)
        weight = objective.prefix.site.weight
        dtype = dtype_of_delta(weight)
        self._parameters = [
            Parameter(torch.zeros(objective.base_output.shape[1], dtype=dtype, device=weight.device)) for _ in members
        ]
        self._largest = options.clamp_norm_factor * objective.base_norm
        count = len(self._members)
        self._ended = torch.zeros(count, dtype=torch.bool, device=weight.device)
        self._kept = torch.zeros(count, objective.base_output.shape[1], dtype=dtype, device=weight.device)
        self._greedy_before = torch.zeros(count, dtype=torch.bool, device=weight.device)
        self._taken = torch.zeros(count, dtype=torch.long, device=weight.device)
        self._records: list[tuple[list[int], Tensor]] = []
        self._running: list[int] = []
        self._enter(list(range(count)))
        self._interval = STEPS_BETWEEN_SYNCS if weight.device.type == "cuda" else 1
        #: Total losses of the running edits at the last evaluation, detached, in the order of :attr:`parameters`.
        self.losses: Tensor = self._kept.new_zeros(0)

    @property
    def parameters(self) -> list[Parameter]:
        """The offsets of the running edits, one parameter ``[d_value]`` each."""
        return [self._parameters[place] for place in self._running]

    def evaluate(self) -> Tensor | None:
        """Evaluate the running edits once.

        Returns:
            The sum of their losses, to differentiate; ``None`` once every edit has ended.
        """
        step, running = len(self._records), self._running
        if not running:
            return None
        members = [self._members[place] for place in running]
        deltas = torch.stack(list[Tensor](self.parameters))
        losses = self.objective(deltas, members, self._contexts(step))
        total = losses.total
        self.losses = total.detach()
        record = torch.stack([total, losses.nll, losses.kl, losses.decay, losses.probability, losses.kept]).detach()
        if step == 0:
            self._kept_before, self._greedy_before = losses.kept.detach(), losses.bare_greedy
        self._records.append((running, record))
        last = step + 1 >= self.options.v_num_grad_steps
        self._note_ends(deltas.detach(), record, losses, last)
        if last or (step + 1) % self._interval == 0:
            ended = self._ended.tolist()
            left = [place for place in running if not ended[place]]
            if not left:
                self._running = []
                return None
            if len(left) < len(running):
                total = total[[index for index, place in enumerate(running) if not ended[place]]]
                self.losses = total.detach()
                self._enter(left)
        return total.sum()

    def project(self) -> None:
        """Project every offset onto the ball ``‖δ‖ ≤ clamp_norm_factor · ‖m_0‖``."""
        for place in self._running:
            clamp_norm_(self._parameters[place], self._largest[self._members[place]])

    def found(self) -> list[SearchResult]:
        """The results, in the order of the members."""
        histories: list[list[Evaluation]] = [[] for _ in self._members]
        taken = self._taken.tolist()
        for running, record in self._records:
            for place, column in zip(running, record.T.tolist(), strict=True):
                if len(histories[place]) < taken[place]:
                    histories[place].append(Evaluation(*column))
        return [
            SearchResult(self._kept[place], steps, greedy)
            for place, (steps, greedy) in enumerate(zip(histories, self._greedy_before.tolist(), strict=True))
        ]

    def _enter(self, running: list[int]) -> None:
        """Continue with these edits. Their indices are copied to the device here, not at each step."""
        self._running = running
        device = self._kept.device
        self._places = to_device(torch.tensor(running), device)
        members = to_device(torch.tensor([self._members[place] for place in running]), device)
        #: Norm of the original value of each running edit.
        self.scales = self.objective.base_norm[members]

    def _note_ends(self, deltas: Tensor, record: Tensor, losses: Losses, last: bool) -> None:
        """Store the offsets of edits that end at this evaluation, on the device."""
        options = self.options
        loss, probability, kept = record[0], record[4], record[5]
        # Earlier facts about the subject have to be as probable as the new one, or as before.
        stay = (kept.neg().exp() > options.stop_probability) | (kept <= self._kept_before[self._places])
        ends = (loss < options.stop_loss) | ((probability > options.stop_probability) & stay) | ~loss.isfinite()
        if options.stop_greedy:
            ends |= losses.greedy
        if last:
            ends = torch.ones_like(ends)
        places = self._places
        before = self._ended[places]
        self._taken[places] += (~before).long()
        self._kept[places] = torch.where((ends & ~before).unsqueeze(1), deltas, self._kept[places])
        self._ended[places] = before | ends

    def _contexts(self, step: int) -> list[list[int]] | None:
        """The bare prompt and a seeded draw of other contexts, for each running edit; ``None`` for all."""
        wanted = self.options.contexts_per_step
        if wanted is None:
            return None
        drawn = []
        for place in self._running:
            others = range(1, len(self.objective.layout.contexts[self._members[place]]))
            generator = random.Random(hash_seed(self.options.seed, self._names[place], step))
            drawn.append([0, *sorted(generator.sample(others, min(wanted, len(others))))])
        return drawn
