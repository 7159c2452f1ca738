"""What every callback promises: on a module that it cannot work with it says so, and names the module."""

import inspect

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch.utils.data import DataLoader

import rome_pl.callbacks

CALLBACKS = {
    name: kind
    for name, kind in vars(rome_pl.callbacks).items()
    if inspect.isclass(kind) and issubclass(kind, Callback) and kind.__module__.startswith("rome_pl.callbacks.")
}
PREDICTING = {"EvaluationReport", "MomentReport", "TraceReport"}
"""Those that report what ``predict`` has found; all others watch a fit."""


class Foreign(LightningModule):
    """Trains, validates and predicts, and knows nothing of language models."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def predict_step(self, batch, batch_idx):
        return self.layer(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(callback, folder):
    trainer = Trainer(
        max_epochs=1, callbacks=[callback], default_root_dir=folder, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
        enable_progress_bar=isinstance(callback, ProgressBar),
    )  # fmt: skip
    rows = DataLoader(torch.ones(2, 2))
    if type(callback).__name__ in PREDICTING:
        trainer.predict(Foreign(), rows, return_predictions=False)
    else:
        trainer.fit(Foreign(), rows, rows)


BARS = {"EvaluationProgressBar", "MomentProgressBar", "TraceProgressBar"}
"""Those that only name what Lightning's bar counts, whatever it is."""


@pytest.mark.parametrize("name", sorted(CALLBACKS.keys() - BARS))
def test_a_foreign_module_is_named(name, tmp_path):
    with pytest.raises(TypeError, match=r"\bForeign\b"):
        run(CALLBACKS[name](), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(BARS))
def test_a_bar_that_only_names_things_works_with_any_module(name, tmp_path):
    run(CALLBACKS[name](), tmp_path)


def test_every_callback_is_looked_at():
    assert len(CALLBACKS) >= 16
    assert CALLBACKS.keys() >= {"Verification", "MomentReport", "RunReport", "EditCommit", "StateCheck", *PREDICTING}
