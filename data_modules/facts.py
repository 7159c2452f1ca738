"""Facts to trace, from a file, a hub data set, or the package's samples."""

from collections.abc import Sequence
from typing import Any, Literal

from torch.utils.data import DataLoader
from typing_extensions import override

from rome_pl.data_modules.request_data import RequestDataModule, request_loader
from rome_pl.requests.edit_request import EditRequest
from rome_pl.requests.known_facts import facts_to_requests

__all__ = ["FactDataModule"]


class FactDataModule(RequestDataModule):
    """Supplies a :class:`rome_pl.TraceModule` with facts: prompts with a subject and the true answer.

    Besides the forms of :class:`RequestDataModule` it reads ``known_1000.json`` (Meng et al. 2022), and short records
    without ``target_new``. For trial edits these get another fact's answer as new target, of the same relation if
    possible, drawn by ``sample_seed``.

    Args:
        path: JSON, JSONL or YAML file; name of a hub data set; or ``sample`` for the records shipped with the package.
        limit: Largest number of records, from the first on. ``None`` (default): all.
        form: As in :class:`RequestDataModule`.
        split: Split of a hub data set.
        on_error: Whether an invalid record is skipped (and reported) or stops the run.
        sample: Size of a seeded sample of the valid records, in file order. ``None`` (default): all.
        sample_by_relation: Whether each relation keeps its share in the sample.
        sample_seed: Seed of the sample and of new targets.
    """

    def __init__(
        self,
        path: str = "sample",
        limit: int | None = None,
        form: Literal["counterfact", "zsre", "knowedit", "flat", "short"] | None = None,
        split: str = "train",
        on_error: Literal["skip", "stop"] = "skip",
        sample: int | None = None,
        sample_by_relation: bool = False,
        sample_seed: int = 0,
    ) -> None:
        super().__init__(
            path,
            limit,
            form,
            split,
            on_error,
            sample=sample,
            sample_by_relation=sample_by_relation,
            sample_seed=sample_seed,
        )

    @override
    def predict_dataloader(self) -> DataLoader[EditRequest]:
        """Return the facts that the model knows, one at a time.

        Raises:
            TypeError: If the Trainer's module is not a :class:`rome_pl.TraceModule`.
        """
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        if module is None or not hasattr(module, "begin"):
            raise TypeError("facts are traced by a Trainer that runs predict() on a TraceModule")
        return request_loader(module.begin(self.requests))

    @override
    def _records(self) -> Sequence[Any]:
        return facts_to_requests(super()._records(), self.sample_seed)
