"""What ``rome-pl tune`` leaves: a configuration with its evidence, a page, and the figures."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from rome_pl.errors import OptionError
from rome_pl.files.whole_files import write_json, write_text
from rome_pl.ledger.run_folder import claim_run_folder
from rome_pl.model.architecture import decoder_layers
from rome_pl.model.rewrite_layers import parse_layers
from rome_pl.modules.rome_module import RomeModule
from rome_pl.modules.tuning import Tuning, describe_optimizer
from rome_pl.requests.edit_request import EditRequest
from rome_pl.tracing.setting_choice import setting_table
from rome_pl.utils.console import console
from rome_pl.utils.environment import library_versions

__all__ = ["TuningPlan", "report_tuning", "run_tuning", "tuning_page"]


@dataclass(frozen=True)
class TuningPlan:
    """How much is tried; see :meth:`rome_pl.cli.rome_trainer.RomeTrainer.tune` for what each means.

    Raises:
        OptionError: If a number is out of range.
    """

    minutes: float
    edits: int
    layers: str | None
    overwrite: bool

    def __post_init__(self) -> None:
        if not 0 < self.minutes < math.inf:
            raise OptionError(f"minutes: expected a number above 0, got {self.minutes}")
        if self.edits < 1:
            raise OptionError(f"edits: expected a number from 1 on, got {self.edits}")


def run_tuning(
    module: RomeModule, requests: Sequence[EditRequest], folder: Path, device: torch.device, plan: TuningPlan
) -> bool:
    """Make the trials and report them.

    Args:
        module: Whose model and options are tuned.
        requests: Facts.
        folder: Of the run.
        device: Where the model runs.
        plan: How much is tried.

    Returns:
        Whether it ran to its end; not so after Ctrl-C.

    Raises:
        OptionError: If there are too few facts, or a layer does not exist.
        RunFolderError: If the run folder holds an earlier run.
    """
    # Whatever may be wrong with data and model comes to light before an earlier run is replaced.
    depth = len(decoder_layers(module.load().model)[1])
    layers = None if plan.layers is None else parse_layers(plan.layers, depth)
    tuning = Tuning(module, requests, plan.edits, layers, 60 * plan.minutes)
    claim_run_folder(folder, plan.overwrite)
    try:
        tuning.run(device)
    except KeyboardInterrupt:
        return False
    report_tuning(tuning, folder)
    return True


def report_tuning(tuning: Tuning, folder: Path) -> None:
    """Write ``edit.yaml``, ``tuning.md``, ``results.json`` and ``manifest.json``, and print the page.

    Args:
        tuning: Trials that were made.
        folder: Of the run.
    """
    content = _content(tuning)
    path = folder / "edit.yaml"
    command = f"rome-pl edit --config {shlex.quote(str(path))} --data.path FILE"
    page = tuning_page(content)
    write_json(folder / "results.json", content)
    write_json(
        folder / "manifest.json",
        {
            "versions": library_versions(),
            "seed": tuning.seed,
            "model": tuning.language_model.identity(),
            "facts": [str(fact.case_id) for fact in tuning.facts],
        },
    )
    write_text(folder / "tuning.md", f"# Settings for {content['model']}\n\n{page}")
    header = [f"Edits {content['model']} with settings that rome-pl tune found.", f"Run:   {command}", "Evidence:"]
    comment = "".join(f"# {line}".rstrip() + "\n" for line in [*header, *page.splitlines()])
    options = {"model": content["options"], "trainer": {"default_root_dir": "runs/edit"}}
    write_text(path, comment + yaml.safe_dump(options, sort_keys=False, allow_unicode=True))
    out = console()
    out.print(page, markup=False, soft_wrap=True)
    out.print(f"To edit with them: {command}", markup=False, soft_wrap=True)


def tuning_page(content: Mapping[str, Any]) -> str:
    """What was tried, what came of it and what was chosen, in Markdown."""
    facts, known = content["n_facts"], content["n_known"]
    lines = [f"{facts} facts, each edited on the original model; the model knows {known} of them."]
    if known < facts:
        lines.append(
            f"It was asked for {content['n_asked']} and knows no more. The others were edited too; they tell less."
        )
    chosen = {choice["question"]: choice["chosen"] for choice in content["choices"]}
    lines += ["", setting_table(content["trials"], chosen, content["base"]), ""]
    lines += [f"* {choice['verdict']}." for choice in content["choices"]]
    if content["n_applied"] < facts:
        lines.append(
            f"* With these settings {content['n_applied']} of {facts} edits took. The others were rejected, and count "
            "with what the model says without them."
        )
    if content["left_out"]:
        lines.append(f"* Not tried for lack of time: {'; '.join(content['left_out'])}.")
    lines += [
        "",
        "ES, PS and NS are right after each edit, with 95 % intervals. KL is what an edit does to the next token of "
        "ordinary text. A tie is a difference of less than one standard error over these facts.",
    ]
    return "\n".join(lines) + "\n"


def _content(tuning: Tuning) -> dict[str, Any]:
    return {
        "mode": "tune",
        "model": tuning.language_model.source,
        "n_facts": len(tuning.facts),
        "n_known": tuning.n_known,
        "n_asked": tuning.n_asked,
        "base": tuning.base_scores,
        "trials": [asdict(trial) | {"options": _plain(trial.options)} for trial in tuning.trials],
        "choices": [
            {
                "question": choice.chosen.question,
                "chosen": choice.chosen.name,
                "tied": list(choice.tied),
                "verdict": choice.verdict,
            }
            for choice in tuning.choices
        ],
        "n_applied": tuning.choices[-1].chosen.applied,
        "left_out": tuning.left_out,
        "options": tuning.config(),
        "seconds": tuning.elapsed,
    }


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a configuration writes them."""
    return {name: describe_optimizer(value) if name == "optimizer" else value for name, value in options.items()}
