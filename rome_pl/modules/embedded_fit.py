"""Editing inside something larger: a Trainer that shows nothing and leaves everything global as it was."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from rome_pl.modules.rome_module import RomeModule
from rome_pl.requests.edit_request import EditRequest
from rome_pl.utils.restored_state import differentiable, undisturbed

__all__ = ["fit_inside"]


def fit_inside(
    module: RomeModule, requests: DataLoader[EditRequest], callbacks: Sequence[Callback], device: torch.device
) -> None:
    """Edit a stream of requests.

    Args:
        module: The module, with its model.
        requests: The stream.
        callbacks: What is done around each edit.
        device: Where the model runs, and where it is afterwards.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
    """
    with undisturbed(), differentiable(), _quiet(), _interruptible():
        trainer = Trainer(
            max_epochs=1,
            accelerator=device.type,
            devices=[device.index or 0] if device.type == "cuda" else 1,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(module, requests)
        finally:
            module.model.to(device)  # the Trainer leaves the model on the CPU


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C stays what it is: Lightning would end the process and leave the signal ignored."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """No lines about hardware for every single edit."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
