"""KnowEdit, from a file or the hub."""

from typing import Literal

from rome_pl.data_modules.request_data import RequestDataModule

__all__ = ["KnowEditDataModule"]


class KnowEditDataModule(RequestDataModule):
    """Streams KnowEdit (Zhang et al. 2024). Records of any other form are refused.

    Of several accepted answers the first is scored.

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
        super().__init__(path, limit, "knowedit", split, on_error, batch_size)
