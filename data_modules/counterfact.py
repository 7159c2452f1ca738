"""CounterFact, from the hub or a file."""

from typing import Literal

from rome_pl.data_modules.request_data import RequestDataModule

__all__ = ["CounterFactDataModule"]


class CounterFactDataModule(RequestDataModule):
    """Streams CounterFact as published (Meng et al. 2022). Records of any other form are refused.

    Args:
        path: Hub data set, or a file in the published form.
        limit: Largest number of records, from the first on. ``None`` (default): all 21,919.
        split: Split of the hub data set.
        on_error: Whether an invalid record is skipped (and reported) or stops the run.
        batch_size: As in :class:`RequestDataModule`.
    """

    def __init__(
        self,
        path: str = "azhx/counterfact",
        limit: int | None = None,
        split: str = "train",
        on_error: Literal["skip", "stop"] = "skip",
        batch_size: int | None = None,
    ) -> None:
        super().__init__(path, limit, "counterfact", split, on_error, batch_size)
