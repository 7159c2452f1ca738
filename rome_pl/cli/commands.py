"""The verbs of the command line that need no Trainer: on the ledger of a run, and on settings of other projects."""

import logging
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from rome_pl.cli.export_commands import apply, export
from rome_pl.errors import OptionError
from rome_pl.export.checkpoint import save_model as save_checkpoint
from rome_pl.files.whole_files import check_free, local_path
from rome_pl.interop.convert_settings import convert_settings, shown, write_config
from rome_pl.ledger.compare import differences
from rome_pl.ledger.edit_log import LedgerError
from rome_pl.ledger.influence import blame as find_influences
from rome_pl.ledger.replay import read_edits, replay
from rome_pl.ledger.run import base_model, known_names, run_folder
from rome_pl.ledger.undo import pick as keep
from rome_pl.ledger.undo import undo as take_out
from rome_pl.utils.console import console, escape

__all__ = ["COMMANDS", "blame", "convert", "diff", "pick", "show", "undo"]

log = logging.getLogger(__name__)


def show(ledger: str, cases: str | None = None) -> None:
    """Show what a run's ledger holds.

    Args:
        ledger: Folder of the run.
        cases: Records to show in full, by ``case_id``, separated by commas. ``None`` (default): all
            records, a line each.
    """
    run = run_folder(ledger)
    edits = read_edits(run)
    out = console()
    if cases is not None:
        known = {str(edit["case_id"]): edit for edit in edits}
        for name in known_names(cases, known, run):
            out.print(_details(known[name]))
        return
    table = Table(title=escape(f"Edits of {run}"))
    for name in ("#", "record", "prompt", "true → new", "before", "after", "norm", "status"):
        table.add_column(name, overflow="fold", justify="right" if name in ("#", "before", "after", "norm") else "left")
    for edit in edits:
        request, probability = edit["request"], edit["probability"]
        table.add_row(
            str(edit["index"] + 1),
            escape(str(edit["case_id"])),
            escape(request["prompt"]),
            escape(f"{request['target_true'] or '?'} → {request['target_new']}"),
            _number(probability["before"]),
            _number(probability["after"]),
            _number(edit["update_norm"]),
            escape(_verdict(edit)),
        )
    out.print(table)
    counts = Counter(edit["status"].replace("_", " ") for edit in edits)
    held = sum(_held_already(edit) for edit in edits)
    among = {"applied": f" ({held} of them held already)"} if held else {}
    told = ", ".join(f"{count} {status}{among.get(status, '')}" for status, count in counts.items())
    out.print(f"{len(edits)} edits: {told}", markup=False)


def undo(
    ledger: str,
    cases: str,
    save_model: str | None = None,
    statistics: list[str] | None = None,
    allow_pickle: bool = False,
    pretrained: str | None = None,
) -> None:
    """Take edits out of a sequential run: the others are solved for again from what the ledger holds of them.

    Nothing is optimised. The ledger says from then on that they are undone; with all of them undone the weights are
    bit for bit those of the model that the run began with.

    Args:
        ledger: Folder of the run.
        cases: Records to undo, by ``case_id``, separated by commas; ``all`` for all.
        save_model: Folder for a Hugging Face checkpoint of the model with the edits that remain.
        statistics: The run's second moments, where they are neither shipped nor in the cache.
        allow_pickle: Whether weights that do not come as safetensors may be read.
        pretrained: The model that the run began with, where it lies elsewhere than at the time of the run.
    """
    run = run_folder(ledger)
    edits = {str(edit["case_id"]): edit for edit in read_edits(run)}
    applied = [name for name, edit in edits.items() if edit["status"] == "applied"]
    names = applied if cases == "all" else known_names(cases, edits, run)
    if not names:
        raise LedgerError(f"{run}: no edit is in the weight")
    if save_model is not None:
        check_free(local_path(save_model), "save_model")
    language_model = base_model(run, allow_pickle, pretrained)

    def save() -> None:
        if save_model is not None:
            save_checkpoint(language_model, local_path(save_model))

    undone = take_out(language_model, run, names, [local_path(path) for path in statistics or []], save)
    console().print(
        f"{len(undone.names)} edits undone, {len(undone.layers.names)} remain, {len(undone.resolved)} of them solved "
        f"anew; the weights are {undone.layers.change:.3g} of their norm away from the original"
        + (f". Saved to {save_model}" if save_model is not None else ""),
        soft_wrap=True,
        markup=False,
    )
    if undone.holding:
        log.warning(
            "Later edits about the same subjects remain, and may hold what was undone: %s. Undo them too to get the "
            "old answers back",
            ", ".join(undone.holding),
        )


