"""The ledger: the append-only record of a run's edits, on disk.

Each applied edit leaves one safetensors shard (keys, value, factors of the update), written to a temporary name,
synced and renamed; then one line of JSON is appended and synced, and that line is the commit. A record is complete or
absent. A later line about the same edit changes its status.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from rome_pl.files import whole_file
from rome_pl.weights import Written

__all__ = ["Ledger", "plain"]


def plain(value: Any) -> Any:
    """The value as JSON can hold it: numbers that are not finite become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


class Ledger:
    """Appends edits to a folder.

    Args:
        folder: Holds ``edits.jsonl`` and ``shards/``; created if missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        self._lines = folder / "edits.jsonl"

    def append(self, record: Mapping[str, Any], written: Written | None = None) -> None:
        """Append one record; see :meth:`append_batch`."""
        self.append_batch([(record, written)])

    def append_batch(self, records: Sequence[tuple[Mapping[str, Any], Written | None]], joint: bool = False) -> None:
        """Append records, each with the tensors of its write if there was one; returns once they are on disk.

        Args:
            records: Plain values, and keys, value and factors; ``index`` names the shard.
            joint: Whether their writes were solved together. Each line then names the others under ``joint``, and a
                line whose companions are missing is no complete record.
        """
        indices = [record["index"] for record, written in records if written is not None]
        text = ""
        for record, written in records:
            line = dict(record)
            if written is not None:
                line["shard"] = f"{line['index']:06d}.safetensors"
                self._write_shard(self.folder / "shards" / line["shard"], written)
                if joint and len(indices) > 1:
                    line["joint"] = indices
            text += json.dumps(plain(line), ensure_ascii=False, allow_nan=False) + "\n"
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _write_shard(path: Path, written: Written) -> None:
        tensors = {
            "key_shape": written.assertion.shape,
            "key_at": written.assertion.at,
            "value": written.assertion.value,
            "left": written.update.left,
            "right": written.update.right,
        }
        with whole_file(path) as work:
            save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, work)
