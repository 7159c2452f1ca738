"""Documents packed into blocks of a fixed shape, and the distribution of blocks to processes.

A block is the unit of summing: its term does not depend on the process that sums it.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from rome_pl.errors import OptionError, RomeError

__all__ = ["Block", "BlockStream", "Packer", "Plan"]

TEXTS_AT_ONCE = 64
"""Number of texts tokenized at once."""


@dataclass(frozen=True)
class Block:
    """The input of one step of a pass.

    Args:
        group: Index of the pass over the corpus.
        index: Number of the block in the corpus. ``None``: a step without a block for this process.
        input_ids: ``[rows, length]``.
        position_ids: Positions within each document, ``[rows, length]``.
        counted: Whether a token counts, ``[rows, length]``, bool.
        closes: Number of the boundary that all processes have reached after this block.
        ends: Whether the pass over the corpus ends with it.
        seen: Number of blocks of the corpus given to any process so far.
        error: The error that stopped a data loader's worker.
    """

    group: int
    index: int | None = None
    input_ids: Tensor | None = None
    position_ids: Tensor | None = None
    counted: Tensor | None = None
    closes: int | None = None
    ends: bool = False
    seen: int = 0
    error: RomeError | None = None

    def to(self, device: torch.device, **options: Any) -> "Block":
        """Move the tensors to a device. Lightning calls this."""
        if self.input_ids is None or self.position_ids is None or self.counted is None:
            return self
        return replace(
            self,
            input_ids=self.input_ids.to(device, **options),
            position_ids=self.position_ids.to(device, **options),
            counted=self.counted.to(device, **options),
        )


@dataclass(frozen=True)
class Packer:
    """Packs documents into blocks without padding between them.

    A document that does not fit continues in the next row, as a separate document. Every piece begins with the ids that
    the tokenizer puts before a text, such as BOS.

    Args:
        tokenizer: The model's tokenizer.
        rows: Rows of a block.
        length: Tokens of a row.
        pad_id: Id that fills the rest of the last block.
        opening: Ids that every piece begins with, see :attr:`rome_pl.encoding.text_encoder.TextEncoder.opening`.
    """

    tokenizer: Any
    rows: int
    length: int
    pad_id: int
    opening: tuple[int, ...]

    @property
    def size(self) -> int:
        """Tokens of a block."""
        return self.rows * self.length

    def blocks(self, texts: Iterable[str]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield ids, positions within the document, and whether a token counts; each ``[rows, length]``.

        Ids before a text and padding do not count.

        Raises:
            OptionError: If a row has no room for text.
        """
        lead = self.opening
        if self.length <= len(lead):
            raise OptionError(
                f"block_length: {self.length} leaves no room for text; the tokenizer puts {len(lead)} tokens before it"
            )
        # One triple per token: id, position, whether it counts.
        ids: list[int] = []
        positions: list[int] = []
        counted: list[bool] = []

        def put(piece: list[int], counts: list[bool]) -> None:
            ids.extend(piece)
            positions.extend(range(len(piece)))
            counted.extend(counts)

        def fill(multiple: int) -> None:
            while len(ids) % multiple:
                rest = self.length - len(ids) % self.length
                put([self.pad_id] * rest, [False] * rest)

        for tokens in self._tokenized(texts):
            taken = 0
            while taken < len(tokens):
                room = self.length - len(ids) % self.length - len(lead)
                if room > 0:
                    piece = tokens[taken : taken + room]
                    put([*lead, *piece], [False] * len(lead) + [True] * len(piece))
                    taken += room
                else:
                    fill(self.length)
                if len(ids) == self.size:
                    yield self._block(ids, positions, counted)
                    ids.clear()
                    positions.clear()
                    counted.clear()
        if ids:
            fill(self.size)
            yield self._block(ids, positions, counted)

    def _tokenized(self, texts: Iterable[str]) -> Iterator[list[int]]:
        texts = iter(texts)
        while some := list(itertools.islice(texts, TEXTS_AT_ONCE)):
            yield from self.tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]

    def _block(self, *columns: list[int] | list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        ids, positions, counted = (torch.tensor(column).reshape(self.rows, self.length) for column in columns)
        return ids, positions, counted


@dataclass
class Plan:
    """The remaining work, the same on all processes.

    Args:
        boundaries: Numbers of blocks after which all processes meet, in ascending order. A pass ends at the last one.
        done: For each pass the blocks that an earlier run has summed.
        met: For each pass the number of boundaries that an earlier run has reached.
        finished: Finished passes, added while the plan is carried out.
    """

    boundaries: list[list[int]]
    done: list[set[int]]
    met: list[int]
    finished: set[int] = field(default_factory=set)


class BlockStream(IterableDataset[Block]):
    """This process's share of the blocks, for every pass, with the boundaries at which all processes meet.

    Every process reads and packs the whole corpus, and takes every ``world_size``-th remaining block. All processes
    have the same number of steps, some of them empty. Workers of a data loader share the steps of their process, in
    order.

    Args:
        texts: Opens the corpus.
        packer: Packs it.
        plan: The remaining work.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        texts: Callable[[], Iterable[str]],
        packer: Packer,
        plan: Plan,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.texts, self.packer, self.plan = texts, packer, plan
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Block]:
        worker = get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        steps = (step for group in range(len(self.plan.boundaries)) for step in self._pass(group))
        own = itertools.islice(steps, first, None, every)
        return own if worker is None else _with_errors(own)

    def _pass(self, group: int) -> Iterator[Block]:
        boundaries, done = self.plan.boundaries[group], self.plan.done[group]
        waiting: list[Block] = []
        seen = stage = 0
        for ids, positions, counted in self.packer.blocks(self.texts()):
            if seen >= boundaries[-1] or group in self.plan.finished:
                break
            if seen not in done:
                waiting.append(Block(group, seen, ids, positions, counted))
            seen += 1
            at_boundary = seen == boundaries[stage]
            closes = stage if at_boundary and stage >= self.plan.met[group] else None
            if closes is not None or (waiting and (at_boundary or len(waiting) == self.world_size)):
                yield replace(self._own(group, waiting), closes=closes, seen=seen)
                waiting = []
            stage += at_boundary
        yield replace(self._own(group, waiting), ends=True, seen=seen)

    def _own(self, group: int, waiting: list[Block]) -> Block:
        return waiting[self.rank] if self.rank < len(waiting) else Block(group)


def _with_errors(blocks: Iterator[Block]) -> Iterator[Block]:
    """Yield the blocks, and an error as the last one: a data loader would turn its message into a traceback."""
    try:
        yield from blocks
    except RomeError as error:
        yield Block(group=0, error=error)
