"""What becomes of a model, and of its edits, as one sequential edit follows another.

    python benchmarks/long_stream.py --records counterfact.json --limit 500 --json lifelong.json
    python benchmarks/long_stream.py --config smollm2 --preset rome --batch-size 1 --records counterfact.json

At each checkpoint all records so far are scored on the weights as they are then, rejected edits included. The run is
kept beside the JSON file: the same command goes on where it was interrupted, and more records may be asked for later.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import load, median, module_for, parser, shipped_options
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rome_pl.callbacks import EditCommit, RankOneWriter, RepresentationCheck, RunReport, Verification
from rome_pl.data_modules.request_data import request_loader
from rome_pl.editing.probing import probe, with_touched
from rome_pl.editing.session import EditSession, session_of
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics import ProbeScores, held_out_text, perplexity, summarise
from rome_pl.metrics.probes import MEASURED_TOGETHER, measure_answers
from rome_pl.metrics.score_cache import KnownScores
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest
from rome_pl.requests.record_forms import parse_records, read_records
from rome_pl.utils.environment import library_versions
from rome_pl.write.presets import PRESETS

EARLY, LATE = (10, 60), (450, 500)
"""Edits whose processor time is compared: an edit should cost the same however many came before it."""

BEYOND = 1.5
"""A model whose perplexity has grown by this factor has collapsed."""


def main() -> None:
    """Edit, measure, write and print."""
    arguments = parser(__doc__ or "", 150)
    arguments.add_argument("--preset", choices=sorted(PRESETS), default="lifelong")
    arguments.add_argument("--config", default="stream", help="shipped config that the other options come from")
    arguments.add_argument("--every", type=int, default=50, help="edits between two checkpoints")
    arguments.add_argument("--batch-size", type=int, help="edits solved jointly; 10, or 1 where a preset has to")
    arguments.add_argument("--largest_disturbance", type=float, help="see Verification; 0.05 with statistics")
    arguments.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other options of RomeModule")
    arguments.add_argument("--unedited", type=int, default=0, help="last records of the file that are only recalled")
    arguments.add_argument("--perplexity_text", help="text for perplexity; nothing takes the shipped one")
    arguments.add_argument("--save_model", type=Path, help="folder for the final model")
    options = arguments.parse_args()
    language_model, requests = load(options)
    preset = PRESETS[options.preset]
    together = options.batch_size or (10 if preset.shape == preset.at else 1)
    chosen = shipped_options(options.config) | {"preset": options.preset, "sequential_edit": True}
    chosen |= {name: json.loads(value) for name, _, value in (pair.partition("=") for pair in options.set)}
    adjusts = chosen.get("mom2_adjustment")
    if options.largest_disturbance is None and (preset.mom2_adjustment if adjusts is None else adjusts):
        options.largest_disturbance = 0.05
    target: Path = options.json or Path("runs") / f"long_stream_{options.preset}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    base = zip(requests, KnownScores(language_model).measure(requests), strict=True)
    checkpoints = Checkpoints(
        target,
        options.every,
        {str(request.case_id): scores for request, scores in base},
        unedited=unedited_records(options, requests),
        text=held_out_text(options.perplexity_text),
    )
    checkpoints.content |= {"preset": options.preset, "options": chosen, "versions": library_versions()}
    trainer = Trainer(
        max_epochs=1,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=target.with_suffix(".run"),
        callbacks=[
            RepresentationCheck(),
            RankOneWriter(),
            Verification(largest_disturbance=options.largest_disturbance),
            EditCommit(ledger=True, resume=True),
            checkpoints,
            RunReport(figures=False, largest_table=0),
        ],
    )
    apart = chosen.get("keep_subject_facts", True)
    trainer.fit(module_for(language_model, chosen), request_loader(requests, together, apart=apart))
    if options.save_model is not None:
        language_model.model.save_pretrained(options.save_model)
        language_model.tokenizer.save_pretrained(options.save_model)
    print(_table(checkpoints.content["curve"]))


class Checkpoints(Callback):
    """Scores all edits so far every so many edits, and at the end; what was measured once is not measured again.

    Args:
        target: The JSON file.
        every: Edits between two checkpoints.
        base: Scores of the unedited model, by name of the request.
        unedited: Facts that nothing edits.
        text: Text for perplexity.
    """

    def __init__(
        self,
        target: Path,
        every: int,
        base: dict[str, ProbeScores],
        unedited: Sequence[EditRequest],
        text: str,
    ) -> None:
        self.target, self.every, self.base = target, every, base
        self.unedited, self.text = unedited, text
        self.content: dict[str, Any] = {"curve": []}
        if target.exists():
            self.content = json.loads(target.read_text(encoding="utf-8"))
        self._perplexity = 0.0
        self._started = 0.0
        self._cpu: dict[int, float] = {}

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        language_model = session_of(pl_module).language_model
        self._perplexity = perplexity(language_model, self.text)
        self.content["perplexity_base"] = self._perplexity
        self.content["recall_base"] = recall(language_model, self.unedited)
        self._started = time.process_time()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        session = session_of(pl_module)
        done, before = len(session.edits), len(session.edits) - len(batch.edits)
        if all(not edit.resumed for edit in batch.edits):
            self._cpu[done] = (time.process_time() - self._started) / len(batch.edits)
        self._measure_if_due(trainer, session, done, before)
        self._started = time.process_time()

    def _measure_if_due(self, trainer: Trainer, session: EditSession, done: int, before: int) -> None:
        if done // self.every == before // self.every and not trainer.is_last_batch:
            return
        if any(point["n"] == done for point in self.content["curve"]):
            return
        point = self._measure(session, session.requests[:done])
        self.content["curve"] = sorted([*self.content["curve"], point], key=lambda point: point["n"])
        broken = (point["n"] for point in self.content["curve"] if point["perplexity_ratio"] > BEYOND)
        self.content["collapsed_by"] = next(broken, None)
        early, late = ([self._cpu[n] for n in self._cpu if first < n <= last] for first, last in (EARLY, LATE))
        if early and late:
            self.content["late_over_early"] = median(late) / median(early)
        self.target.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        print(_line(point), flush=True)

    def _measure(self, session: EditSession, requests: tuple[EditRequest, ...]) -> dict[str, Any]:
        scores: list[ProbeScores] = []
        for start in range(0, len(requests), MEASURED_TOGETHER):
            scores += probe(session, requests[start : start + MEASURED_TOGETHER])
        names = [str(request.case_id) for request in requests]
        base = dict(zip(names, with_touched(session, requests, [self.base[name] for name in names]), strict=True))
        now, then = summarise(dict(zip(names, scores, strict=True)), base), summarise(base, base)
        own = [edit for edit in session.edits if edit.steps and not edit.resumed][-self.every :]
        return {
            "n": len(session.edits),
            **{name: now[name]["value"] for name in ("ES", "PS", "NS", "EM", "PM", "NM")},
            **{f"{name}_interval": [now[name]["low"], now[name]["high"]] for name in ("ES", "PS", "NS")},
            **{f"{name}_base": then[name]["value"] for name in ("ES", "PS", "NS")},
            "recall": recall(session.language_model, self.unedited),
            "perplexity_ratio": perplexity(session.language_model, self.text) / self._perplexity,
            "delta_norm_ratio": session.layers.change,
            "seconds_per_edit": median([sum(edit.seconds.values()) for edit in own]) if own else None,
            "rejected": sum(edit.status is EditStatus.REJECTED for edit in session.edits),
        }


def unedited_records(options: argparse.Namespace, edited: Sequence[EditRequest]) -> list[EditRequest]:
    """The last records of the file, with a true answer."""
    if not options.unedited:
        return []
    requests, _ = parse_records(read_records(Path(options.records))[-options.unedited :], options.records, None)
    if {str(request.case_id) for request in requests} & {str(request.case_id) for request in edited}:
        raise SystemExit("--unedited: some of these records are edited; lower --limit")
    return [request for request in requests if request.target_true is not None]


def recall(language_model: LanguageModel, requests: Sequence[EditRequest]) -> float | None:
    """Share of facts whose true answer greedy generation gives."""
    if not requests:
        return None
    rows = [language_model.encoder.continuation(one.prompt, one.target_true or "", one) for one in requests]
    return sum(answer.generated for answer in measure_answers(language_model, rows)) / len(rows)


_COLUMNS = (
    "n",
    "ES",
    "PS",
    "NS",
    "NS_base",
    "recall",
    "perplexity_ratio",
    "delta_norm_ratio",
    "seconds_per_edit",
    "rejected",
)


def _line(point: dict[str, Any]) -> str:
    cells = (f"{point[name]:.3f}" if isinstance(point[name], float) else str(point[name]) for name in _COLUMNS)
    return f"| {' | '.join(cells)} |"


def _table(curve: list[dict[str, Any]]) -> str:
    return "\n".join([f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|", *map(_line, curve)])


if __name__ == "__main__":
    main()
