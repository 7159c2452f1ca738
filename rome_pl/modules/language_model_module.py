"""What the four LightningModules have in common: a language model, loaded on first use."""

from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from typing_extensions import override

from rome_pl.model.language_model import LanguageModel
from rome_pl.model.loading import load_language_model
from rome_pl.utils.distributed import one_after_the_other

__all__ = ["LanguageModelModule"]


class LanguageModelModule(LightningModule):
    """Base of the LightningModules: it holds the language model and loads it on first use.

    A subclass saves ``pretrained``, ``dtype`` and ``allow_pickle`` as hyperparameters. It extends :meth:`_adopt` with
    what it needs of a model, and :meth:`load` if it needs a second one.
    """

    language_model: LanguageModel | None = None

    @classmethod
    def from_language_model(cls, language_model: LanguageModel, **options: Any) -> Self:
        """A module for a model that is loaded already; ``options`` are those of the class."""
        module = cls(pretrained=language_model.source, **options)
        module._adopt(language_model)
        return module

    @override
    def configure_model(self) -> None:
        """Load the model, on first use: the first process before the others, because it may have to convert it.

        Raises:
            SourceError: If the model cannot be loaded.
        """
        with one_after_the_other(self.trainer):
            self.load()

    def load(self) -> LanguageModel:
        """Load the model, on first use, also without a Trainer.

        Raises:
            SourceError: If the model cannot be loaded.
        """
        if self.language_model is None:
            self._adopt(self._loaded(self.hparams["pretrained"]))
        return self._language_model

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch of tensors; requests are text and stay as they are."""
        return super().transfer_batch_to_device(batch, device, dataloader_idx) if hasattr(batch, "to") else batch

    def _loaded(self, source: str) -> LanguageModel:
        return load_language_model(source, self.hparams["dtype"], self.hparams["allow_pickle"])

    def _adopt(self, language_model: LanguageModel) -> None:
        """Keep a loaded model."""
        self.language_model = language_model
        self.model = language_model.model  # registered, so that the Trainer moves it

    @property
    def _language_model(self) -> LanguageModel:
        assert self.language_model is not None
        return self.language_model
