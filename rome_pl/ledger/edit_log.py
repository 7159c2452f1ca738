"""The ledger: the append-only record of a run's edits, on disk.

Each applied edit leaves one safetensors shard (keys, value, factors of the update), written to a temporary name,
synced and renamed; then one line of JSON is appended and synced, and that line is the commit. A record is complete or
absent. Lines that belong together carry their number, so that all or none of them count. A later line about the same
edit overrides an earlier one. Each line ends in a checksum of itself and of the lines before it, and holds the checksum
of its shard. So reading finds any line or shard that was changed, lost, doubled or moved.

A run that resumes with a ledger repeats its decisions, from the recorded edits. It writes nothing until it has passed
the last line, and its decisions have to match the lines.
"""

import hashlib
import itertools
import json
import logging
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout
from safetensors.torch import save_file

from rome_pl.files.checksums import chained
from rome_pl.files.whole_files import check_own, make_folder, open_own, plain, sync_folder, whole_file
from rome_pl.ledger.ledger_lines import END, LedgerError, Line, read_lines, read_with_chain
from rome_pl.write.edited_layers import EditWrite

__all__ = ["Ledger", "LedgerError", "Line", "lock_of", "read_lines"]

log = logging.getLogger(__name__)


def lock_of(folder: Path) -> FileLock:
    """Return the lock of a run on its ledger's folder. The operating system releases it if the run is killed."""
    return FileLock(folder / ".lock")


