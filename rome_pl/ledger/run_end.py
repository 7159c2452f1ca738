"""The end of a run: whether it is complete, and its outcome."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rome_pl.files.schemas import checked, parsed, refuse
from rome_pl.files.whole_files import read_regular, write_json
from rome_pl.ledger.edit_log import LedgerError
from rome_pl.ledger.run_schemas import RESULTS

__all__ = ["all_applied", "is_finished", "mark_finished"]


def is_finished(run: Path, missing: Sequence[str] = ()) -> bool:
    """Whether a run has ended and its products are complete.

    Args:
        run: Its folder.
        missing: Products that are asked for and were found missing by the caller.

    Raises:
        LedgerError: If its ``results.json`` is damaged.
    """
    content = _results(run)
    if content.get("interrupted") is not False or content.get("finished", True) is not True or missing:
        return False
    return all((run / name).is_file() for name in content.get("products", []))


def mark_finished(run: Path) -> None:
    """Mark the results of an ended run as complete. Do nothing if it has not ended.

    Raises:
        OSError: If they cannot be written.
    """
    content = _results(run)
    if content.get("interrupted") is False:
        write_json(run / "results.json", content | {"finished": True})


def all_applied(run: Path) -> bool:
    """Whether every record of a finished run was applied."""
    content = _results(run)
    return content.get("n_applied") == content.get("n_requested")


def _results(run: Path) -> dict[str, Any]:
    path = run / "results.json"
    if not path.exists():
        return {}
    try:
        content: dict[str, Any] = parsed(read_regular(path))
        checked(RESULTS, content)
    except (OSError, ValueError) as error:
        refuse(LedgerError, str(path), error, "remove it, and the resumed run writes it again")
    return content
