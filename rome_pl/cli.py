"""The command line: Lightning's CLI with one verb per task, and plain verbs on the ledger of a run."""

import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from transformers.utils.logging import disable_progress_bar
from typing_extensions import override

from rome_pl.arguments import named, normalised
from rome_pl.callbacks import (
    EditCommit,
    EditProgressBar,
    EvaluationProgressBar,
    EvaluationReport,
    MomentProgressBar,
    MomentReport,
    ProbeEvaluation,
    ProgressLines,
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
from rome_pl.console import VisibleFormatter, guarded, lenient_output, write_line
from rome_pl.covariance_module import CovarianceModule
from rome_pl.data_modules import CorpusDataModule, FactDataModule, RequestDataModule
from rome_pl.devices import check_trainer_devices
from rome_pl.distributed import check_strategy
from rome_pl.edit_module import RomeModule
from rome_pl.errors import OptionError, RomeError
from rome_pl.evaluation_module import EvaluationModule
from rome_pl.files import local_path, whole_file
from rome_pl.preparation import check_limits
from rome_pl.shell import SWITCHES, completion_script, overview, split_switches, unexpected, unknown
from rome_pl.suggestions import SuggestingParser
from rome_pl.trace_module import TraceModule
from rome_pl.trainer import APPLIED, BAD_CONFIGURATION, INTERRUPTED, UNEXPECTED, RomeTrainer

__all__ = ["RomeCLI", "main", "run"]


class _RunConfig(SaveConfigCallback):
    """Saves the resolved configuration as ``config.yaml`` in the run folder."""

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        with whole_file(Path(trainer.default_root_dir) / "config.yaml") as work:
            self.parser.save(self.config, str(work), skip_none=False, overwrite=True, multifile=False)


class _Parser(SuggestingParser, LightningArgumentParser):
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
        if self.subcommand != "edit":  # which may be a dry run
            check_limits(made, "predict")
        return made


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments after the program's name; ``None`` takes those of the process.

    Returns:
        The exit code: 0 all edits applied, 3 some were not, 2 bad configuration, 1 an error that nobody foresaw, 130
        interrupted.
    """
    given, switches = split_switches(sys.argv[1:] if args is None else args)
    quiet = "--quiet" in switches
    _quieten()
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        disable_progress_bar()  # of downloads and of loading weights
    handler = logging.StreamHandler(guarded(sys.stderr)) if sys.stderr is not None else logging.NullHandler()
    handler.setFormatter(VisibleFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[handler])
    with lenient_output():
        try:
            return _run(given, quiet)
        except (Exception, KeyboardInterrupt) as error:
            if "--debug" in switches:
                raise
            code, message = _explained(error)
        write_line(f"rome-pl: {message}", error=True)
        return code


def _explained(error: BaseException) -> tuple[int, str]:
    """Exit code and message for an exception."""
    if isinstance(error, RomeError | OSError | MisconfigurationException):
        return BAD_CONFIGURATION, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    return UNEXPECTED, unexpected(error)


def _run(given: list[str], quiet: bool) -> int:
    """Do what a verb says; the exit code."""
    verbs = {verb: getattr(RomeTrainer, verb) for verb in VERBS} | COMMANDS | {"completion": completion_script}
    if not given:
        write_line(overview(verbs), error=True)
        return BAD_CONFIGURATION
    verb = given[0]
    if verb in ("-h", "--help", "--version") or (verb == "completion" and {"-h", "--help"} & set(given)):
        write_line(f"rome-pl {version('rome_pl')}" if verb == "--version" else overview(verbs))
        return APPLIED
    if verb not in verbs and not verb.startswith("-"):
        write_line(f"rome-pl: {unknown(verb, verbs)}\n\n{overview(verbs)}", error=True)
        return BAD_CONFIGURATION
    if verb in COMMANDS:
        auto_cli(
            COMMANDS[verb],
            args=normalised(named(COMMANDS[verb], given[1:])),
            prog=f"rome-pl {verb}",
            as_positional=False,
            parser_class=SuggestingParser,
        )
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
        args=normalised(given) + ["--trainer.enable_progress_bar=false"] * (quiet and verb != "completion"),
        parser_class=_Parser,
        parser_kwargs={"prog": "rome-pl"},
    )
    assert isinstance(cli.trainer, RomeTrainer)
    return cli.trainer.exit_code


def run() -> None:
    """Entry point of the ``rome-pl`` command."""
    sys.excepthook = _show_exception
    sys.exit(main())


def _show_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Write a traceback (``--debug``), whose messages name texts of users."""
    write_line("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), error=True)


def _progress(verb: _Verb) -> Callback:
    """A bar on a terminal, else a line now and then; both on the standard error, where no table is."""
    bar, counted = verb.progress
    if sys.stderr is None or not sys.stderr.isatty():
        return ProgressLines(counted)
    return bar(leave=True, console_kwargs={"stderr": True, "file": guarded(sys.stderr)})


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
