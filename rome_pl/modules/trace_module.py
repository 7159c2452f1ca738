"""The LightningModule that traces: one batch is one fact that the model knows."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from rome_pl.errors import OptionError
from rome_pl.metrics.probes import MEASURED_TOGETHER, measure_answers
from rome_pl.model.architecture import decoder_layers, find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.loading import DEFAULT_SOURCE
from rome_pl.model.rewrite_layers import parse_layers
from rome_pl.modules.language_model_module import LanguageModelModule
from rome_pl.modules.layer_trial import LayerTrial
from rome_pl.modules.trainer_checks import check_precision
from rome_pl.requests.edit_request import EditRequest, RequestError
from rome_pl.tracing.indirect_effects import TracedFact, token_roles
from rome_pl.tracing.layer_choice import Trial
from rome_pl.tracing.noise import default_window, draw_noise, embedding_deviation
from rome_pl.tracing.trace import Fact
from rome_pl.tracing.trace_cache import KnownTraces
from rome_pl.tracing.tracer import Tracer
from rome_pl.write.presets import PRESETS, PresetName

__all__ = ["TraceModule"]

NO_EDITING: dict[str, Any] = {}


class TraceModule(LanguageModelModule):
    """Finds where a model keeps facts, by ``Trainer.predict`` (Meng et al. 2022, section 2), and which layer to edit.

    Traced are facts that the model knows: those whose true answer it gives greedily, the whole of it. What is measured
    is the probability of the answer's first token. :attr:`traced` has every fact's trace. Each step returns the fact's
    total effect by its name. ``rome-pl locate`` then tries edits at some layers, which tracing alone does not decide.

    Args:
        pretrained: Model: hub name, folder, GGUF file or ``package:NAME/FILE``.
        dtype: Precision of its weights; ``auto`` is the checkpoint's own.
        allow_pickle: Whether weights that are not safetensors may be read.
        facts: Most facts to trace, the first that the model knows. ``None``: all.
        noise_factor: Standard deviation of the noise on the subject's embeddings, in those of the embeddings of all
            subjects' tokens.
        noise_samples: Samples of noise a fact.
        window: Layers over which outputs of MLPs or attention are put back together. ``None`` (default): the
            share of the depth that 10 layers are of GPT-2 XL's 48.
        layers: Layers at which edits are tried: a list, ``all``, or a range such as ``4-8``. ``None`` (default):
            every third.
        trial_edits: Facts that are edited at each of them; 0 tries none.
        trial_path: File, hub data set or ``sample`` with requests to try. ``None`` (default): the traced facts.
        preset: Variant of the closed form that they are written by.
        editing: Other options of :class:`rome_pl.RomeModule` for them, as ``rome-pl edit`` takes them below ``model``.
        seed: Seed of the noise, of the trial's sample and of the edits.
    """

    def __init__(
        self,
        pretrained: str = DEFAULT_SOURCE,
        dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto",
        allow_pickle: bool = False,
        facts: int | None = None,
        noise_factor: float = 3.0,
        noise_samples: int = 10,
        window: int | None = None,
        layers: list[int] | str | None = None,
        trial_edits: int = 10,
        trial_path: str | None = None,
        preset: PresetName = "r_rome",
        editing: dict = NO_EDITING,  # type: ignore[type-arg]  # the command line would make objects of dict[str, Any]
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name in ("facts", "noise_samples", "window"):
            value = self.hparams[name]
            if value is not None and value < 1:
                raise OptionError(f"{name}: expected a number from 1 on, got {value}")
        if not 0 < noise_factor < float("inf"):
            raise OptionError(f"noise_factor: expected a number above 0, got {noise_factor}: without noise no effect")
        if trial_edits < 0:
            raise OptionError(f"trial_edits: expected a number from 0 on, got {trial_edits}")
        if doubled := sorted({"preset", "seed"} & set(editing)):
            raise OptionError(f"editing: {doubled[0]} is an option of its own; set model.{doubled[0]}")
        if preset not in PRESETS:
            raise OptionError(f"preset: expected one of {sorted(PRESETS)}, got {preset!r}")
        self.traced: list[TracedFact] = []
        #: The facts that are traced, in order.
        self.known: list[EditRequest] = []
        #: Names of those whose answer the model does not give.
        self.unknown: list[str] = []
        self.refused: list[RequestError] = []
        #: Standard deviation of the noise.
        self.deviation = 0.0
        self.seconds = 0.0
        #: What the trial edits have shown, once they are made.
        self.trial: Trial | None = None
        self._facts: dict[str, Fact] = {}
        self._tracer: Tracer | None = None

    def setup(self, stage: str) -> None:
        """Check how the Trainer is set.

        Raises:
            OptionError: With the setting that works.
        """
        if stage != "predict":
            raise OptionError(f"facts are traced by Trainer.predict, not by {stage}")
        self._check_trainer()

    def candidates(self) -> list[int]:
        """The layers at which edits are tried.

        Raises:
            OptionError: If one does not exist.
        """
        depth = len(decoder_layers(self._language_model.model)[1])
        chosen = self.hparams["layers"]
        return list(range(0, depth, 3)) if chosen is None else parse_layers(chosen, depth)

    def layer_trial(self) -> LayerTrial | None:
        """The trial of edits at the candidate layers, ready to run; ``None`` where none is wanted or possible.

        Raises:
            OptionError: If a layer or an option does not exist.
        """
        layers = self.candidates()
        if not self.hparams["trial_edits"] or "mlp" in self.missing:
            return None
        sites = [find_site(self._language_model.model, layer) for layer in layers]
        options = {"preset": self.hparams["preset"], "seed": self.hparams["seed"], **self.hparams["editing"]}
        return LayerTrial(self._language_model, sites, options)

    @property
    def window(self) -> int:
        """Layers of a window."""
        chosen: int | None = self.hparams["window"]
        return chosen or default_window(len(decoder_layers(self._language_model.model)[1]))

    @property
    def missing(self) -> dict[Any, str]:
        """Why some kinds of restorations cannot be made in this model."""
        return self._tracer.missing if self._tracer is not None else {}

    def begin(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """Find out which facts the model knows; the data module asks for it.

        Returns:
            Those that are traced.

        Raises:
            RequestError: If none can be used, or the model knows none.
        """
        model = self._language_model
        self.refused, self.unknown, self.known, self._facts, self.traced = [], [], [], {}, []
        usable: list[EditRequest] = []
        rows = []
        for request in requests:
            try:
                fact = self.encode(request)
                rows.append(model.encoder.continuation(request.prompt, str(request.target_true), request))
            except RequestError as error:
                self.refused.append(error)
                continue
            self._facts[str(request.case_id)] = fact
            usable.append(request)
        if not usable:
            raise self.refused[0] if self.refused else RequestError("(records)", "there are no facts to trace")
        subjects = [fact.ids[slice(*fact.subject)] for fact in self._facts.values()]
        self.deviation = float(self.hparams["noise_factor"]) * embedding_deviation(model.model, subjects)
        for start in range(0, len(usable), MEASURED_TOGETHER):
            part = slice(start, start + MEASURED_TOGETHER)
            for request, answer in zip(usable[part], measure_answers(model, rows[part]), strict=True):
                if answer.generated:
                    self.known.append(request)
                else:
                    self.unknown.append(str(request.case_id))
        if not self.known:
            raise RequestError(
                "target_true",
                f"the model gives the true answer of none of {len(usable)} facts, so there is nothing to trace; give "
                "facts that it knows (data.path), with the answers written as it writes them",
                source=usable[0].source,
            )
        return self.known[: self.hparams["facts"]]

    def on_predict_start(self) -> None:
        """Begin anew."""
        self.traced, self.trial = [], None
        self._started = time.monotonic()
        self._tracer = Tracer(self._language_model.model, self.window)
        settings = (self.window, self.deviation, self.hparams["noise_samples"], self.hparams["seed"])
        self._known_traces = KnownTraces(self._language_model, *settings)

    def predict_step(self, batch: list[EditRequest], batch_idx: int) -> dict[str, float]:
        """Trace facts; the total effect of each, by name."""
        assert self._tracer is not None
        decode = self._language_model.tokenizer.decode
        for request in batch:
            name = str(request.case_id)
            fact = self._facts[name]
            trace = self._known_traces.find(fact)
            if trace is None:
                trace = self._tracer.trace(fact, self._noise(fact))
                self._known_traces.keep(fact, trace)
            tokens = tuple(decode([token]) for token in fact.ids)
            self.traced.append(TracedFact(name, tokens, token_roles(len(fact.ids), fact.subject), trace))
        return {fact.name: fact.trace.total_effect for fact in self.traced[-len(batch) :]}

    def on_predict_epoch_end(self) -> None:
        """Note how long it took."""
        self.seconds = time.monotonic() - self._started

    def check(self) -> None:
        """Load what is needed, so that whatever is wrong comes to light before anything is traced or replaced.

        Raises:
            RomeError: If the model cannot be used, a layer or an option does not exist, or the Trainer is set wrongly.
        """
        self._check_trainer()
        self.load()
        self._tracer = Tracer(self._language_model.model, self.window)
        self.layer_trial()

    def _check_trainer(self) -> None:
        check_precision(self.trainer)
        if self.trainer.world_size > 1:
            raise OptionError(f"{self.trainer.world_size} devices: facts are traced on one; set trainer.devices: 1")

    def _noise(self, fact: Fact) -> torch.Tensor:
        """What is added to the subject's embeddings, ``[samples, tokens, width]``; always the same for a fact."""
        width = self._language_model.model.get_input_embeddings().weight.shape[1]
        tokens = fact.subject[1] - fact.subject[0]
        return draw_noise(
            self.hparams["noise_samples"], tokens, width, self.deviation, self.hparams["seed"], fact.ids, fact.subject
        )

    def encode(self, request: EditRequest) -> Fact:
        """The fact of a request: its prompt's tokens, where the subject is among them, and its answer.

        Raises:
            RequestError: If it has no true answer, or does not fit into the model's context.
        """
        if request.target_true is None:
            raise request.error(
                "target_true", "is missing: a fact to trace needs its answer ('attribute' in known_1000.json)"
            )
        # The fact as an edit to what it says already: its rows end where the true answer begins.
        same = replace(request, target_new=request.target_true, target_true=None)
        edit = self._language_model.encoder.edit
        try:
            first, last = (edit(same, ("",), token).rows[0] for token in ("subject_first", "subject_last"))
        except RequestError as error:
            raise request.error("target_true" if error.field == "target_new" else error.field, error.message) from None
        return Fact(last.ids[: last.first + 1], (first.lookup, last.lookup + 1), last.target[0])

    def _adopt(self, language_model: LanguageModel) -> None:
        super()._adopt(language_model.with_chat(None))  # facts are traced, and edits tried, in plain prompts
        self._language_model.remember_weights()