class Ledger:
    """Appends edits to a folder.

    Args:
        folder: Folder of ``edits.jsonl`` and ``shards/``. It is created if missing.
        resume: Whether to resume with an existing ledger. A half-written end is cut off.
        wait: Seconds to wait for another process to release the folder.
        lock: The folder's lock, if the caller holds it already.

    Raises:
        LedgerError: If another run writes there, or a line is damaged.
    """

    def __init__(self, folder: Path, resume: bool = False, wait: float = 0, lock: BaseFileLock | None = None) -> None:
        self.folder = folder
        for place in (folder, folder / "shards", folder / ".lock", folder / "edits.jsonl"):
            check_own(place)
        make_folder(folder / "shards")
        self._lock = lock or lock_of(folder)
        try:
            self._lock.acquire(timeout=wait)
        except Timeout as error:
            raise LedgerError(f"{folder}: another run writes to this ledger; wait for it to end") from error
        self._path = folder / "edits.jsonl"
        self._ahead: deque[Line] = deque()
        self._shards: set[str] = set()
        self._written, self._check, self._appended = 0, "", False
        if resume and self._path.exists():
            try:
                lines, self._check = read_with_chain(self._path)
                self._written = len(lines)
                self._cut(lines[-1].end if lines else 0)
            except BaseException:
                self.close()
                raise
            self._ahead.extend(lines)
            self._shards = {line.record["shard"] for line in lines if "shard" in line.record}

    def close(self) -> None:
        """Record the ledger's end, and release the folder."""
        try:
            if self._appended:
                with whole_file(self.folder / END) as work:
                    work.write_text(json.dumps({"lines": self._written, "check": self._check}), encoding="utf-8")
                self._appended = False
        except OSError as error:  # every line is on disk; only a later loss would not be noticed
            log.warning("%s", error)
        finally:
            self._lock.release()

    def names_ahead(self) -> list[str]:
        """The ``case_id`` of edits of an earlier run that this one has not reached yet."""
        return list(dict.fromkeys(str(line.record["case_id"]) for line in self._ahead))

    @property
    def resuming(self) -> bool:
        """Whether lines of an earlier run are still ahead."""
        return bool(self._ahead)

    def ahead(self, count: int) -> list[dict[str, Any]]:
        """Return the next records of an earlier run, at most ``count``."""
        return [line.record for line in list(self._ahead)[:count]]

    def all_ahead(self) -> list[dict[str, Any]]:
        """Return all records of an earlier run that this one has not reached yet."""
        return [line.record for line in self._ahead]

    def skip(self) -> None:
        """Accept all lines that are there, and append to them from now on."""
        self._ahead.clear()

    def append(self, record: Mapping[str, Any], written: EditWrite | None = None) -> None:
        """Append one record; see :meth:`append_batch`."""
        self.append_batch([(record, written)])

    def append_batch(self, records: Sequence[tuple[Mapping[str, Any], EditWrite | None]], joint: bool = False) -> None:
        """Append records, each with the tensors of its write if there was one. Return once they are on disk.

        Args:
            records: Plain values, and keys, value and factors; ``index`` names the shard.
            joint: Whether their writes were solved together. Each line then names the others under ``joint``.

        Raises:
            LedgerError: If an earlier run decided differently here.
        """
        if self._ahead:
            self._confirm(record for record, _ in records)
            return
        indices = [record["index"] for record, written in records if written is not None]
        lines = []
        for record, written in records:
            line = dict(record)
            if written is not None:
                line["shard"] = f"{line['index']:06d}.safetensors"
                line["shard_sha256"] = self._write_shard(self.folder / "shards" / line["shard"], written)
                if joint and len(indices) > 1:
                    line["joint"] = indices
            lines.append(line)
        self._write(lines)

    def amend(
        self,
        verdicts: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
        writes: Sequence[tuple[EditWrite, Sequence[Mapping[str, Any]]]],
    ) -> None:
        """Append changes of recorded edits: new verdicts, and writes that were solved again.

        Args:
            verdicts: Records of edits, each with its changed fields, including ``status``.
            writes: Writes, each with the records of its edits.

        Raises:
            LedgerError: If an earlier run decided differently here.
        """
        lines: list[dict[str, Any]] = [
            {"index": record["index"], "case_id": record["case_id"], **changes} for record, changes in verdicts
        ]
        applied = [{name: record[name] for name in ("index", "case_id", "status")} for _, of in writes for record in of]
        if self._ahead:
            self._confirm([*lines, *applied])
            return
        for written, records in writes:
            indices = [record["index"] for record in records]
            for record in records:
                part = written.part(str(record["case_id"]))
                shard = self._unused_shard(record["index"])
                changes = {
                    "shard": shard,
                    "shard_sha256": self._write_shard(self.folder / "shards" / shard, part),
                    "update_norm": part.norm,
                    "realised": part.realised[0],
                    "notes": record["notes"],
                }
                lines.append({**applied.pop(0), **changes, "joint": indices if len(indices) > 1 else None})
        self._write(lines)

    def _unused_shard(self, index: int) -> str:
        # A shard that no line names was left by a killed run and can be overwritten.
        names = (f"{index:06d}.{version}.safetensors" for version in itertools.count(1))
        return next(name for name in names if name not in self._shards)

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        text, check = "", self._check
        for place, line in enumerate(lines, start=1):
            together = {"together": [place, len(lines)]} if len(lines) > 1 else {}
            body = json.dumps(plain(line | together), ensure_ascii=False, allow_nan=False)
            whole, check = chained(body, check)
            text += whole + "\n"
        began = not self._path.exists()
        with open_own(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        if began:
            sync_folder(self.folder)
        self._written, self._check, self._appended = self._written + len(lines), check, True
        self._shards |= {line["shard"] for line in lines if "shard" in line}

    def _confirm(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Skip the next lines of the earlier run, which have to match."""
        for record in records:
            said = self._ahead.popleft().record if self._ahead else None
            now, then = (f"{one['case_id']} {one['status']}" if one else "nothing" for one in (record, said))
            if now != then:
                raise LedgerError(
                    f"{self._path}: the run it is resumed from decided otherwise ({then}, now {now}); resume with the "
                    "settings and the versions of that run"
                )

    def _cut(self, size: int) -> None:
        with open_own(self._path, os.O_RDWR) as file:
            file.truncate(size)
            os.fsync(file.fileno())

    @staticmethod
    def _write_shard(path: Path, written: EditWrite) -> str:
        """Save the tensors of a write. Return the SHA-256 of the file."""
        tensors = {
            f"layers.{place}.{name}": tensor
            for place, layer in enumerate(written.layers.values())
            for name, tensor in (
                ("key_shape", layer.assertion.shape),
                ("key_at", layer.assertion.at),
                ("value", layer.assertion.value),
                ("left", layer.update.left),
                ("right", layer.update.right),
                ("ridge", torch.tensor(layer.assertion.ridge, dtype=torch.float64)),
            )
        }
        with whole_file(path) as work:
            save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, work)
            return hashlib.sha256(work.read_bytes()).hexdigest()
