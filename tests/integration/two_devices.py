"""Edits on a given number of CPU processes; run as a script, so that Lightning can start it once for each of them.

python -m tests.integration.two_devices FOLDER DEVICES RECORDS [sequential]
"""

import logging
import sys
import warnings
from datetime import timedelta
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from rome_pl.callbacks import EditCommit, ProbeEvaluation, RankOneWriter, RepresentationCheck, RunReport, Verification
from rome_pl.data_modules import RequestDataModule
from rome_pl.modules.rome_module import RomeModule
from tests.integration.helpers import FAST
from tests.tiny import tiny_language_model


def main() -> None:
    """Edit the records of a file."""
    folder, devices, records = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = RomeModule.from_language_model(
        tiny_language_model(), **FAST, stop_loss=6.07, sequential_edit="sequential" in sys.argv
    )
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(timeout=timedelta(seconds=60)) if devices > 1 else "auto",
        callbacks=[
            RepresentationCheck(),
            RankOneWriter(),
            Verification(0.0),
            ProbeEvaluation(measure_perplexity=False),
            EditCommit(ledger=True),
            RunReport(),
        ],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=RequestDataModule(records, batch_size=2))


if __name__ == "__main__":
    main()
