"""What the benchmarks share: their arguments, loading, runs of the engine, and the machine's own speed."""

import argparse
import json
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from rome_pl.callbacks import EditCommit, ProbeEvaluation, RankOneWriter, RepresentationCheck, Verification
from rome_pl.data_modules.request_data import BATCH, request_loader
from rome_pl.editing.edit import EditBatch
from rome_pl.editing.session import EditSession, session_of
from rome_pl.metrics import ProbeScores, summarise
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.loading import DEFAULT_SOURCE, load_language_model
from rome_pl.modules.rome_module import RomeModule
from rome_pl.requests.edit_request import EditRequest
from rome_pl.requests.record_forms import parse_records, read_records
from rome_pl.utils.environment import library_versions
from rome_pl.utils.flops import count_flops

ADAM = "torch.optim.Adam"
POLYAK = "rome_pl.PolyakStep"


def parser(description: str, limit: int) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default=DEFAULT_SOURCE, help="hub name, folder or GGUF file")
    made.add_argument("--records", required=True, help="file of records, in any form that 'rome-pl edit' reads")
    made.add_argument("--limit", type=int, default=limit, help="most records to use")
    made.add_argument("--json", type=Path, help="file for the figures")
    return made


def load(options: argparse.Namespace) -> tuple[LanguageModel, list[EditRequest]]:
    """The model and the requests."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="Found .* module.s. in eval mode")
    warnings.filterwarnings("ignore", message="You have overridden `.*` in `LightningModule`")
    warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
    records = read_records(Path(options.records))[: options.limit]
    requests, invalid = parse_records(records, options.records, None)
    for record in invalid:
        print(f"left out: {record.message}")
    return load_language_model(options.model), requests


def shipped_options(config: str = "smollm2") -> dict[str, Any]:
    """The options of :class:`RomeModule` in a shipped config; the optimiser's class as its name."""
    content = yaml.safe_load((files("rome_pl") / "configs" / f"{config}.yaml").read_text())
    options = dict(content["model"])
    options.pop("pretrained")
    return options


def module_for(
    language_model: LanguageModel, options: dict[str, Any], kind: type[RomeModule] = RomeModule
) -> RomeModule:
    """A module with options as a config writes them."""
    options = dict(options)
    optimizer = options.pop("optimizer", None)
    if optimizer is not None:
        options["optimizer"] = _optimizer(optimizer)
    return kind.from_language_model(language_model, **options)


def _optimizer(described: dict[str, Any]) -> Callable[[Iterable[Any]], torch.optim.Optimizer]:
    package, _, name = described["class_path"].rpartition(".")
    cls = getattr(__import__(package, fromlist=[name]), name)
    arguments = described.get("init_args", {})
    return lambda parameters: cls(parameters, **arguments)


class CountedModule(RomeModule):
    """A module that counts the operations of every prefix pass and optimisation."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        #: Operations by name of the edit; those of a batch are shared evenly.
        self.flops: dict[str, float] = Counter()
        self.flops_steps: dict[str, float] = Counter()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> EditBatch:
        """As the parent's."""
        with count_flops() as counted:
            made = super().on_after_batch_transfer(batch, dataloader_idx)
        for edit in made.edits:
            self.flops[edit.name] += counted.total / len(made.edits)
        return made

    def training_step(self, batch: EditBatch, batch_idx: int) -> Any:
        """As the parent's."""
        with count_flops() as counted:
            result = super().training_step(batch, batch_idx)
        for edit in batch.edits:
            self.flops[edit.name] += counted.total / len(batch.edits)
            self.flops_steps[edit.name] += counted.total / len(batch.edits)
        return result


class _Probes(ProbeEvaluation):
    """Probe evaluation that measures the unedited model once for several runs."""

    def __init__(self, known: dict[str, ProbeScores]) -> None:
        super().__init__(measure_perplexity=False)
        self.known = known

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what is not known yet."""
        session = session_of(pl_module)
        if not all(str(request.case_id) in self.known for request in session.requests):
            super().on_train_epoch_start(trainer, pl_module)
            self.known.update(session.measured.base_scores)
        session.measured.base_scores = dict(self.known)


def run(
    module: RomeModule,
    requests: Sequence[EditRequest],
    *,
    batch_size: int = BATCH,
    base: dict[str, ProbeScores] | None = None,
    evaluate: bool = True,
) -> tuple[EditSession, float]:
    """Edit requests one by one in single mode; the session and the seconds of the fit.

    Args:
        module: The module.
        requests: The requests.
        batch_size: Edits side by side.
        base: Scores of the unedited model, filled on the first run.
        evaluate: Whether edits are checked, verified and probed as by ``rome-pl edit``, or only optimised and solved.
    """
    callbacks: list[Callback] = [RankOneWriter(), EditCommit()]
    if evaluate:
        callbacks = [
            RepresentationCheck(),
            RankOneWriter(),
            Verification(),
            _Probes({} if base is None else base),
            EditCommit(),
        ]
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu" if not torch.cuda.is_available() else "cuda",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(module, request_loader(requests, batch_size, by_length=True))
    return session_of(module), time.perf_counter() - started


def warm_run(module: RomeModule, requests: Sequence[EditRequest], batch_size: int) -> EditSession:
    """Optimise and solve only, after one edit that pays for what is made, loaded or counted once."""
    run(module, requests[:1], batch_size=1, evaluate=False)
    if isinstance(module, CountedModule):
        module.flops.clear()
        module.flops_steps.clear()
    return run(module, requests, batch_size=batch_size, evaluate=False)[0]


def scores(measured: Iterable[ProbeScores]) -> dict[str, Any]:
    """ES, PS and NS with their intervals."""
    summary = summarise({str(place): record for place, record in enumerate(measured)})
    return {name: summary[name] for name in ("ES", "PS", "NS", "EM", "PM", "NM")}


def matmul_peak(size: int = 2048, repeats: int = 20) -> float:
    """The machine's own float32 matrix product, the best of several, in GFLOP/s."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def median(values: Sequence[float]) -> float:
    """The median."""
    return float(torch.tensor(list(values), dtype=torch.float64).quantile(0.5))


def write(path: Path | None, content: dict[str, Any]) -> None:
    """Print the figures, and write them if a file is given."""
    content = {**content, "versions": library_versions(), "threads": torch.get_num_threads()}
    text = json.dumps(content, indent=2)
    print(text)
    if path is not None:
        path.write_text(text + "\n")
