"""Text to compute second moments from."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from rome_pl.second_moments.corpus import GENERATED, Corpus
from rome_pl.second_moments.text_blocks import Block

__all__ = ["CorpusDataModule"]


class CorpusDataModule(LightningDataModule):
    """Supplies :class:`rome_pl.CovarianceModule` with text, packed into blocks and distributed to the processes.

    Args:
        path: Text file, JSONL, Parquet, Arrow or CSV file, a pattern of such files, the name of a data set on the hub,
            or ``generated`` for text that the model generates. In plain text a document ends at a blank line; without
            blank lines each line is a document.
        column: Column that holds the text, where there are columns.
        split: Split of a hub data set.
        subset: Configuration of a hub data set, such as ``20231101.en`` of ``wikimedia/wikipedia``.
        num_workers: Processes that read and tokenise. Each reads the whole text, so more than one or two do not help.
        seed: Seed of a generated corpus.
    """

    def __init__(
        self,
        path: str = GENERATED,
        column: str = "text",
        split: str = "train",
        subset: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_workers < 0:
            raise ValueError(f"num_workers: expected a number from 0 on, got {num_workers}")
        self.path, self.num_workers, self.seed = path, num_workers, seed
        self.corpus = None if path == GENERATED else Corpus(path, column, split, subset)

    @override
    def predict_dataloader(self) -> DataLoader[Block]:
        """Return this process's share of the blocks.

        Raises:
            TypeError: If the Trainer's module is not a :class:`rome_pl.CovarianceModule`.
        """
        module = self._module
        if not hasattr(module, "begin"):
            raise TypeError("CorpusDataModule belongs to a Trainer that runs predict() on a CovarianceModule")
        return DataLoader(
            module.begin(self.corpus, self.seed),
            batch_size=None,
            num_workers=self.num_workers,
            # Its own generator: otherwise the loader would draw from the global one.
            generator=torch.Generator(),
        )

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Release the job for other runs: after an exception Lightning does not call the module's ``teardown``."""
        if self._module is not None:
            self._module.teardown("predict")

    @property
    def _module(self) -> Any:
        return self.trainer.lightning_module if self.trainer is not None else None
