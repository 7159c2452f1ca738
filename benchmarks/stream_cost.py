"""Whether an edit costs the same however long the stream is, and what the Trainer adds to it.

    python benchmarks/stream_cost.py --records counterfact.json --limit 500 --json stream_cost.json

The stream runs on a small random model with the tokenizer of ``--model``, with all callbacks, ledger and TensorBoard.
The Trainer's share is measured on ``--model`` itself, in single mode and without checks: after each edit of a Trainer
with ledger, TensorBoard and progress bar, the same edit in a bare loop over the same engine.
"""

import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from common import load, median, module_for, parser, shipped_options, write
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rome_pl.callbacks import (
    EditCommit,
    EditProgressBar,
    ProbeEvaluation,
    RankOneWriter,
    RepresentationCheck,
    StateCheck,
    TensorBoardReport,
    Verification,
)
from rome_pl.data_modules.request_data import request_loader
from rome_pl.editing.edit import EditBatch, edits_of
from rome_pl.editing.session import session_of
from rome_pl.encoding.row_layout import row_layout
from rome_pl.forward.prefix_pass import run_prefix
from rome_pl.model.language_model import LanguageModel
from rome_pl.modules.rome_module import RomeModule
from rome_pl.requests.edit_request import EditRequest
from rome_pl.search.objective import ValueObjective
from rome_pl.search.value_search import SearchOptions, ValueSearch
from rome_pl.write.edit_keys import EditKeys


class Clock(Callback):
    """CPU time from one batch's start to the next one's."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the time."""
        self.ticks.append(time.process_time())


def main() -> None:
    """Measure both."""
    arguments = parser(__doc__ or "", 500)
    arguments.add_argument("--overhead", type=int, default=12, help="records on which the Trainer's share is measured")
    options = arguments.parse_args()
    language_model, requests = load(options)
    result: dict[str, Any] = {"records": len(requests)}
    with tempfile.TemporaryDirectory() as folder:
        result |= overhead(language_model, requests[: options.overhead], Path(folder) / "overhead")
        write(options.json, result)
        result |= growth(language_model, requests, Path(folder) / "stream")
    write(options.json, result)


def growth(language_model: LanguageModel, requests: list[EditRequest], folder: Path) -> dict[str, Any]:
    """CPU time of early and late edits of one sequential stream on a small model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=language_model.model.get_input_embeddings().num_embeddings,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    small = LanguageModel(LlamaForCausalLM(config).eval(), language_model.tokenizer)
    module = RomeModule.from_language_model(
        small,
        layers=[1],
        preset="r_rome",
        mom2_n_samples=4096,
        v_num_grad_steps=5,
        context_template_length_params=[[5, 2]],
        sequential_edit=True,
    )
    clock = Clock()
    _trainer([clock, *_callbacks()], folder).fit(module, request_loader(requests))
    spent = [late - early for early, late in zip(clock.ticks, clock.ticks[1:], strict=False)]
    early, late = spent[10:60], spent[-50:]
    return {
        "early_seconds": median(early),
        "late_seconds": median(late),
        "late_over_early": median(late) / median(early),
    }


def overhead(language_model: LanguageModel, requests: list[EditRequest], folder: Path) -> dict[str, Any]:
    """CPU time of edits in the Trainer, and of the same edits in a bare loop, on the model itself."""
    module = module_for(language_model, shipped_options())
    turns = _Turns()
    callbacks = [RankOneWriter(), EditCommit(ledger=True), TensorBoardReport(), EditProgressBar(), turns]
    _trainer(callbacks, folder).fit(module, request_loader(requests))
    # The first edit pays for what is made once, in either way.
    framed, bare = turns.framed[1:], turns.bare[1:]
    ratios = [with_trainer / without for with_trainer, without in zip(framed, bare, strict=True)]
    return {
        "bare_seconds": median(bare),
        "trainer_seconds": median(framed),
        "trainer_overhead_fraction": median(ratios) - 1,
        "overhead_records": len(framed),
    }


class _Turns(Callback):
    """After each edit of a Trainer, the same edit in a bare loop; listed last."""

    def __init__(self) -> None:
        self.framed: list[float] = []
        self.bare: list[float] = []
        self._since = time.process_time()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Stop it, and edit again without a Trainer."""
        assert isinstance(pl_module, RomeModule)
        now = time.process_time()
        self.framed.append(now - self._since)
        edit = edits_of(outputs)[0]
        value = bare_edit(pl_module, edit.request)
        assert edit.search.value is not None
        assert (value - edit.search.value).norm() < 1e-3 * value.norm()  # the same edit
        self._since = time.process_time()
        self.bare.append(self._since - now)


def bare_edit(module: RomeModule, request: EditRequest) -> Tensor:
    """One edit by the engine alone: encode, prefix pass, search, solve."""
    session, options = session_of(module), module.hparams
    model, weight = session.language_model, session.layers.last
    encoded = model.encoder.edit(request, session.contexts, session.fact_token, options["kl_position"])
    layout = row_layout([encoded])
    prefix = run_prefix(model.model, weight.site, layout.rows, model.encoder.pad_id)
    objective = ValueObjective(prefix, layout, options["kl_factor"], options["v_weight_decay"])
    chosen = SearchOptions(**{field.name: options[field.name] for field in fields(SearchOptions)})
    search = ValueSearch(objective, [0], [str(request.case_id)], chosen)
    optimizer = module.optimizer_class(search.parameters)
    group = optimizer.param_groups[0]
    group["lr"] = options["v_lr"]
    while (loss := search.evaluate()) is not None:
        group["loss"], group["scale"] = search.losses[0], search.scales[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        search.project()
    delta = search.found()[0].delta
    value = objective.base_output[0].double() + delta.double()
    own = list(layout.contexts[0])
    keys = EditKeys.of(prefix.keys[own].double(), prefix.outputs[own].double(), session.preset, weight.metric)
    weight.propose(str(request.case_id), keys.assertion(session.preset, delta))
    return value


def _callbacks() -> list[Callback]:
    """All callbacks of ``rome-pl edit``."""
    return [
        RepresentationCheck(),
        RankOneWriter(),
        Verification(least_probability=0.0),
        ProbeEvaluation(measure_perplexity=False),
        EditCommit(ledger=True),
        StateCheck(),
        TensorBoardReport(),
        EditProgressBar(),
    ]


def _trainer(callbacks: list[Callback], folder: Path) -> Trainer:
    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder, name="tensorboard", version=""),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


if __name__ == "__main__":
    main()
