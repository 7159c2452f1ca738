"""Going on with a run that was interrupted: what its ledger holds is taken over and not computed again."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import unified_diff
from pathlib import Path
from typing import Any

from rome_pl.editing.edit import Edit
from rome_pl.editing.session import EditSession
from rome_pl.encoding.text_encoder import ENCODING_VERSION
from rome_pl.files.whole_files import plain
from rome_pl.ledger.edit_log import LedgerError
from rome_pl.ledger.replay import groups_of, load_write, read_manifest
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics.score_forms import scores_from_json
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.model_check import refuse_another_model
from rome_pl.requests.edit_request import EditRequest
from rome_pl.search.value_search import Evaluation

__all__ = ["check_model", "check_records", "check_settings", "take_over"]

DECISIVE = ("model", "data", "representation_check", "rank_one_writer", "verification", "state_check", "trainer")
"""Sections of the configuration that shape what edits become; the others only measure and report."""

FREE = {"data": ("path", "form", "split", "retention_sample")}
"""Options in them that may change: requests are compared one by one, wherever they come from."""

TRAINER = ("accelerator", "limit_train_batches", "precision")
"""The Trainer's options that do."""


def take_over(session: EditSession, edits: Sequence[Edit]) -> bool:
    """Give the edits of a batch what an earlier run has made of them, and put their writes into the weight.

    Args:
        session: The run; its ledger may hold lines of an earlier one.
        edits: The batch that comes next.

    Returns:
        Whether the ledger held the batch.

    Raises:
        LedgerError: If the ledger's next edits are not those of the stream.
    """
    ledger = session.ledger
    if ledger is None or not ledger.resuming:
        return False
    lines = ledger.ahead(len(edits))
    by_name = {str(line["case_id"]): line for line in lines}
    names = {edit.name for edit in edits}
    if by_name.keys() != names:
        if any(line["status"] == EditStatus.UNDONE for line in lines):
            raise LedgerError(f"{ledger.folder}: edits were undone after this run; it cannot be resumed")
        raise LedgerError(
            f"{ledger.folder}: the next record in the ledger is {lines[0]['case_id']} ({lines[0]['status']}), but "
            f"the next of the stream is {edits[0].name}; resume with the same records, order and settings"
        )
    for edit in edits:
        _fill(edit, by_name[edit.name], ledger.folder)
    for group in groups_of(lines):
        written = load_write(ledger.folder.parent, group)
        for edit in edits:
            if edit.name in written.names:
                edit.written = written.part(edit.name)
        if session.sequential:
            session.layers.restore(written)
    return True


def _fill(edit: Edit, line: Mapping[str, Any], folder: Path) -> None:
    _check_same(edit.request, line, folder)
    edit.resumed = True
    edit.status, edit.reason, edit.failed = EditStatus(line["status"]), line["reason"], line["failed"]
    edit.notes, edit.layers = list(line["notes"]), tuple(line["layers"])
    edit.specificity, edit.value_norm = line["specificity"], line["value_norm"]
    edit.update_norm, edit.realised = line["update_norm"], line["realised"]
    edit.before, edit.after = line["probability"]["before"], line["probability"]["after"]
    greedy = line.get("greedy") or {}  # ledgers of earlier versions lack it
    edit.greedy_before, edit.greedy_after = greedy.get("before"), greedy.get("after")
    edit.steps = [Evaluation(*(math.nan if value is None else value for value in step)) for step in line["steps"]]
    if line["measured"] is not None:
        edit.scores["immediate"] = scores_from_json(line["measured"])


def _check_same(request: EditRequest, line: Mapping[str, Any], folder: Path) -> None:
    """Refuse a record that asks for something else than the ledger says it did."""
    asked = json.loads(json.dumps(plain(request.content())))
    if line["request"] != asked:
        field = next(name for name in {**asked, **line["request"]} if line["request"].get(name) != asked.get(name))
        then, now = line["request"].get(field), asked.get(field)
        raise LedgerError(
            f"{folder}: record {request.case_id} had another {field} ({then!r}, now {now!r}); resume with the same "
            "records"
        )


def check_model(run: Path, language_model: LanguageModel) -> None:
    """Refuse to resume a run of another model, as far as its manifest is there to tell.

    Raises:
        LedgerError: If it began with another one, in another precision, or under other rules of encoding.
    """
    if not (run / "manifest.json").exists():
        return
    theirs = read_manifest(run)["model"]
    refuse_another_model(theirs, language_model, LedgerError, f"{run}: a run", "load the one that it began with")
    dtype = str(next(language_model.model.parameters()).dtype)
    if theirs["dtype"] != dtype:
        raise LedgerError(f"{run}: began in {theirs['dtype']}, the model is loaded in {dtype}; load it in that one")
    if theirs.get("encoding", 1) != ENCODING_VERSION:
        raise LedgerError(
            f"{run}: was begun by a version that joins prompts and targets by other rules (version "
            f"{theirs.get('encoding', 1)}, now {ENCODING_VERSION}); make the run again, or resume it with that version "
            "(rome-pl export saves what it has edited so far)"
        )
    if theirs.get("frame", []) != list(language_model.encoder.frame.texts):
        raise LedgerError(
            f"{run}: the chat template writes something else around prompts than it did when the run began (other "
            "options of chat, or a date in it: fix that by chat.switches)"
        )


def check_records(run: Path, recorded: Iterable[Mapping[str, Any]], requests: Iterable[EditRequest]) -> bool:
    """Refuse to resume a run with fewer or other records than it has edited: its model would not be what they ask for.

    Args:
        run: Its folder.
        recorded: What the lines of its ledger say.
        requests: The stream now.

    Returns:
        Whether the stream has no record that the ledger lacks.

    Raises:
        LedgerError: With what the stream lacks, or has otherwise.
    """
    first = {str(line["case_id"]): line for line in recorded if "request" in line}
    asked = {str(request.case_id): request for request in requests}
    for name, line in first.items():
        if name in asked:
            _check_same(asked[name], line, run / "ledger")
    if missing := [name for name in first if name not in asked]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise LedgerError(
            f"{run}: its ledger has {len(missing)} records that the stream lacks now ({', '.join(missing[:5])}{more}); "
            "resume with all records of that run, more may follow. Nothing was changed"
        )
    return len(first) == len(asked)


def check_settings(run: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume a run under other settings.

    Args:
        run: Its folder.
        then: The configuration of the run.
        now: The configuration now.

    Raises:
        LedgerError: With the difference.
    """
    # The manifest tells which model it was, wherever that lies now; see check_model.
    where = ("model.pretrained: ",) if (run / "manifest.json").is_file() else ()
    before, after = ([line for line in _decisive(config) if not line.startswith(where)] for config in (then, now))
    if before != after:
        changes = [f"{line[0]} {line[1:]}" for line in unified_diff(before, after, lineterm="", n=0) if line[0] in "+-"]
        raise LedgerError(
            f"{run}: the settings have changed since (- then, + now):\n  "
            + "\n  ".join(changes[2:])  # without the names of what is compared
            + "\nResume with those of that run, or add --force to use the new ones"
        )


def _decisive(config: Mapping[str, Any]) -> list[str]:
    """What shapes edits in a configuration, an option a line."""
    lines: list[str] = []
    for section in DECISIVE:
        options = dict(config.get(section) or {})
        names = set(TRAINER if section == "trainer" else options) - set(FREE.get(section, ()))
        lines += [f"{section}.{name}: {json.dumps(options.get(name), sort_keys=True)}" for name in sorted(names)]
    return lines
