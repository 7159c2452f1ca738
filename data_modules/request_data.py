"""A stream of edit requests from a file, a hub data set, the package's samples, or a list."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from rome_pl.data_modules.edit_batches import EditBatchSampler, RequestList, as_it_is
from rome_pl.data_modules.retention_sample import retention_loader
from rome_pl.editing.session import EditSession
from rome_pl.files.readable_files import is_there
from rome_pl.files.whole_files import local_path
from rome_pl.metrics.probes import MEASURED_TOGETHER
from rome_pl.requests.conflicts import SUBJECT_S_KEY
from rome_pl.requests.edit_request import EditRequest
from rome_pl.requests.record_forms import SUFFIXES, DataError, InvalidRecord, parse_records, read_records
from rome_pl.requests.sampling import sample_requests
from rome_pl.second_moments.corpus import is_kind_of_file

__all__ = ["RequestDataModule", "request_loader"]

BATCH = 8
"""Default number of independent edits optimised at once."""

SHIPPED = {"sample": "sample_records.json", "questions": "sample_questions.yaml"}
"""Special paths of records shipped with the package: statements, and questions for chat models."""


class RequestDataModule(LightningDataModule):
    """Streams edit requests in batches, in file order. Independent edits of similar length may share batches.

    Args:
        path: JSON, JSONL or YAML file; name of a hub data set; or ``sample`` or ``questions`` for the records shipped
            with the package.
        limit: Largest number of records, from the first on. ``None`` (default): all.
        form: Form of the records: ``counterfact``, ``zsre``, ``knowedit``, ``flat`` or ``short``; ``None`` (default):
            recognised from the first record.
        split: Split of a hub data set.
        on_error: Whether an invalid record is skipped (and reported) or stops the run.
        retention_sample: Size of the seeded sample of earlier edits that are measured again every
            ``val_check_interval`` batches of a sequential stream. 0: none.
        sample: Size of a seeded sample of the valid records, in file order. ``None`` (default): all.
        sample_by_relation: Whether each relation keeps its share in the sample.
        sample_seed: Seed of the sample.
        batch_size: Edits optimised at once. ``None`` (default): 8 independent edits, nearby requests of similar length
            sharing a batch; 1 in sequential mode. There a larger batch is solved jointly and ends before a second fact
            about one of its subjects.
    """

    def __init__(
        self,
        path: str = "sample",
        limit: int | None = None,
        form: Literal["counterfact", "zsre", "knowedit", "flat", "short"] | None = None,
        split: str = "train",
        on_error: Literal["skip", "stop"] = "skip",
        batch_size: int | None = None,
        retention_sample: int = 0,
        sample: int | None = None,
        sample_by_relation: bool = False,
        sample_seed: int = 0,
    ) -> None:
        super().__init__()
        if sample is not None and sample < 1:
            raise ValueError(f"sample: expected a number from 1 on, got {sample}")
        self.sample, self.sample_by_relation, self.sample_seed = sample, sample_by_relation, sample_seed
        if retention_sample < 0:
            raise ValueError(f"retention_sample: expected a number from 0 on, got {retention_sample}")
        self.retention_sample = retention_sample
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: expected a number from 1 on, got {batch_size}")
        self.batch_size = batch_size
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
        if self.sample is not None:
            self.requests = sample_requests(self.requests, self.sample, self.sample_seed, self.sample_by_relation)
        if self.invalid and (self.on_error == "stop" or not self.requests):
            raise DataError("; ".join(record.message for record in self.invalid[:5]))

    @override
    def train_dataloader(self) -> DataLoader[EditRequest]:
        """Return the stream of edits, or this rank's share if several devices make independent edits."""
        trainer = self.trainer
        session = getattr(trainer.lightning_module, "session", None) if trainer is not None else None
        independent = isinstance(session, EditSession) and not session.sequential
        return request_loader(
            self.requests,
            batch_size=self.batch_size or (BATCH if independent else 1),
            by_length=independent,
            rank=trainer.global_rank if trainer is not None else 0,
            world_size=trainer.world_size if trainer is not None else 1,
            apart=isinstance(session, EditSession) and session.sequential and session.fact_token in SUBJECT_S_KEY,
        )

    @override
    def predict_dataloader(self) -> DataLoader[EditRequest]:
        """Return this rank's share of the requests, in batches, for an :class:`rome_pl.EvaluationModule`.

        Raises:
            TypeError: If the Trainer's module is not an :class:`rome_pl.EvaluationModule`.
        """
        trainer = self.trainer
        module: Any = trainer.lightning_module if trainer is not None else None
        if trainer is None or not hasattr(module, "begin"):
            raise TypeError("requests are evaluated by a Trainer that runs predict() on an EvaluationModule")
        requests = module.begin(self.requests)
        share = max(1, -(-len(requests) // trainer.world_size))
        return request_loader(
            requests, min(MEASURED_TOGETHER, share), rank=trainer.global_rank, world_size=trainer.world_size
        )

    @override
    def val_dataloader(self) -> DataLoader[list[EditRequest]]:
        """Return a sample of the edits so far, drawn at each validation. Empty unless edits accumulate."""
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        return retention_loader(self.requests, lambda: getattr(module, "session", None), self.retention_sample)

    def _records(self) -> Sequence[Any]:
        if self.path in SHIPPED:
            return read_records(Path(str(files("rome_pl") / "assets" / SHIPPED[self.path])))
        path = local_path(self.path)
        if path.suffix.lower() in SUFFIXES or is_there(path):
            return read_records(path)
        if is_kind_of_file(self.path):
            raise DataError(
                f"'{self.path}' is a kind of file, not a data set: the datasets library would read whatever lies in "
                "the working folder. Give the file itself, such as data.path: facts.json"
            )
        return _from_hub(self.path, self.split, self.limit)


def request_loader(
    requests: Sequence[EditRequest],
    batch_size: int = 1,
    by_length: bool = False,
    rank: int = 0,
    world_size: int = 1,
    apart: bool = False,
) -> DataLoader[EditRequest]:
    """Make a loader of batches of requests for :class:`RomeModule`; see :class:`EditBatchSampler` for the arguments."""
    return DataLoader(
        # Torch accepts any sequence as a data set, but its annotation does not.
        RequestList(requests),  # type: ignore[arg-type]
        batch_size=None,
        sampler=EditBatchSampler(requests, batch_size, by_length, rank, world_size, apart),
        collate_fn=as_it_is,  # requests are text
        # Its own generator: otherwise the loader would draw from the global one.
        generator=torch.Generator(),
    )


def _from_hub(name: str, split: str, limit: int | None) -> list[Any]:
    import datasets

    try:
        stream = datasets.load_dataset(name, split=split, streaming=True)
        return list(stream.take(limit) if limit is not None else stream)
    except Exception as error:  # the library raises many kinds of exception
        raise DataError(
            f"'{name}': no such file, and no hub data set of that name could be loaded with split '{split}' "
            f"(offline?): {error}"
        ) from error
