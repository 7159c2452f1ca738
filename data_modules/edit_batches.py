"""Cutting a stream of requests into batches, and sharing them among devices."""

from collections.abc import Iterator, Sequence
from typing import overload

from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from rome_pl.errors import OptionError
from rome_pl.requests.conflicts import subjects_apart
from rome_pl.requests.edit_request import EditRequest

__all__ = ["WINDOW", "EditBatchSampler", "RequestList", "as_it_is", "check_shared"]

WINDOW = 8
"""Number of batches within which requests of similar length are grouped, so that a run that ends early
has done the beginning of the stream."""


class RequestList(Sequence[EditRequest]):
    """Requests that a loader may take one by one or several at once.

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
    """Return the batch unchanged: requests are text."""
    return batch


class EditBatchSampler(DistributedSampler[list[int]]):
    """Lists of indices, one list per batch. Over all ranks every request occurs exactly once.

    All ranks have the same number of batches, of which the last may be empty: Lightning synchronises ranks batch by
    batch. It subclasses ``DistributedSampler`` only to keep Lightning from replacing it: that class itself repeats
    samples.

    Args:
        requests: The stream.
        batch_size: Number of requests in a batch.
        by_length: Whether batches may group nearby requests of similar length; see :meth:`regroup`.
        rank: Index of the share.
        world_size: Number of shares.
        apart: Whether a batch ends before a second request about one of its subjects. Facts about one subject share a
            key, at which a joint solve cannot assert two values. In separate batches both can hold.
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
        """Regroup the batches by similar length, if allowed. Their number does not change.

        Args:
            lengths: For each request the number of tokens in a suffix forward.
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
        # Read lazily: Lightning makes its iterator before the module knows the lengths.
        for place in range(len(self._batches)):
            yield self._batches[place]

    @override
    def __len__(self) -> int:
        return len(self._batches)


def check_shared(loader: object) -> None:
    """Refuse a loader that could give several devices the same request.

    Raises:
        OptionError: If its requests are not shared by :class:`EditBatchSampler`.
    """
    if not isinstance(getattr(loader, "sampler", None), EditBatchSampler):
        raise OptionError(
            "on several devices requests have to be shared by EditBatches, or some would be edited twice: "
            "use RequestDataModule"
        )
