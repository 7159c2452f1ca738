"""The command line: Lightning's CLI with one verb per task, and plain verbs on the ledger of a run."""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from typing_extensions import override

from rome_pl.callbacks import (
    EditCommit,
    EditProgressBar,
    EvaluationProgressBar,
    EvaluationReport,
    MomentProgressBar,
    MomentReport,
    ProbeEvaluation,
    RankOneWriter,
    RepresentationCheck,
    RetentionCheck,
    RunReport,
    StateCheck,
    TensorBoardReport,
    TraceProgressBar,
    TraceReport,
    Verification,
)
from rome_pl.commands import COMMANDS
from rome_pl.covariance_module import CovarianceModule
from rome_pl.data_modules import CorpusDataModule, FactDataModule, RequestDataModule
from rome_pl.edit_module import RomeModule
from rome_pl.errors import OptionError, RomeError
from rome_pl.evaluation_module import EvaluationModule
from rome_pl.trace_module import TraceModule
from rome_pl.trainer import APPLIED, BAD_CONFIGURATION, RomeTrainer

__all__ = ["RomeCLI", "main", "run"]


class _RunConfig(SaveConfigCallback):
    """Saves the resolved configuration as ``config.yaml`` in the run folder."""

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, str(folder / "config.yaml"), skip_none=False, overwrite=True, multifile=False)


@dataclass(frozen=True)
class _Verb:
    """What a verb of the command line works with.

    Args:
        model: The LightningModule.
        data: The LightningDataModule.
        callbacks: Classes of callbacks with their sections, in the order in which they have to run.
        progress: Makes the progress bar.
        trainer: Defaults of the Trainer that differ from Lightning's.
        defaults: Defaults of other options.
        links: Options that are set once and used twice.
    """

    model: type[LightningModule]
    data: type[LightningDataModule]
    callbacks: tuple[tuple[type[Callback], str], ...]
    progress: Callable[[], Callback]
    trainer: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)
    links: tuple[tuple[str, str], ...] = ()


_TRAINER: dict[str, Any] = {"devices": 1, "enable_checkpointing": False, "enable_model_summary": False}

VERBS = {
    "edit": _Verb(
        RomeModule,
        RequestDataModule,
        (
            (RepresentationCheck, "representation_check"),
            (RankOneWriter, "rank_one_writer"),
            (Verification, "verification"),
            (ProbeEvaluation, "probe_evaluation"),
            (EditCommit, "commit"),
            (StateCheck, "state_check"),
            (RetentionCheck, "retention_check"),
            (TensorBoardReport, "tensorboard_report"),
            (RunReport, "run_report"),
        ),
        lambda: EditProgressBar(leave=True),
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
        lambda: EvaluationProgressBar(leave=True),
        _TRAINER | {"default_root_dir": "runs/evaluate"},
    ),
    "covariance": _Verb(
        CovarianceModule,
        CorpusDataModule,
        ((MomentReport, "moment_report"),),
        lambda: MomentProgressBar(leave=True),
        _TRAINER | {"default_root_dir": "runs/covariance"},
    ),
    "locate": _Verb(
        TraceModule,
        FactDataModule,
        ((TraceReport, "trace_report"),),
        lambda: TraceProgressBar(leave=True),
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
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for callback, section in self._verb.callbacks:
            parser.add_lightning_class_args(callback, section)
        parser.set_defaults(self._verb.defaults)
        for source, target in self._verb.links:
            parser.link_arguments(source, target)

    @override
    def _parse_ckpt_path(self) -> None:
        """The configuration, not a checkpoint, is the source of options."""

    @override
    def before_instantiate_classes(self) -> None:
        """A run that is resumed by its path goes on in its own folder."""
        if (resume := self._get(self.config, "resume", default=None)) not in (None, "auto"):
            self.config[self.subcommand]["trainer"]["default_root_dir"] = resume

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # a constructor refused an option
            raise OptionError(str(error)) from error

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        assert self.subcommand is not None
        self.trainer_defaults = {"callbacks": [VERBS[self.subcommand].progress()]}
        trainer = self._get(self.config_init, "trainer")
        if trainer["logger"] in (None, True):
            # Built here and not in a default, because it goes below the run folder.
            from lightning.pytorch.loggers import TensorBoardLogger

            kwargs["logger"] = TensorBoardLogger(trainer["default_root_dir"], name="tensorboard", version="")
        if trainer["accelerator"] == "auto":
            # Lightning's own choice includes Apple's MPS, which lacks the float64 that edits are solved in.
            kwargs["accelerator"] = "cuda" if torch.cuda.is_available() else "cpu"
        return super().instantiate_trainer(**kwargs)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments after the program's name; ``None`` takes those of the process.

    Returns:
        The exit code: 0 all edits applied, 3 some were not, 2 bad configuration, 130 interrupted.
    """
    _quieten()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    given = list(sys.argv[1:] if args is None else args)
    try:
        if given and given[0] in COMMANDS:
            auto_cli(COMMANDS[given[0]], args=given[1:], prog=f"rome-pl {given[0]}", as_positional=False)
            return APPLIED
        cli = RomeCLI(
            model_class=RomeModule,
            datamodule_class=RequestDataModule,
            trainer_class=RomeTrainer,
            save_config_callback=_RunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=_normalised(given),
            parser_kwargs={"epilog": f"Without a Trainer, on the folder of a run: {', '.join(COMMANDS)}."},
        )
    except (RomeError, OSError) as error:
        print(f"rome-pl: {error}", file=sys.stderr)
        return BAD_CONFIGURATION
    assert isinstance(cli.trainer, RomeTrainer)
    return cli.trainer.exit_code


def run() -> None:
    """Entry point of the ``rome-pl`` command."""
    sys.exit(main())


def _quieten() -> None:
    """Silence what libraries say about things that are meant to be so; one reason each."""
    for noisy in ("httpx", "httpcore", "huggingface_hub", "datasets", "absl", "torch", "fsspec", "lightning.pytorch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for message in (
        "LightningCLI's args parameter",  # main() passes the arguments on after replacing config names
        "Found .* module.s. in eval mode",  # the language model is frozen
        "You have overridden `.*` in `LightningModule`",  # the module encodes requests: it holds the tokenizer
        "`isinstance.treespec, LeafSpec.` is deprecated",  # Lightning's own use of torch
        "The '.*_dataloader' does not have many workers",  # requests are text in memory; tokenising text takes little
    ):
        warnings.filterwarnings("ignore", message)


_SWITCHES = ("--dry_run", "--overwrite", "--list", "--force")


def _normalised(args: Sequence[str]) -> list[str]:
    """Arguments as the parser wants them: switches with a value, shipped configs by their path."""
    normalised: list[str] = []
    previous = ""
    for argument, following in zip(args, [*args[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        switch = flag.replace("-", "_").replace("__", "--", 1)
        if switch in _SWITCHES and not equals and following not in ("true", "false"):
            argument = f"{switch}=true"
        elif flag in ("--config", "-c") and equals:
            argument = f"{flag}={_config_path(value)}"
        elif previous in ("--config", "-c"):
            argument = _config_path(argument)
        normalised.append(argument)
        previous = argument
    return normalised


def _config_path(name: str) -> str:
    """Path of a shipped config, unless a file of that name is here."""
    shipped = Path(str(files("rome_pl") / "configs" / f"{name.removesuffix('.yaml').removeprefix('configs/')}.yaml"))
    return str(shipped) if not Path(name).is_file() and shipped.is_file() else name
