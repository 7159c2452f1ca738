"""zsRE, from a file or the hub."""

from typing import Literal

from rome_pl.data_modules.request_data import RequestDataModule

__all__ = ["ZsreDataModule"]


class ZsreDataModule(RequestDataModule):
    """Streams zsRE in its evaluation form (Mitchell et al. 2022). Records of any other form are refused.

    The unrelated question of a record is a locality probe, its ``New Question`` a portability probe.

    Args:
        path: File, or hub data set.
        limit: Largest number of records, from the first on. ``None`` (default): all.
        split: Split of a hub data set.
        on_error: Whether an invalid record is skipped (and reported) or stops the run.
        batch_size: As in :class:`RequestDataModule`.
    """

    def __init__(
        self,
        path: str,
        limit: int | None = None,
        split: str = "train",
        on_error: Literal["skip", "stop"] = "skip",
        batch_size: int | None = None,
    ) -> None:
        super().__init__(path, limit, "zsre", split, on_error, batch_size)
