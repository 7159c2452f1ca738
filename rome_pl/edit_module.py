"""The LightningModule: one batch is one edit, and ``training_step`` is its value optimisation."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from rome_pl.architecture import dtype_of_delta, find_site
from rome_pl.contexts import DEFAULT_LENGTH_PARAMS, generate_contexts, join_contexts
from rome_pl.defaults import default_layer
from rome_pl.edit import Edit, EditError, EditSession, EditStatus, Step
from rome_pl.encoding import FactToken
from rome_pl.errors import OptionError
from rome_pl.language_model import DEFAULT_SOURCE, LanguageModel, load_language_model
from rome_pl.objective import Losses, ValueObjective, clamp_norm_
from rome_pl.prefix import run_prefix
from rome_pl.rank_one import PRESETS, PresetName
from rome_pl.requests import EditRequest, RequestError
from rome_pl.statistics import resolve_second_moment
from rome_pl.weights import EditedWeight

__all__ = ["RomeModule"]


class RomeModule(LightningModule):
    """Optimises the value vector of one edit per batch (ROME, Meng et al. 2022, section 3.1).

    The step's result is ``{"edit": Edit}``; callbacks write, verify and report it. The fit has one epoch.

    Args:
        pretrained: Model to edit: hub name, folder, GGUF file or ``package:NAME/FILE``.
        dtype: Precision of its weights: ``auto`` takes the checkpoint's own.
        allow_pickle: Whether weights that do not come as safetensors may be read.
        layers: Rewrite layer, numbered from 0, as a list of one; nothing takes the published one of the model.
        preset: Variant of the closed form: ``r_rome`` (one key everywhere), ``rome`` (as published), or ``easyedit``
            (ROME's keys, no statistics).
        mom2_adjustment: Whether the closed form uses the second moment of keys; nothing leaves it to the preset.
        mom2_n_samples: Key vectors to compute the second moment from; nothing takes 30 per dimension.
        statistics: File with the second moment; nothing takes one that was shipped, cached, or is computed now.
        corpus: Text file or hub data set to compute the second moment from; nothing lets the model write its own.
        sequential_edit: Whether edits accumulate. Otherwise each is made on the original model and taken back.
        fact_token: Which token is looked up.
        v_num_grad_steps: Most evaluations of the loss per edit; an optimiser step lies between two.
        v_lr: Learning rate.
        v_weight_decay: Weight of the penalty on the offset's norm.
        clamp_norm_factor: Largest norm of the offset, in norms of the original output at the lookup token.
        kl_factor: Weight of the divergence that keeps the subject's essence.
        kl_position: Where the divergence is taken: ``subject`` (the lookup token, as in the public code) or ``last``
            (the end of "… is a", as in the paper).
        stop_loss: The optimisation ends when the total loss falls below this.
        stop_probability: It also ends when the target's probability (geometric mean over contexts and tokens) exceeds
            this.
        optimizer: Class and arguments of the optimiser; ``v_lr`` sets its learning rate.
        context_template_length_params: Pairs [tokens, number] of contexts that the model writes.
        contexts: Contexts of your own, in any language, instead of generated ones.
        bare_prompt_weight: Weight of the bare prompt's key in the mean key, the other contexts sharing the rest;
            nothing weighs all alike, as published. Where tokenizer and model know no BOS, a subject that opens the
            prompt has a key of its own there, which an even mean hardly reaches.
        on_error: Whether a record that cannot be edited is skipped or stops the run.
        seed: Seed of everything random.
        keep_original_weight: Refused: ``sequential_edit: false`` does what it did elsewhere.
    """

    def __init__(
        self,
        pretrained: str = DEFAULT_SOURCE,
        dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto",
        allow_pickle: bool = False,
        layers: list[int] | None = None,
        preset: PresetName = "r_rome",
        mom2_adjustment: bool | None = None,
        mom2_n_samples: int | None = None,
        statistics: str | None = None,
        corpus: str | None = None,
        sequential_edit: bool = False,
        fact_token: FactToken = "subject_last",
        v_num_grad_steps: int = 25,
        v_lr: float = 0.5,
        v_weight_decay: float = 1e-3,
        clamp_norm_factor: float = 4.0,
        kl_factor: float = 0.0625,
        kl_position: Literal["subject", "last"] = "subject",
        stop_loss: float = 0.05,
        stop_probability: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.Adam,
        context_template_length_params: list[list[int]] = DEFAULT_LENGTH_PARAMS,
        contexts: list[str] | None = None,
        bare_prompt_weight: float | None = None,
        on_error: Literal["skip", "stop"] = "skip",
        seed: int = 0,
        keep_original_weight: bool | None = None,
    ) -> None:
        super().__init__()
        if keep_original_weight is not None:
            raise OptionError(
                "keep_original_weight is not an option here: 'sequential_edit: false' evaluates each edit and restores "
                "the weights, 'sequential_edit: true' keeps every edit"
            )
        if layers is not None and len(layers) != 1:
            raise OptionError(f"layers: ROME writes each fact into one layer; give a list of one, got {layers}")
        if preset not in PRESETS:
            raise OptionError(f"preset: expected one of {sorted(PRESETS)}, got {preset!r}")
        for name, value, least in (
            ("v_num_grad_steps", v_num_grad_steps, 1),
            ("v_lr", v_lr, 0.0),
            ("v_weight_decay", v_weight_decay, 0.0),
            ("clamp_norm_factor", clamp_norm_factor, 0.0),
            ("kl_factor", kl_factor, 0.0),
            ("mom2_n_samples", mom2_n_samples or 1, 1),
            ("stop_loss", stop_loss, 0.0),
            ("stop_probability", stop_probability, 0.0),
            ("bare_prompt_weight", bare_prompt_weight or 0.0, 0.0),
        ):
            if not least <= value < math.inf:
                raise OptionError(f"{name}: expected a number from {least} on, got {value}")
        if bare_prompt_weight is not None and bare_prompt_weight > 1:
            raise OptionError(f"bare_prompt_weight: expected a share from 0 to 1, got {bare_prompt_weight}")
        self.automatic_optimization = False
        self.strict_loading = False
        self.save_hyperparameters(ignore=["optimizer"])
        self.optimizer_class = optimizer
        self.language_model: LanguageModel | None = None
        self.session: EditSession | None = None
        self._prepared: EditSession | None = None
        self._refused: dict[str, RequestError] = {}

    @classmethod
    def from_language_model(cls, language_model: LanguageModel, **options: Any) -> "RomeModule":
        """A module for a model that is loaded already; ``options`` are those of the class."""
        module = cls(pretrained=language_model.source, **options)
        module._adopt(language_model)
        return module

    def configure_model(self) -> None:
        """Load the model, on first use."""
        if self.language_model is None:
            loaded = load_language_model(
                self.hparams["pretrained"], self.hparams["dtype"], self.hparams["allow_pickle"]
            )
            self._adopt(loaded)

    def configure_optimizers(self) -> Optimizer:
        """The value optimiser, with ``v_lr`` as its learning rate."""
        optimizer = self.optimizer_class(cast(Iterable[Any], [self.delta]))
        for group in optimizer.param_groups:
            group["lr"] = self.hparams["v_lr"]
        return optimizer

    def on_fit_start(self) -> None:
        """Check how the Trainer is set, and prepare what all edits share."""
        if self.trainer.max_epochs != 1:
            raise OptionError(
                f"max_epochs is {self.trainer.max_epochs}: the stream of edits runs once. Use Trainer(max_epochs=1)"
            )
        if self.trainer.world_size > 1:
            raise OptionError("edits run on one device; use Trainer(devices=1)")
        if self.trainer.precision != "32-true":
            raise OptionError(
                f"precision is {self.trainer.precision}: it would bend the optimisation but not the rest. "
                "Use Trainer(precision='32-true') and set the weights' precision by model.dtype"
            )
        if self.device.type == "mps":
            raise OptionError("Apple's MPS has no float64, in which edits are solved; use Trainer(accelerator='cpu')")
        if self._prepared is None:
            self._prepared = self._prepare()
        session = self._prepared
        session.weight.resume()
        # What was prepared, and the weight with its edits, serve every fit of this module; the rest is this one's.
        self.session = replace(
            session,
            requests=(),
            num_refused=0,
            edits=[],
            base_scores={},
            final_scores={},
            perplexity={},
            state_checks=[],
            ledger=None,
        )

    def _prepare(self) -> EditSession:
        """Statistics, contexts and the weight's master: what all edits share."""
        assert self.language_model is not None
        hparams, language_model, site = self.hparams, self.language_model, self._site
        adjust = hparams["mom2_adjustment"]
        preset = PRESETS[hparams["preset"]]
        moment = None
        if preset.mom2_adjustment if adjust is None else adjust:
            moment = resolve_second_moment(
                language_model,
                site,
                statistics=hparams["statistics"],
                corpus=hparams["corpus"],
                wanted=hparams["mom2_n_samples"],
                seed=hparams["seed"],
            )
        contexts = hparams["contexts"]
        if contexts is None:
            contexts = generate_contexts(language_model, hparams["context_template_length_params"], hparams["seed"])
        metric: Callable[[Tensor], Tensor] = moment.solve if moment is not None else _identity
        return EditSession(
            language_model=language_model,
            weight=EditedWeight(site, metric),
            preset=preset,
            moment=moment,
            sequential=hparams["sequential_edit"],
            fact_token=hparams["fact_token"],
            contexts=join_contexts(contexts),
        )

    def on_train_start(self) -> None:
        """Encode every request once, so that what cannot be edited is known before the first edit."""
        session = self._session
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        if not isinstance(dataset, Sequence) or not all(isinstance(request, EditRequest) for request in dataset):
            raise TypeError("RomeModule needs a DataLoader over a list of EditRequest; see RequestDataModule")
        valid: list[EditRequest] = []
        self._refused = {}
        names: set[str] = set()
        for request in dataset:
            if str(request.case_id) in names:
                raise RequestError("case_id", "occurs twice: results could not be told apart", case_id=request.case_id)
            names.add(str(request.case_id))
            try:
                self._encode(request)
                session.language_model.encoder.check_probes(request)
                valid.append(request)
            except RequestError as error:
                self._refused[str(request.case_id)] = error
        session.requests, session.num_refused = tuple(valid), len(self._refused)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Requests are text and stay as they are."""
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Edit:
        """Turn a request into an :class:`Edit` with its prefix pass, under the weights as they are now."""
        request = batch[0] if isinstance(batch, Sequence) and len(batch) == 1 else batch
        if not isinstance(request, EditRequest):
            raise TypeError(f"expected batches of one EditRequest, got {type(batch).__name__}: set batch_size=1")
        session = self._session
        edit = Edit(index=len(session.edits), request=request)
        session.edits.append(edit)
        if (refusal := self._refused.get(edit.name)) is not None:
            edit.fail(str(refusal))
            return edit
        started = time.perf_counter()
        edit.encoded = self._encode(request)
        encoder = session.language_model.encoder
        prefix = run_prefix(
            session.language_model.model, self._site, (*edit.encoded.rows, edit.encoded.kl_row), encoder.pad_id
        )
        edit.objective = ValueObjective(prefix, edit.encoded, self.hparams["kl_factor"], self.hparams["v_weight_decay"])
        keys = prefix.keys[: len(edit.encoded.rows)].double()
        edit.key_bare, edit.key_mean = keys[0].clone(), self._mean_key(keys)
        edit.seconds["prefix"] = time.perf_counter() - started
        return edit

    def training_step(self, batch: Edit, batch_idx: int) -> dict[str, Edit]:
        """Optimise the value offset of one edit."""
        edit = batch
        if edit.status is EditStatus.PENDING:
            started = time.perf_counter()
            self._optimise(edit)
            edit.seconds["optimise"] = time.perf_counter() - started
        edit.objective = None  # frees the prefix pass
        if edit.failed and self.hparams["on_error"] == "stop":
            raise EditError(f"record {edit.name}: {edit.reason} (on_error: stop)")
        if edit.steps:
            self.log("loss", edit.steps[-1].loss, prog_bar=True, logger=False, batch_size=1)
            self.log("p(new)", edit.steps[-1].probability, prog_bar=True, logger=False, batch_size=1)
        return {"edit": edit}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen language model out of checkpoints."""
        checkpoint["state_dict"] = {}

    def _mean_key(self, keys: Tensor) -> Tensor:
        """Mean key over contexts, the bare prompt with the weight it was given."""
        weight: float | None = self.hparams["bare_prompt_weight"]
        if weight is None or len(keys) == 1:
            return keys.mean(0)
        return weight * keys[0] + (1 - weight) * keys[1:].mean(0)

    def _optimise(self, edit: Edit) -> None:
        objective, hparams = edit.objective, self.hparams
        assert objective is not None
        optimizer = cast(LightningOptimizer, self.optimizers())
        optimizer.optimizer.state.clear()  # moments of the last edit would bend this one
        with torch.no_grad():
            self.delta.zero_()
        largest = hparams["clamp_norm_factor"] * objective.base_norm
        steps = hparams["v_num_grad_steps"]
        for step in range(steps):
            optimizer.zero_grad()
            losses = objective(self.delta)
            edit.steps.append(_record(losses))
            last = edit.steps[-1]
            if not math.isfinite(last.loss):
                edit.fail(f"the loss became {last.loss} at step {step}; lower v_lr, or load the model in float32")
                return
            if last.loss < hparams["stop_loss"] or last.probability > hparams["stop_probability"] or step == steps - 1:
                break
            self.manual_backward(losses.total)
            optimizer.step()
            clamp_norm_(self.delta, largest)
        edit.delta = self.delta.detach().clone()
        edit.value = objective.base_output.double() + edit.delta.double()

    def _encode(self, request: EditRequest) -> Any:
        session = self._session
        return session.language_model.encoder.edit(
            request, session.contexts, session.fact_token, self.hparams["kl_position"]
        )

    def _adopt(self, language_model: LanguageModel) -> None:
        layers = self.hparams["layers"]
        config = language_model.model.config.get_text_config(decoder=True)
        self._site = find_site(language_model.model, layers[0] if layers is not None else default_layer(config))
        self.language_model = language_model
        self.model = language_model.model  # registered, so that Lightning moves it to the device
        weight = self._site.weight
        self.delta = torch.nn.Parameter(
            torch.zeros(self._site.d_value, dtype=dtype_of_delta(weight), device=weight.device)
        )

    @property
    def _session(self) -> EditSession:
        assert self.session is not None  # on_fit_start made it
        return self.session


def _identity(keys: Tensor) -> Tensor:
    return keys


def _record(losses: Losses) -> Step:
    values = torch.stack([losses.total, losses.nll, losses.kl, losses.decay, losses.probability]).detach().tolist()
    return Step(*values)
