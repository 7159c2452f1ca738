"""The sample of earlier edits that is measured again between edits."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from rome_pl.data_modules.edit_batches import as_it_is
from rome_pl.editing.session import EditSession
from rome_pl.metrics.probes import MEASURED_TOGETHER
from rome_pl.requests.edit_request import EditRequest
from rome_pl.requests.sampling import lasting_sample

__all__ = ["RetentionSample", "retention_loader"]


class RetentionSample(IterableDataset[list[EditRequest]]):
    """A seeded sample of the edits so far, in batches. A member leaves it only for a later edit.

    It is iterated at each measurement of retention; its length is that at the moment.

    Args:
        requests: The stream.
        session: Returns the run's session.
        size: Largest size of the sample. It is empty in single mode, whose edits are not kept.
    """

    def __init__(self, requests: Sequence[EditRequest], session: Callable[[], EditSession | None], size: int) -> None:
        super().__init__()
        self._requests = {str(request.case_id): request for request in requests}
        self._session, self._size = session, size

    @override
    def __iter__(self) -> Iterator[list[EditRequest]]:
        session = self._session()
        if session is None or not session.sequential:
            return
        valid = {str(request.case_id) for request in session.requests}
        chosen = set(lasting_sample((edit.name for edit in session.edits if edit.name in valid), self._size))
        kept = [request for name, request in self._requests.items() if name in chosen]
        for start in range(0, len(kept), MEASURED_TOGETHER):
            yield kept[start : start + MEASURED_TOGETHER]


def retention_loader(
    requests: Sequence[EditRequest], session: Callable[[], EditSession | None], size: int
) -> DataLoader[list[EditRequest]]:
    """Make a loader of earlier edits for Lightning's validation loop; see :class:`RetentionSample`."""
    return DataLoader(
        RetentionSample(requests, session, size),
        batch_size=None,
        collate_fn=as_it_is,
        # Its own generator: otherwise the loader would draw from the global one.
        generator=torch.Generator(),
    )
