"""Changing what a run has on disk, checksums included, to reach what is looked at after them."""

import hashlib
import json

from rome_pl.files.checksums import SEAL, chained, sealed


def rewrite_ledger(folder, change):
    """Give a run's ledger other lines.

    Args:
        folder: The run's folder.
        change: Gives the new records from the old ones, which have no checksums.
    """
    path = folder / "ledger" / "edits.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    for record in records:
        del record["check"]
    text, check = "", ""
    for record in change(records):
        line, check = chained(json.dumps(record, ensure_ascii=False), check)
        text += line + "\n"
    path.write_text(text, encoding="utf-8")
    (folder / "ledger" / "end.json").unlink(missing_ok=True)


def rewrite_json(path, change):
    """Change sealed JSON in place; ``change`` gets it without its checksum and returns what to write."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content.pop(SEAL)
    path.write_text(json.dumps(sealed(change(content))), encoding="utf-8")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
