"""The unfinished sums of one job on disk: its lock, the sums of earlier runs, and when to save."""

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from rome_pl.files.schemas import Count, Number, checked
from rome_pl.second_moments.moment_sums import MomentSums, PartialSums
from rome_pl.second_moments.second_moment import StatisticsError
from rome_pl.second_moments.split_half import HalfAgreement
from rome_pl.utils.distributed import Peers

__all__ = ["BusyError", "UnfinishedJob"]

SAVING_SHARE = 0.05
"""Largest share of the time spent on saving, unless a number of tokens between saves is given."""

LEAST_PAUSE = 60.0
"""Smallest number of seconds between saves, likewise."""


class CheckNote(TypedDict):
    """As :class:`rome_pl.second_moments.split_half.HalfAgreement`."""

    blocks: Count
    keys: Count
    agreement: dict[str, Number]
    enough: bool


class Notes(TypedDict):
    """Notes in a file of partial sums."""

    absorbed: list[Annotated[str, Field(pattern=r"^process-[0-9a-z.-]+\.safetensors$")]]
    history: list[CheckNote]


NOTES: TypeAdapter[Any] = TypeAdapter(Notes)

log = logging.getLogger(__name__)


class BusyError(StatisticsError):
    """Another run is computing the same."""


class UnfinishedJob:
    """A job's folder, held by one run at a time.

    Every process of a run keeps its own file there. A process that takes over sums of an earlier run notes their files
    in its own, and deletes them only once its own is on disk.

    Args:
        folder: The folder.
        save_every: Tokens between two saves. ``None``: saving takes :data:`SAVING_SHARE` of the time.
        peers: The processes that share the job.

    Raises:
        BusyError: If another run has locked the folder.
        StatisticsError: If a file there is damaged, or the processes do not see the same files.
    """

    def __init__(self, folder: Path, save_every: int | None, peers: Peers) -> None:
        self.folder, self._save_every, self._peers = folder, save_every, peers
        self._lock = FileLock(folder.with_suffix(".lock"))
        self._absorbed: list[str] = []
        self._acquire()
        try:
            self.partials = self._left_behind()
        except BaseException:
            self.release()  # the caller's error would keep this object alive
            raise
        self.begin()

    @property
    def blocks(self) -> set[int]:
        """The blocks that earlier runs have summed."""
        return set().union(*(partial.blocks for partial in self.partials))

    @property
    def history(self) -> list[HalfAgreement]:
        """The agreements at meetings of earlier runs."""
        histories = [[_check_from(entry) for entry in partial.notes["history"]] for partial in self.partials]
        # All processes met at the same boundaries; one may have saved later than another.
        return max(histories, key=len, default=[])

    def take_over(self, sums: MomentSums) -> None:
        """Add this process's share of the sums of earlier runs."""
        for partial in self.partials[self._peers.rank :: self._peers.world_size]:
            sums.merge(partial)
            self._absorbed.append(partial.path.name)
        if self.partials:
            log.info("Resuming with %d blocks that an earlier run has summed", len(self.blocks))

    def begin(self) -> None:
        """Start counting time and tokens."""
        self._saved_at, self._saving, self._unsaved = time.monotonic(), 0.0, 0

    def note(self, tokens: int) -> None:
        """Count tokens that were summed and not saved yet."""
        self._unsaved += tokens

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        if not self._unsaved:
            return False
        if self._save_every is not None:
            return self._unsaved >= self._save_every
        return time.monotonic() - self._saved_at >= max(LEAST_PAUSE, self._saving / SAVING_SHARE)

    def save(self, sums: MomentSums, history: Sequence[HalfAgreement]) -> None:
        """Save this process's sums."""
        started = time.monotonic()
        notes = {"absorbed": self._absorbed, "history": [asdict(check) for check in history]}
        PartialSums.save(self.folder / self._name, sums, notes)
        for name in self._absorbed:
            (self.folder / name).unlink(missing_ok=True)
        self._saved_at, self._unsaved = time.monotonic(), 0
        self._saving = self._saved_at - started

    def remove(self) -> None:
        """Delete the folder: the job is finished."""
        self._peers.wait()
        if self._peers.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def release(self) -> None:
        """Release the job for other runs."""
        self._lock.release()

    def _acquire(self) -> None:
        failed = False
        if self._peers.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                failed = True
        if self._peers.from_first(failed):
            raise BusyError(
                f"another run is computing the same second moments (it holds {self._lock.lock_file}); wait for it to "
                "end, and its result is found in the cache"
            )

    def _left_behind(self) -> list[PartialSums]:
        """Unfinished sums of earlier runs, the same list on all processes."""
        paths = sorted(self.folder.glob("process-*.safetensors"))
        # A new name: the process that takes over the sums in a file deletes that name.
        run = 1 + max((int(path.stem.partition(".")[2] or 0) for path in paths), default=-1)
        self._name = f"process-{self._peers.rank}-of-{self._peers.world_size}{f'.{run}' * (run > 0)}.safetensors"
        partials = [PartialSums(path) for path in paths]
        for partial in partials:
            try:
                checked(NOTES, partial.notes)
            except ValueError as error:
                raise StatisticsError(
                    f"{partial.path}: damaged partial sums ({error}); delete the file and start again"
                ) from error
        # A process that took over sums of others may have been killed before it deleted their files.
        absorbed = {name for partial in partials for name in partial.notes["absorbed"]}
        partials = [partial for partial in partials if partial.path.name not in absorbed]
        views = self._peers.gather([(partial.path.name, sorted(partial.blocks)) for partial in partials])
        if any(view != views[0] for view in views):
            raise StatisticsError(
                f"{self.folder}: processes see different unfinished sums there; the cache folder (ROME_PL_CACHE) has "
                "to be one that all machines share"
            )
        if self._peers.rank == 0:
            for name in absorbed:
                (self.folder / name).unlink(missing_ok=True)
        self._peers.wait()
        return partials


def _check_from(entry: dict[str, Any]) -> HalfAgreement:
    return HalfAgreement(**{**entry, "agreement": {int(layer): value for layer, value in entry["agreement"].items()}})
