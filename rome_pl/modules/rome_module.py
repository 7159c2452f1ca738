"""The LightningModule: one batch is one or more edits, and ``training_step`` is their value optimisation."""

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from rome_pl.data_modules.edit_batches import EditBatchSampler, check_shared
from rome_pl.data_modules.retention_sample import retention_loader
from rome_pl.editing.admission import admit_requests, check_joint_solve
from rome_pl.editing.batch_writer import BatchWriter
from rome_pl.editing.edit import Edit, EditBatch, EditError
from rome_pl.editing.edit_setup import prepare_batch
from rome_pl.editing.probing import probe
from rome_pl.editing.resume import take_over
from rome_pl.editing.retries import Retries
from rome_pl.editing.run_setup import RunSetup, prepare_run
from rome_pl.editing.session import EditSession
from rome_pl.encoding.chat_template import ChatForm
from rome_pl.encoding.encoded_rows import EncodedEdit
from rome_pl.encoding.text_encoder import FactToken
from rome_pl.forward.suffix_engine import SuffixEngine
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics.probes import ProbeScores
from rome_pl.model.architecture import find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.loading import DEFAULT_SOURCE
from rome_pl.model.rewrite_layers import default_layer
from rome_pl.modules.edit_options import check_options
from rome_pl.modules.language_model_module import LanguageModelModule
from rome_pl.modules.manual_search import ManualSearch
from rome_pl.modules.trainer_checks import check_edit_trainer
from rome_pl.requests.conflicts import SUBJECT_S_KEY, earlier_facts
from rome_pl.requests.edit_request import EditRequest, RequestError
from rome_pl.search.attempts import Attempt, attempts_of, engines_of
from rome_pl.search.context_templates import DEFAULT_LENGTH_PARAMS
from rome_pl.search.polyak_step import PolyakStep
from rome_pl.utils.distributed import independent_gradients, leave_to_each_process, one_after_the_other
from rome_pl.utils.restored_state import differentiable, frozen
from rome_pl.write.presets import PresetName

__all__ = ["RomeModule"]

log = logging.getLogger(__name__)

NO_RETRIES: list[dict[str, Any]] = []