def pick(
    ledger: str,
    cases: str,
    save_model: str,
    statistics: list[str] | None = None,
    allow_pickle: bool = False,
    pretrained: str | None = None,
) -> None:
    """Make a model with some edits of a sequential run and without its others; the run's folder stays as it is.

    Args:
        ledger: Folder of the run.
        cases: Records to keep, by ``case_id``, separated by commas.
        save_model: Folder for a Hugging Face checkpoint.
        statistics: The run's second moments, where they are neither shipped nor in the cache.
        allow_pickle: Whether weights that do not come as safetensors may be read.
        pretrained: The model that the run began with, where it lies elsewhere than at the time of the run.
    """
    run = run_folder(ledger)
    edits = {str(edit["case_id"]): edit for edit in read_edits(run)}
    names = known_names(cases, edits, run)
    check_free(local_path(save_model), "save_model")
    language_model = base_model(run, allow_pickle, pretrained)
    layers = keep(language_model, run, names, [local_path(path) for path in statistics or []])
    save_checkpoint(language_model, local_path(save_model))
    console().print(
        f"{len(layers.names)} edits; the weights are {layers.change:.3g} of their norm away from the original. Saved "
        f"to {save_model}",
        soft_wrap=True,
        markup=False,
    )


def blame(ledger: str, prompt: str, top: int = 10, allow_pickle: bool = False, pretrained: str | None = None) -> None:
    """Show which edits of a sequential run act on a prompt, and at which of its tokens.

    Args:
        ledger: Folder of the run.
        prompt: The text.
        top: Most rows to show.
        allow_pickle: Whether weights that do not come as safetensors may be read.
        pretrained: The model that the run began with, where it lies elsewhere than at the time of the run.
    """
    run = run_folder(ledger)
    edits = {str(edit["case_id"]): edit for edit in read_edits(run)}
    language_model = base_model(run, allow_pickle, pretrained)
    layers = replay(language_model, run)
    table = Table(title=f"What acts on {escape(repr(prompt))}")
    for name in ("token", "record", "prompt", "true → new", "layer", "share", "size"):
        table.add_column(name, overflow="fold", justify="right" if name in ("layer", "share", "size") else "left")
    for one in find_influences(language_model, layers, prompt)[:top]:
        request = edits[one.name]["request"]
        table.add_row(
            escape(repr(one.token)),
            escape(one.name),
            escape(request["prompt"]),
            escape(f"{request['target_true'] or '?'} → {request['target_new']}"),
            str(one.layer),
            f"{one.share:.2f}",
            f"{one.size:.2f}",
        )
    out = console()
    out.print(table)
    out.print("share: of the edit's own change, 1 at its own key; size: against what the unedited layer gives there")


