"""The second moments that are kept, as a table."""

from pathlib import Path

from rich.table import Table

from rome_pl.second_moments.moment_store import kept_statistics, unfinished_folder
from rome_pl.utils.console import console, escape

__all__ = ["show_statistics"]


def show_statistics(folder: Path) -> None:
    """Print what a folder of second moments holds."""
    table = Table(title=escape(f"Second moments in {folder}"))
    for name in ("model", "layer", "keys", "halves agree", "corpus", "date", "file"):
        table.add_column(name, overflow="fold")
    for path, info in kept_statistics(folder):
        if info is None:
            table.add_row(*("?",) * 6, escape(f"{path.name} (damaged: delete it)"))
            continue
        agreement = f"{info.agreement:.3f}" if info.agreement is not None else ""
        cells = (info.model, str(info.layer), str(info.count), agreement, info.source or info.corpus, info.date)
        table.add_row(*(escape(cell) for cell in (*cells, path.name)))
    out = console()
    out.print(table)
    unfinished = sorted(unfinished_folder(folder).glob("*/process-*.safetensors"))
    if unfinished:
        out.print(f"{len({path.parent for path in unfinished})} unfinished; the same command resumes them")
