"""How a stream of requests is cut into batches, and shared among devices."""

from collections.abc import Iterator, Sequence
from typing import overload

from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from rome_pl.errors import OptionError
from rome_pl.requests import EditRequest

__all__ = ["WINDOW", "EditBatches", "RequestList", "check_shared"]

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


class EditBatches(DistributedSampler[list[int]]):
    """Lists of indices, one list a batch; every request exactly once over all ranks.

    All ranks give the same number of batches, the last of some being empty: Lightning synchronises them batch by
    batch. It is a ``DistributedSampler`` so that Lightning leaves it alone, and nothing else of one: that class repeats
    samples.

    Args:
        requests: The stream.
        batch_size: Requests of a batch.
        by_length: Whether batches may take requests of similar length from nearby instead of the next ones.
        rank: Which share to give.
        world_size: Number of shares.
    """

    def __init__(
        self,
        requests: Sequence[EditRequest],
        batch_size: int = 1,
        by_length: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(RequestList(requests), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        order = list(range(len(requests)))
        if by_length and batch_size > 1:
            window = WINDOW * batch_size
            order = [
                index
                for start in range(0, len(order), window)
                for index in sorted(order[start : start + window], key=lambda i: _length(requests[i]))
            ]
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self.batch_size = batch_size
        self._batches = batches[rank::world_size]
        self._batches += [[] for _ in range(-(-len(batches) // world_size) - len(self._batches))]

    @override
    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    @override
    def __len__(self) -> int:
        return len(self._batches)


def _length(request: EditRequest) -> int:
    """Characters from the subject's end to the target's: about what a suffix forward runs."""
    return len(request.prompt) - request.span[1] + len(request.target_new)


def check_shared(loader: object) -> None:
    """Refuse a loader that would give several devices the same request.

    Raises:
        OptionError: If its requests are not shared by :class:`EditBatches`.
    """
    if not isinstance(getattr(loader, "sampler", None), EditBatches):
        raise OptionError(
            "on several devices requests have to be shared by EditBatches, or some would be edited twice: "
            "use RequestDataModule"
        )