def diff(ledger: str, other: str) -> None:
    """Show in which edits two sequential runs of one model differ, and by how much their weights do.

    Args:
        ledger: Folder of a run.
        other: Folder of another.
    """
    runs = (run_folder(ledger), run_folder(other))
    one, two = ({str(edit["case_id"]): edit for edit in read_edits(run)} for run in runs)
    differing = differences(*runs)
    table = Table(title=escape(f"{runs[0]} against {runs[1]}"))
    for name in ("record", "prompt", "here", "there"):
        table.add_column(name, overflow="fold")
    for name in differing.names:
        known = one.get(name) or two[name]
        cells = (_outcome(edits.get(name)) for edits in (one, two))
        table.add_row(escape(name), escape(known["request"]["prompt"]), *map(escape, cells))
    out = console()
    if differing.names:
        out.print(table)
    out.print(
        f"{len(differing.names)} of {len(one.keys() | two.keys())} records differ; the weights differ by "
        f"{differing.norm:.4g} (Frobenius norm; the edits here change them by {differing.norms[0]:.4g}, those there by "
        f"{differing.norms[1]:.4g})",
        soft_wrap=True,
    )


def convert(file: str, output: str = "config.yaml", force: bool = False, overwrite: bool = False) -> None:
    """Turn settings of EasyEdit, kmeng01/rome or their relatives into a configuration, and show what differs.

    Args:
        file: A YAML or JSON file from their hparams folder.
        output: The configuration to write, for rome-pl edit --config.
        force: Whether unknown keys are left out.
        overwrite: Whether an older file of that name may go.
    """
    written = local_path(output)
    if written.exists() and not overwrite:
        raise OptionError(f"output: {output} exists; choose another name, or give --overwrite")
    converted = convert_settings(file, force)
    write_config(converted, written)
    table = Table(title=escape(f"{file} ({converted.method})"))
    for name in ("key", "value", "here", "remark"):
        table.add_column(name, overflow="fold")
    for row in converted.rows:
        options = [f"{name}: {shown(value)}" for name, value in row.fate.options.items()]
        differs = row.fate.kind == "differs"
        value = "(not in the file)" if row.value is None else row.value
        here = "\n".join(options) or ("" if differs else row.fate.kind)
        remark = f"differs: {row.fate.remark}" if differs else row.fate.remark
        table.add_row(*map(escape, (row.key, value, here, remark)), style="yellow" if differs else None)
    out = console()
    out.print(table)
    differing = sum(row.fate.kind == "differs" for row in converted.rows)
    out.print(
        f"Wrote {output}; {differing} of {len(converted.rows)} settings differ. Run: rome-pl edit --config "
        f"{shlex.quote(str(written))} --data.path FACTS",
        soft_wrap=True,
        markup=False,
    )


COMMANDS: dict[str, Callable[..., Any]] = {
    "show": show,
    "undo": undo,
    "pick": pick,
    "blame": blame,
    "diff": diff,
    "export": export,
    "apply": apply,
    "convert": convert,
}
"""The verbs, by name."""


def _outcome(edit: Mapping[str, Any] | None) -> str:
    return "" if edit is None else f"{edit['request']['target_new']} ({edit['status']})"


def _held_already(edit: Mapping[str, Any]) -> bool:
    """Whether an edit was applied whose target the model gave before."""
    return edit["status"] == "applied" and bool((edit.get("greedy") or {}).get("before"))


def _verdict(edit: Mapping[str, Any]) -> str:
    held = " (held already)" if _held_already(edit) else ""
    return f"{edit['status']}{held}" + (f": {edit['reason']}" if edit["reason"] else "")


def _details(edit: Mapping[str, Any]) -> Table:
    request, probability = edit["request"], edit["probability"]
    table = Table(title=f"Record {edit['case_id']}", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "status": _verdict(edit),
        "place in the stream": str(edit["index"] + 1),
        "prompt": request["prompt"],
        "subject": request["subject"],
        "true → new": f"{request['target_true'] or '?'} → {request['target_new']}",
        "relation": request["relation"],
        "probability": f"{_number(probability['before'])} before, {_number(probability['after'])} after",
        "evaluations": str(edit["num_steps"]),
        "norm of the update": _number(edit["update_norm"]),
        "realised": _number(edit["realised"]),
        "solved with": ", ".join(str(index + 1) for index in edit.get("joint") or []),
        "notes": "; ".join(edit["notes"]),
        "layer": ", ".join(map(str, edit.get("layers", []))),
        "shard": edit.get("shard"),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(str(value)))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
