"""Going on with a run that was interrupted: what its ledger holds is taken over and not computed again."""

import json
import math
from collections.abc import Mapping, Sequence
from difflib import unified_diff
from pathlib import Path
from typing import Any

from rome_pl.edit import Edit, EditStatus
from rome_pl.evaluation import scores_from_json
from rome_pl.language_model import LanguageModel
from rome_pl.ledger import LedgerError, plain
from rome_pl.replay import groups_of, load_write, read_manifest
from rome_pl.session import EditSession
from rome_pl.value_search import Step

__all__ = ["check_model", "check_settings", "is_finished", "take_over"]

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
        LedgerError: If the ledger goes on with other edits than the stream does.
    """
    ledger = session.ledger
    if ledger is None or not ledger.resuming:
        return False
    lines = ledger.ahead(len(edits))
    by_name = {str(line["case_id"]): line for line in lines}
    names = {edit.name for edit in edits}
    if by_name.keys() != names:
        if any(line["status"] == EditStatus.UNDONE for line in lines):
            raise LedgerError(f"{ledger.folder}: edits were undone after this run; it cannot be gone on with")
        raise LedgerError(
            f"{ledger.folder}: the run goes on with record {lines[0]['case_id']} ({lines[0]['status']}), now the "
            f"stream goes on with {edits[0].name}; resume with the same records, order and settings"
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
    asked = json.loads(json.dumps(plain(edit.request.content())))
    if line["request"] != asked:
        field = next(name for name in asked if line["request"].get(name) != asked[name])
        raise LedgerError(
            f"{folder}: record {edit.name} had another {field} ({line['request'].get(field)!r}, now {asked[field]!r}); "
            "resume with the same records"
        )
    edit.recorded = line
    edit.status, edit.reason, edit.failed = EditStatus(line["status"]), line["reason"], line["failed"]
    edit.notes, edit.layers = list(line["notes"]), tuple(line["layers"])
    edit.before, edit.after = line["probability"]["before"], line["probability"]["after"]
    greedy = line.get("greedy") or {}  # ledgers of earlier versions lack it
    edit.greedy_before, edit.greedy_after = greedy.get("before"), greedy.get("after")
    edit.steps = [Step(*(math.nan if value is None else value for value in step)) for step in line["steps"]]
    if line["measured"] is not None:
        edit.scores["immediate"] = scores_from_json(line["measured"])


def is_finished(run: Path) -> bool:
    """Whether a run has come to its end."""
    try:
        content = json.loads((run / "results.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return content.get("interrupted") is False


def check_model(run: Path, language_model: LanguageModel) -> None:
    """Refuse to go on with a run of another model, as far as its manifest is there to tell.

    Raises:
        LedgerError: If it began with another one.
    """
    if (run / "manifest.json").is_file():
        theirs, ours = read_manifest(run)["model"], language_model.fingerprint
        if theirs["fingerprint"] != ours:
            raise LedgerError(
                f"{run}: began with another model ({theirs['source']}, {theirs['fingerprint'][:12]}) than the one "
                f"loaded ({language_model.source}, {ours[:12]}); load that one"
            )
        if theirs.get("frame", []) != list(language_model.encoder.frame.texts):
            raise LedgerError(
                f"{run}: the chat template writes something else around prompts than it did when the run began (other "
                "options of chat, or a date in it: fix that by chat.switches)"
            )


def check_settings(run: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under other settings.

    Args:
        run: Its folder.
        then: The configuration of the run.
        now: The configuration now.

    Raises:
        LedgerError: With the difference.
    """
    before, after = _decisive(then), _decisive(now)
    if before != after:
        changes = [f"{line[0]} {line[1:]}" for line in unified_diff(before, after, lineterm="", n=0) if line[0] in "+-"]
        raise LedgerError(
            f"{run}: the settings have changed since (- then, + now):\n  "
            + "\n  ".join(changes[2:])  # without the names of what is compared
            + "\nResume with those of that run, or add --force to go on with the new ones"
        )


def _decisive(config: Mapping[str, Any]) -> list[str]:
    """What shapes edits in a configuration, an option a line."""
    lines: list[str] = []
    for section in DECISIVE:
        options = dict(config.get(section) or {})
        names = set(TRAINER if section == "trainer" else options) - set(FREE.get(section, ()))
        lines += [f"{section}.{name}: {json.dumps(options.get(name), sort_keys=True)}" for name in sorted(names)]
    return lines
