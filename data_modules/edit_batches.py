"""How a stream of requests is cut into batches, and shared among devices."""

from collections.abc import Iterator, Sequence
from typing import overload

from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from rome_pl.errors import OptionError
from rome_pl.requests.conflicts import subjects_apart
from rome_pl.requests.edit_request import EditRequest

__all__ = ["WINDOW", "EditBatchSampler", "RequestList", "as_it_is", "check_shared"]

WINDOW = 8
"""Batches of similar length are formed within so many batches of the stream, so that a run that ends early has done its
beginning."""


class RequestList(Sequence[EditRequest]):
    """Requests that a loader may ask for one by one or several at once.

    Args:
        requests: The requests, in order.
    """

    def __init__(self, requests: Sequence[EditRequest]) -> None:
        self._requests = list(requests)

    @override
    def __len__(self) -> int:
        return len(self._requests)

    @overload
    def __getitem__(self, index: int) -> EditRequest: ...
    @overload
    def __getitem__(self, index: slice | list[int]) -> list[EditRequest]: ...
    @override
    def __getitem__(self, index: int | slice | list[int]) -> EditRequest | list[EditRequest]:
        if isinstance(index, list):
            return [self._requests[i] for i in index]
        return self._requests[index]


def as_it_is(batch: list[EditRequest]) -> list[EditRequest]:
    """Requests are text: nothing to collate."""
    return batch


class EditBatchSampler(DistributedSampler[list[int]]):
    """Lists of indices, one list a batch; every request exactly once over all ranks.

    All ranks give the same number of batches, the last of some being empty: Lightning synchronises them batch by
    batch. It is a ``DistributedSampler`` so that Lightning leaves it alone, and nothing else of one: that class repeats
    samples.

    Args:
        requests: The stream.
        batch_size: Requests of a batch.
        by_length: Whether batches may take requests of similar length from nearby instead of the next ones; see
            :meth:`regroup`.
        rank: Which share to give.
        world_size: Number of shares.
        apart: Whether a batch ends before a request about a subject that it has already: facts about one subject have
            one key, at which a joint solve cannot assert two values; one after the other they can be kept.
    """

    def __init__(
        self,
        requests: Sequence[EditRequest],
        batch_size: int = 1,
        by_length: bool = False,
        rank: int = 0,
        world_size: int = 1,
        apart: bool = False,
    ) -> None:
        super().__init__(RequestList(requests), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.batch_size, self.by_length = batch_size, by_length
        order = list(range(len(requests)))
        self._batches = self._share(subjects_apart(requests, batch_size) if apart else self._cut(order))

    def regroup(self, lengths: Sequence[int]) -> None:
        """Form the batches anew from requests of similar length, if that is allowed; their number stays.

        Args:
            lengths: Tokens that a suffix forward runs, for each request.
        """
        if not self.by_length or self.batch_size == 1:
            return
        window = WINDOW * self.batch_size
        order: list[int] = []
        for start in range(0, len(lengths), window):
            order += sorted(range(start, min(start + window, len(lengths))), key=lambda index: lengths[index])
        self._batches = self._share(self._cut(order))

    def _cut(self, order: list[int]) -> list[list[int]]:
        """The batches of all ranks."""
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def _share(self, batches: list[list[int]]) -> list[list[int]]:
        """This rank's batches."""
        mine = batches[self.rank :: self.num_replicas]
        return mine + [[] for _ in range(-(-len(batches) // self.num_replicas) - len(mine))]

    @override
    def __iter__(self) -> Iterator[list[int]]:
        # One look at a time: Lightning makes its iterator before the module knows the lengths.
        for place in range(len(self._batches)):
            yield self._batches[place]

    @override
    def __len__(self) -> int:
        return len(self._batches)


def check_shared(loader: object) -> None:
    """Refuse a loader that would give several devices the same request.

    Raises:
        OptionError: If its requests are not shared by :class:`EditBatchSampler`.
    """
    if not isinstance(getattr(loader, "sampler", None), EditBatchSampler):
        raise OptionError(
            "on several devices requests have to be shared by EditBatches, or some would be edited twice: "
            "use RequestDataModule"
        )
