"""The verbs that run on the Trainer: what module, data and callbacks each works with."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from typing_extensions import override

from rome_pl.callbacks import (
    EDIT_CALLBACKS,
    EditProgressBar,
    EvaluationProgressBar,
    EvaluationReport,
    MomentProgressBar,
    MomentReport,
    ProgressLines,
    TraceProgressBar,
    TraceReport,
)
from rome_pl.cli.commands import COMMANDS
from rome_pl.cli.help import SWITCHES, completion_script
from rome_pl.cli.parser import SuggestingParser
from rome_pl.cli.rome_trainer import APPLIED
from rome_pl.data_modules import CorpusDataModule, FactDataModule, RequestDataModule
from rome_pl.errors import OptionError
from rome_pl.files.whole_files import local_path, whole_file
from rome_pl.model.devices import check_trainer_devices
from rome_pl.modules.covariance_module import CovarianceModule
from rome_pl.modules.evaluation_module import EvaluationModule
from rome_pl.modules.rome_module import RomeModule
from rome_pl.modules.trace_module import TraceModule
from rome_pl.modules.trainer_checks import check_limits
from rome_pl.utils.console import guarded, write_line
from rome_pl.utils.distributed import check_strategy

__all__ = ["VERBS", "RomeCLI", "RunConfig", "VerbParser"]


class RunConfig(SaveConfigCallback):
    """Saves the resolved configuration as ``config.yaml`` in the run folder."""

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        with whole_file(Path(trainer.default_root_dir) / "config.yaml") as work:
            self.parser.save(self.config, str(work), skip_none=False, overwrite=True, multifile=False)


class VerbParser(SuggestingParser, LightningArgumentParser):
    """Lightning's parser, with suggestions."""


@dataclass(frozen=True)
class _Verb:
    """What a verb of the command line works with.

    Args:
        model: The LightningModule.
        data: The LightningDataModule.
        callbacks: Classes of callbacks with their sections, in the order in which they have to run.
        progress: Progress bar, and what it counts, for those who have lines instead.
        trainer: Defaults of the Trainer that differ from Lightning's.
        defaults: Defaults of other options.
        links: Options that are set once and used twice.
    """

    model: type[LightningModule]
    data: type[LightningDataModule]
    callbacks: tuple[tuple[type[Callback], str], ...]
    progress: tuple[type[RichProgressBar], str]
    trainer: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)
    links: tuple[tuple[str, str], ...] = ()


_TRAINER: dict[str, Any] = {"devices": 1, "enable_checkpointing": False, "enable_model_summary": False}


VERBS = {
    "edit": _Verb(
        RomeModule,
        RequestDataModule,
        tuple((callback, section) for section, callback in EDIT_CALLBACKS.items()),
        (EditProgressBar, "edits"),
        _TRAINER
        | {
            "max_epochs": 1,
            "default_root_dir": "runs/edit",
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "check_val_every_n_epoch": None,
            "val_check_interval": 10,
        },
        {"commit.ledger": True},
        (("model.on_error", "data.on_error"),),
    ),
    "evaluate": _Verb(
        EvaluationModule,
        RequestDataModule,
        ((EvaluationReport, "evaluation_report"),),
        (EvaluationProgressBar, "lists of requests"),
        _TRAINER | {"default_root_dir": "runs/evaluate"},
    ),
    "covariance": _Verb(
        CovarianceModule,
        CorpusDataModule,
        ((MomentReport, "moment_report"),),
        (MomentProgressBar, "blocks of text"),
        _TRAINER | {"default_root_dir": "runs/covariance"},
    ),
    "tune": _Verb(
        RomeModule,
        RequestDataModule,
        tuple((callback, section) for section, callback in EDIT_CALLBACKS.items()),
        (EditProgressBar, "edits"),
        _TRAINER | {"default_root_dir": "runs/tune"},
        links=(("model.on_error", "data.on_error"),),
    ),
    "locate": _Verb(
        TraceModule,
        FactDataModule,
        ((TraceReport, "trace_report"),),
        (TraceProgressBar, "facts"),
        _TRAINER | {"default_root_dir": "runs/locate"},
    ),
}


class RomeCLI(LightningCLI):
    """Parses ``rome-pl VERB``; each verb has its module, data module and callbacks."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {verb: {"model", "datamodule"} for verb in VERBS}

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        self._verb = VERBS[subcommand]
        self._model_class, self._datamodule_class = self._verb.model, self._verb.data
        self.trainer_defaults = self._verb.trainer
        kwargs["epilog"] = "; ".join(f"{name}: {meaning}" for name, meaning in SWITCHES.items())
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for callback, section in self._verb.callbacks:
            parser.add_lightning_class_args(callback, section)
        parser.set_defaults(self._verb.defaults)
        for source, target in self._verb.links:
            parser.link_arguments(source, target)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, or print what completes these arguments: only here the parser is complete and nothing runs yet."""
        if isinstance(args, list) and args[:1] == ["completion"]:
            write_line(completion_script(args[1] if len(args) == 2 else "", parser, COMMANDS))
            raise SystemExit(APPLIED)
        super().parse_arguments(parser, args)

    @override
    def _parse_ckpt_path(self) -> None:
        """The configuration, not a checkpoint, is the source of options."""

    @override
    def before_instantiate_classes(self) -> None:
        """A run that is resumed by its path goes on in its own folder; ``~`` in the name of one is the user's home."""
        options = self.config[self.subcommand]["trainer"]
        if (resume := self._get(self.config, "resume", default=None)) not in (None, "auto"):
            options["default_root_dir"] = resume
        options["default_root_dir"] = str(local_path(options["default_root_dir"]))

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # a constructor refused an option
            raise OptionError(str(error)) from error

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        assert self.subcommand is not None
        trainer = self._get(self.config_init, "trainer")
        check_strategy(trainer["strategy"])
        check_trainer_devices(trainer["accelerator"], trainer["devices"])
        if trainer["enable_progress_bar"] is not False:
            self.trainer_defaults = {"callbacks": [_progress(VERBS[self.subcommand])]}
        if trainer["logger"] in (None, True):
            # Built here and not in a default, because it goes below the run folder.
            from lightning.pytorch.loggers import TensorBoardLogger

            kwargs["logger"] = TensorBoardLogger(trainer["default_root_dir"], name="tensorboard", version="")
        if trainer["accelerator"] == "auto":
            # Lightning's own choice includes Apple's MPS, which lacks the float64 that edits are solved in.
            kwargs["accelerator"] = "cuda" if torch.cuda.is_available() else "cpu"
        made = super().instantiate_trainer(**kwargs)
        if self.subcommand not in ("edit", "tune"):  # which may be a dry run, or runs Trainers of its own
            check_limits(made, "predict")
        return made


def _progress(verb: _Verb) -> Callback:
    """A bar on a terminal, else a line now and then; both on the standard error, where no table is."""
    bar, counted = verb.progress
    if sys.stderr is None or not sys.stderr.isatty():
        return ProgressLines(counted)
    return bar(leave=True, console_kwargs={"stderr": True, "file": guarded(sys.stderr)})
