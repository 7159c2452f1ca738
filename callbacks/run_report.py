"""Writes what a run leaves behind, and prints it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.editing.edit import EditBatch
from rome_pl.editing.session import EditSession, session_of
from rome_pl.files.checksums import sealed
from rome_pl.files.whole_files import plain, write_json, write_lines, write_text
from rome_pl.interop.case_files import CASE_FORMS, FormatName
from rome_pl.reports.console_tables import edit_table, score_table
from rome_pl.reports.continuations import Sample, compared, note_continuations
from rome_pl.reports.html_report import html_report
from rome_pl.reports.run_figures import draw_figures, write_figures
from rome_pl.reports.run_results import detailed_records, note_change, run_manifest, run_results, settings_of
from rome_pl.reports.score_tables import csv_table, outcome_counts, score_markdown
from rome_pl.utils.console import console

__all__ = ["RunReport"]

log = logging.getLogger(__name__)


class RunReport(Callback):
    """Writes the files of a run under the Trainer's ``default_root_dir`` and prints the tables; it needs no logger.

    ``manifest.json`` before the first edit; at the end ``records.jsonl``, ``table.md`` and ``table.csv``, ``figures/``
    and ``report.html``, one page that opens without a server; and last ``results.json``, which says whether the run is
    finished. After an exception or Ctrl-C they hold what was done. What cannot be printed costs nothing.

    Args:
        largest_table: Most edits that are printed one by one; the files hold all.
        figures: Whether figures and the page are made; they take a second or two at the end.
        formats: Other projects' shapes in which the records are written too, ``easyedit`` to ``easyedit.json`` and
            ``kmeng01`` to ``kmeng01.json``.
        generations: Most edits of a sequential run whose prompts the model continues on the page, before the run and
            after it.

    Raises:
        ValueError: If a format is unknown.
    """

    def __init__(
        self,
        largest_table: int = 20,
        figures: bool = True,
        formats: list[FormatName] | None = None,
        generations: int = 5,
    ) -> None:
        if unknown := set(formats or ()) - set(CASE_FORMS):
            raise ValueError(f"formats: expected some of {sorted(CASE_FORMS)}, got {sorted(unknown)}")
        self.largest_table, self.figures, self.formats = largest_table, figures, tuple(formats or ())
        self.generations = generations if figures else 0
        self.followed = False
        """Whether something is still to be made after the report: then the run is not finished with it, and whoever
        makes that calls :meth:`tell`."""
        self.whole = False
        """Whether the last report has everything that it is meant to have."""
        self._written = False
        self._untold: tuple[EditSession, dict[str, Any], Path] | None = None

    def missing(self, folder: Path) -> list[str]:
        """What the report would write and a folder does not hold, of an earlier run that came to its end."""
        wanted = ["manifest.json", "records.jsonl", "table.md", "table.csv", *(f"{name}.json" for name in self.formats)]
        wanted += ["report.html"] if self.figures else []
        return [name for name in wanted if not (folder / name).is_file()]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._written = False
        if not trainer.is_global_zero:
            return
        session = session_of(pl_module)
        run = Path(trainer.default_root_dir)
        write_json(run / "manifest.json", sealed(plain(run_manifest(session, int(pl_module.hparams["seed"]), run))))
        note_continuations(session, self.generations, "base")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        session = session_of(pl_module)
        if session.sequential:
            note_change(session)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = session_of(pl_module)
        reached = len(session.edits) == len(session.requests) + session.num_refused
        self._write(trainer, pl_module, session, interrupted=not reached)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        session = getattr(pl_module, "session", None)
        if isinstance(session, EditSession) and session.requests and not self._written:
            self._write(trainer, pl_module, session, interrupted=True)

    def _write(self, trainer: Trainer, module: LightningModule, session: EditSession, interrupted: bool) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        invalid = getattr(trainer.datamodule, "invalid", [])  # type: ignore[attr-defined]  # set by Trainer.fit
        content = run_results(session, invalid, interrupted)
        self._untold = session, content, folder
        records = detailed_records(session, content["records"])
        write_lines(folder / "records.jsonl", records)
        write_text(folder / "table.md", score_markdown(content))
        write_text(folder / "table.csv", csv_table(content))
        products = ["records.jsonl", "table.md", "table.csv"]
        for name in self.formats:
            write_json(folder / f"{name}.json", CASE_FORMS[name](session))
            products.append(f"{name}.json")
        self.whole = True
        if self.figures:
            try:
                if not interrupted:
                    note_continuations(session, self.generations, "final")
                samples = compared(session, self.generations)
                products += _write_page(folder, module, session, content, records, samples)
            except Exception:  # the run is done and its numbers are written: a picture must not cost the saved model
                self.whole = False
                log.warning("The figures or report.html could not be made", exc_info=True)
        content |= {"finished": self.whole and not interrupted and not self.followed, "products": products}
        write_json(folder / "results.json", content)
        self._written = True
        if not self.followed:
            self.tell()

    def tell(self) -> None:
        """Print the tables of what was written last; a second call prints nothing."""
        if self._untold is None:
            return
        (session, content, folder), self._untold = self._untold, None
        out = console()
        shown = sorted(session.edits, key=lambda edit: edit.index)[: self.largest_table]
        out.print(edit_table(shown))
        if len(shown) < len(session.edits):
            out.print(f"({len(session.edits) - len(shown)} more edits in {folder / 'records.jsonl'})", markup=False)
        out.print(score_table(content))
        where = folder / "results.json"
        out.print(f"{content['n_requested']} requested: {outcome_counts(content)}. Results in {where}", markup=False)
        if (folder / "report.html").exists():
            out.print(f"To look at: {folder / 'report.html'}", soft_wrap=True, markup=False)


def _write_page(
    folder: Path,
    module: LightningModule,
    session: EditSession,
    content: dict[str, Any],
    records: list[dict[str, Any]],
    samples: Sequence[Sample],
) -> list[str]:
    """Write the figures and the page; their names."""
    pictures = write_figures(folder, draw_figures(content, records, session.edits, session.measured.weight_changes))
    about = run_manifest(session, int(module.hparams["seed"])) | {"preset": module.hparams["preset"]}
    write_text(
        folder / "report.html",
        html_report(content, records, about, settings_of(folder, module.hparams), pictures, samples),
    )
    return [*(f"figures/{name}.png" for name in pictures), "report.html"]
