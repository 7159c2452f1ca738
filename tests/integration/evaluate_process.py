"""Evaluates on a given number of CPU processes; run as a script, so that Lightning can start it once for each of them.

python -m tests.integration.evaluate_process FOLDER DEVICES RECORDS TEXT
"""

import json
import logging
import sys
import warnings
from datetime import timedelta
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from rome_pl.callbacks import EvaluationReport
from rome_pl.data_modules import RequestDataModule
from rome_pl.metrics import EditScores, ProbeScores
from rome_pl.modules.evaluation_module import EvaluationModule
from tests.tiny import tiny_language_model


class Metric(Callback):
    """Every process gives the metric its own records; what it computes is of all of them."""

    def __init__(self, path):
        self.path, self.scores = path, EditScores()

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        for name in outputs:
            self.scores.update(pl_module.scores[name], pl_module.base_scores[name])

    def on_predict_end(self, trainer, pl_module):
        found = self.scores.compute()
        lonely = EditScores()
        if trainer.is_global_zero:  # the other process has no record at all
            lonely.update(ProbeScores((-1.0, -2.0)))
        entry = lonely.compute()["ES"]
        if trainer.is_global_zero:
            content = {"n_own": len(self.scores.records), "scores": found}
            content["lonely"] = {"value": entry["value"], "n": entry["n"]}
            self.path.write_text(json.dumps(content))


def main() -> None:
    """Evaluate the records of a file."""
    folder, devices, records, text = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = EvaluationModule.from_language_model(tiny_language_model(), held_out=text, fluency_tokens=4)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(timeout=timedelta(seconds=60)) if devices > 1 else "auto",
        callbacks=[EvaluationReport(), Metric(folder / "metric.json")],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(module, datamodule=RequestDataModule(records), return_predictions=False)


if __name__ == "__main__":
    main()
