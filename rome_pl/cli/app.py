"""The command line: Lightning's CLI with one verb per task, and plain verbs on the ledger of a run."""

import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from types import TracebackType

from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers.utils.logging import disable_progress_bar

from rome_pl.cli.arguments import named, normalised
from rome_pl.cli.commands import COMMANDS
from rome_pl.cli.help import completion_script, overview, split_switches, unexpected, unknown
from rome_pl.cli.parser import SuggestingParser
from rome_pl.cli.rome_trainer import APPLIED, BAD_CONFIGURATION, INTERRUPTED, UNEXPECTED, RomeTrainer
from rome_pl.cli.verbs import VERBS, RomeCLI, RunConfig, VerbParser
from rome_pl.data_modules import RequestDataModule
from rome_pl.errors import RomeError
from rome_pl.modules.rome_module import RomeModule
from rome_pl.utils.console import VisibleFormatter, guarded, lenient_output, write_line

__all__ = ["main", "run"]


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
        save_config_callback=RunConfig,
        save_config_kwargs={"save_to_log_dir": False},
        seed_everything_default=False,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=normalised(given) + ["--trainer.enable_progress_bar=false"] * (quiet and verb != "completion"),
        parser_class=VerbParser,
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
