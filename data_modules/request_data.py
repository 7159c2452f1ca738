"""A stream of edit requests from a file, a hub data set, the package's samples, or a list."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from rome_pl.records import SUFFIXES, DataError, InvalidRecord, parse_records, read_records
from rome_pl.requests import EditRequest

__all__ = ["RequestDataModule", "request_loader"]

SAMPLES = "sample"
"""Path that stands for the records shipped with the package."""


class RequestDataModule(LightningDataModule):
    """Streams edit requests, one per batch, in file order.

    Args:
        path: JSON, JSONL or YAML file; name of a hub data set; or ``sample`` for the records shipped with the package.
        limit: Most records to use, from the first on; nothing uses all.
        form: Form of the records: ``counterfact``, ``flat`` or ``short``; nothing recognises it from the first record.
        split: Split of a hub data set.
        on_error: Whether a record that is no valid request is skipped (and reported) or stops the run.
    """

    def __init__(
        self,
        path: str = SAMPLES,
        limit: int | None = None,
        form: Literal["counterfact", "flat", "short"] | None = None,
        split: str = "train",
        on_error: Literal["skip", "stop"] = "skip",
    ) -> None:
        super().__init__()
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected a number from 1 on, got {limit}")
        self.path, self.limit, self.form, self.split, self.on_error = path, limit, form, split, on_error
        self.requests: list[EditRequest] = []
        self.invalid: list[InvalidRecord] = []

    @override
    def setup(self, stage: str = "fit") -> None:
        """Read and validate the records; a second call does nothing.

        Raises:
            DataError: If the source cannot be read, its form is unknown, no record is valid, or a record is invalid
                while ``on_error`` is ``stop``.
        """
        if self.requests:
            return
        records = self._records()[: self.limit]
        self.requests, self.invalid = parse_records(records, self.path, self.form)
        if self.invalid and (self.on_error == "stop" or not self.requests):
            raise DataError("; ".join(record.message for record in self.invalid[:5]))

    @override
    def train_dataloader(self) -> DataLoader[EditRequest]:
        """The stream of edits."""
        return request_loader(self.requests)

    def _records(self) -> Sequence[Any]:
        if self.path == SAMPLES:
            return read_records(Path(str(files("rome_pl") / "assets" / "sample_records.json")))
        path = Path(self.path).expanduser()
        if path.suffix.lower() in SUFFIXES or path.exists():
            return read_records(path)
        return _from_hub(self.path, self.split, self.limit)


def request_loader(requests: list[EditRequest]) -> DataLoader[EditRequest]:
    """A loader that gives :class:`RomeModule` one request at a time, in order."""
    # A generator of its own: a loader would otherwise draw from the global one. Any sequence serves as a data set,
    # which torch's annotation does not know.
    return DataLoader(requests, batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]


def _from_hub(name: str, split: str, limit: int | None) -> list[Any]:
    import datasets

    try:
        stream = datasets.load_dataset(name, split=split, streaming=True)
        return list(stream.take(limit) if limit is not None else stream)
    except Exception as error:  # the library raises many kinds, from many layers
        raise DataError(
            f"'{name}': no such file, and no hub data set of that name could be loaded with split '{split}' "
            f"(offline?): {error}"
        ) from error