class RomeModule(LanguageModelModule):
    """Optimises the value vectors of a batch of edits (ROME, Meng et al. 2022, section 3.1).

    Each edit of a batch has an offset, optimiser state, clamp and end of its own. The step's result is
    ``{"edits": list[Edit]}``; callbacks write, verify and report them. In single mode devices share the stream.

    Args:
        pretrained: Model to edit: hub name, folder, GGUF file or ``package:NAME/FILE``.
        dtype: Precision of its weights; ``auto`` is the checkpoint's own.
        allow_pickle: Whether weights that are not safetensors may be read.
        chat: How prompts become conversations in the model's chat template. ``None`` (default): they stay plain text.
        layers: Rewrite layers, numbered from 0. Values are searched at the last one; offsets are shared among all, as
            in MEMIT. ``None`` (default): the published layer of the model.
        preset: Variant of the closed form, see :data:`rome_pl.write.presets.PRESETS`.
        mom2_adjustment: Whether to use the second moment of keys. ``None`` (default): as the preset does.
        mom2_update_weight: How many keys the second moment counts for (MEMIT's name). ``None`` (default): the preset's.
        nullspace_threshold: ``alphaedit`` writes in the span of the second moment's eigenvalues below it.
        L2: Ridge of ``alphaedit``.
        mom2_n_samples: Key vectors to compute the second moment from. ``None`` (default): 30 per dimension.
        statistics: File with the second moment, or one file a layer. ``None`` (default): the shipped or cached one;
            it is computed if there is none.
        corpus: Text file or hub data set to compute it from. ``None`` (default): the model writes its own text.
        sequential_edit: Whether edits accumulate. If not, each edit is made on the original model and reverted.
        fact_token: Token to look up.
        v_num_grad_steps: Most evaluations of the loss per edit, with an optimiser step between two.
        v_lr: Learning rate. ``None`` (default): 1 for :class:`rome_pl.PolyakStep`, else 0.5, as published.
        v_weight_decay: Weight of the penalty on the offset's norm.
        clamp_norm_factor: Largest norm of the offset, in norms of the original output at the lookup token.
        anchor_norm: Norm that every value is given before the write, in norms of an ordinary token's value (norm
            anchors, Liu et al. 2026). ``None`` (default): values keep their norms.
        largest_update: Largest Frobenius norm of an edit's change of a layer, relative to the layer's original weight.
            A larger edit is scaled down. ``None`` (default): no limit.
        keep_subject_facts: Whether the search keeps earlier facts about the same subject, where edits accumulate.
        kl_factor: Weight of the divergence that keeps the subject's essence.
        kl_position: Where to take it: ``subject`` (the lookup token, as in the public code) or ``last`` (the end of
            "… is a", as in the paper).
        stop_loss: End the search when the total loss is below this.
        stop_probability: End it when the target's probability, the geometric mean over contexts and tokens, is above
            this.
        stop_greedy: End it when each token of the target is the likeliest one under every context of the step.
        retries: Settings for further searches, in order. They are used when a search ends below ``retry_below``, or
            when its edit cannot be written or does not pass :class:`Verification`. Each maps search options (such as
            ``v_num_grad_steps`` or ``clamp_norm_factor``) to values, or ``layers`` to other rewrite layers.
        retry_below: A search has failed if the target's probability under its value is below this. 0: none fails.
        optimizer: Class and arguments of the optimiser; ``v_lr`` sets its learning rate. Each edit is a parameter
            group of its own. :class:`rome_pl.PolyakStep` (default) needs about half the steps of Adam, which papers
            use.
        contexts_per_step: Contexts, beside the bare prompt, that each evaluation of the loss draws anew, seeded by
            record and step. Keys are always means over all contexts. ``None``: all, as published.
        context_template_length_params: Pairs [tokens, number] of contexts that the model writes.
        contexts: Your own contexts, in any language. ``None`` (default): the model writes them.
        compile: Whether steps use ``torch.compile``, which pays after some hundred edits.
        on_error: Whether a record that cannot be edited is skipped, or stops the run.
        seed: Seed of everything random.
        keep_original_weight: Refused; use ``sequential_edit``.
    """

    def __init__(
        self,
        pretrained: str = DEFAULT_SOURCE,
        dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto",
        allow_pickle: bool = False,
        chat: ChatForm | None = None,
        layers: list[int] | None = None,
        preset: PresetName = "balanced",
        mom2_adjustment: bool | None = None,
        mom2_update_weight: float | None = None,
        nullspace_threshold: float = 2e-2,
        L2: float = 10.0,  # its published name
        mom2_n_samples: int | None = None,
        statistics: str | list[str] | None = None,
        corpus: str | None = None,
        sequential_edit: bool = False,
        fact_token: FactToken = "subject_last",
        v_num_grad_steps: int = 25,
        v_lr: float | None = None,
        v_weight_decay: float = 1e-3,
        clamp_norm_factor: float = 10.0,
        anchor_norm: float | None = None,
        largest_update: float | None = None,
        keep_subject_facts: bool = True,
        kl_factor: float = 0.0625,
        kl_position: Literal["subject", "last"] = "subject",
        stop_loss: float = 0.05,
        stop_probability: float = 0.98,
        stop_greedy: bool = False,
        contexts_per_step: int | None = 3,
        retries: list[dict[str, Any]] = NO_RETRIES,
        retry_below: float = 0.1,
        optimizer: OptimizerCallable = PolyakStep,
        context_template_length_params: list[list[int]] = DEFAULT_LENGTH_PARAMS,
        contexts: list[str] | None = None,
        compile: bool = False,
        on_error: Literal["skip", "stop"] = "skip",
        seed: int = 0,
        keep_original_weight: bool | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = self.strict_loading = False
        self.save_hyperparameters(ignore=["optimizer"])
        check_options(self.hparams)
        self.optimizer_class = optimizer
        self.session: EditSession | None = None
        self._search = ManualSearch(self)
        self._setup: RunSetup | None = None
        self._attempts: list[Attempt] = []
        self._engines: dict[tuple[int, ...], SuffixEngine] = {}
        self._retries: Retries
        self._indices: dict[str, int] = {}
        self._refused: dict[str, RequestError] = {}
        self._until_end = ExitStack()

    def val_dataloader(self) -> DataLoader[list[EditRequest]]:
        """No retention sample, unless a data module gives one."""
        return retention_loader([], lambda: None, 0)

    def validation_step(self, batch: list[EditRequest], batch_idx: int) -> dict[str, ProbeScores]:
        """Measure requests under the weights as they are now; the scores by name of the edit."""
        scores = probe(self._session, batch)
        return {str(request.case_id): found for request, found in zip(batch, scores, strict=True)}

    def configure_optimizers(self) -> Optimizer:
        """The value optimiser, with ``v_lr`` as its learning rate; every batch gives it parameters of its own."""
        return self._search.configure(self.optimizer_class, self.delta, self.hparams["v_lr"])

    def setup(self, stage: str) -> None:
        """Check how the Trainer is set, before it touches the model."""
        if stage == "fit":
            check_edit_trainer(self.trainer, self.hparams["sequential_edit"])

    def on_fit_start(self) -> None:
        """Prepare what all edits share."""
        hparams = self.hparams
        if self._setup is None:
            language_model = self._language_model
            with one_after_the_other(self.trainer):  # what the first process computes and caches, the others find
                main = self._attempts[0].layers
                self._setup = prepare_run(language_model, self._sites, main, hparams)
            self._engines = engines_of(language_model, self._sites, self._attempts, hparams["compile"])
        self._setup.layers.resume()
        step = partial(self._search.step, self._setup.language_model.model)
        self._retries = Retries(self._attempts, self._setup, self._engines, self._search, step, hparams)
        last, self.session = self.session, EditSession(self._setup, BatchWriter(self._setup, self._retries))
        if last is not None:
            self.session.earlier, self.session.flops = last.applied(), last.flops

    def on_train_start(self) -> None:
        """Encode every request once, so that what cannot be edited is known before the first edit."""
        session, loader = self._session, self.trainer.train_dataloader
        dataset = getattr(loader, "dataset", None)
        if not isinstance(dataset, Sequence) or not all(isinstance(request, EditRequest) for request in dataset):
            raise TypeError("RomeModule needs a DataLoader over a list of EditRequest; see RequestDataModule")
        if self.trainer.world_size > 1:
            check_shared(loader)
            self._until_end.enter_context(independent_gradients(self.trainer))
        self._indices, self._refused, lengths = admit_requests(session, dataset, self._encode)
        sampler = getattr(loader, "sampler", None)
        size = sampler.batch_size if isinstance(sampler, EditBatchSampler) else getattr(loader, "batch_size", None)
        if session.sequential and size is not None and size > 1:
            check_joint_solve(session, size)
        if isinstance(sampler, EditBatchSampler):
            sampler.regroup(lengths)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> EditBatch | list[EditRequest]:
        """Turn requests to edit into an :class:`EditBatch` with its prefix pass, under the weights as they are now."""
        requests = [batch] if isinstance(batch, EditRequest) else batch
        if not isinstance(requests, list) or not all(isinstance(request, EditRequest) for request in requests):
            raise TypeError(f"expected an EditRequest or several, got {type(batch).__name__}; see request_loader")
        if not self.trainer.training:
            return requests
        session = self._session
        edits = [
            Edit(index=self._indices[str(request.case_id)], request=request, notes=list(request.notes))
            for request in requests
        ]
        session.edits += edits
        made = EditBatch(edits)
        if take_over(session, edits):
            return made
        for edit in edits:
            if (refusal := self._refused.get(edit.name)) is not None:
                edit.fail(str(refusal))
        engines = list(self._engines.values())
        prepare_batch(made, session.setup, engines, self._encode, self.hparams, self._counting())
        return made

    def training_step(self, batch: EditBatch, batch_idx: int) -> dict[str, list[Edit]]:
        """Optimise the value offsets of a batch."""
        started = time.perf_counter()
        edits, session = [edit for edit in batch.optimised if edit.status is EditStatus.PENDING], self._session
        if edits:
            assert batch.objective is not None
            with self._counting(), frozen(session.language_model.model):
                self._retries.first(batch.objective, edits)
            loss = sum(edit.steps[-1].loss for edit in edits) / len(edits)
            probability = sum(edit.steps[-1].probability for edit in edits) / len(edits)
            self.log("loss", loss, prog_bar=True, logger=False, batch_size=len(edits))
            self.log("p(new)", probability, prog_bar=True, logger=False, batch_size=len(edits))
        session.flops.settle(len(edits))
        batch.objective = None  # frees the prefix pass
        for edit in edits:
            edit.seconds["optimise"] = (time.perf_counter() - started) / len(edits)
        return {"edits": batch.edits}

    def on_train_batch_end(self, outputs: Any, batch: EditBatch, batch_idx: int) -> None:
        """End the run after a failed edit, if that is wanted; what its batch achieved is kept."""
        for edit in batch.edits:
            edit.free()
        failed = next((edit for edit in outputs["edits"] if edit.failed), None)
        if failed is not None and self.hparams["on_error"] == "stop":
            raise EditError(f"record {failed.name}: {failed.reason} (on_error: stop)")

    def on_fit_end(self) -> None:
        """Leave Lightning's wrapper as it was."""
        self._until_end.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen language model out of checkpoints."""
        checkpoint["state_dict"] = {}

    def _counting(self) -> AbstractContextManager[None]:
        """Count operations, unless the first batch was counted in the run that this one resumes."""
        session = self._session
        resumed = any(edit.resumed and edit.steps for edit in session.edits)
        return session.flops.counting(skip=self.hparams["compile"] or resumed)

    def _encode(self, request: EditRequest) -> EncodedEdit:
        session = self._session
        encode = partial(session.language_model.encoder.edit, fact_token=session.fact_token)
        encoded = encode(request, session.contexts, kl_position=self.hparams["kl_position"])
        keep = self.hparams["keep_subject_facts"] and session.fact_token in SUBJECT_S_KEY
        earlier = earlier_facts(request, session.in_the_weights()) if keep else []
        return replace(encoded, kept=tuple(encode(other).rows[0] for other in earlier))

    @differentiable()
    def _adopt(self, language_model: LanguageModel) -> None:
        layers = self.hparams["layers"]
        config = language_model.model.config.get_text_config(decoder=True)
        self._attempts = attempts_of(self.hparams, [default_layer(config)] if layers is None else layers)
        numbers = sorted({layer for attempt in self._attempts for layer in attempt.layers})
        self._sites = [find_site(language_model.model, number) for number in numbers]
        super()._adopt(language_model.with_chat(self.hparams["chat"] or language_model.chat))
        # The offsets that are optimised come and go with their batches; this one stands for them before the first.
        self.delta = torch.nn.Parameter(torch.zeros(self._sites[-1].d_value, device=self._sites[-1].weight.device))
        leave_to_each_process(self, "model")

    @property
    def _session(self) -> EditSession:
        assert self.session is not None  # on_fit_start made it
        return self.session
