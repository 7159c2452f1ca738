"""Finding settings for a model by trial edits within a stated time."""

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch.optim import Optimizer
from typing_extensions import override

from rome_pl.callbacks import EditCommit, ProbeEvaluation, RankOneWriter, RepresentationCheck, Verification
from rome_pl.data_modules.request_data import BATCH, request_loader
from rome_pl.editing.edit import EditBatch, edits_of
from rome_pl.editing.probing import divergence_alone, in_force
from rome_pl.editing.session import session_of
from rome_pl.errors import OptionError
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics import ProbeScores, held_out_text
from rome_pl.metrics.intervals import Entry
from rome_pl.metrics.probes import measure_answers
from rome_pl.model.architecture import UnsupportedModelError, decoder_layers, find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.modules.embedded_fit import fit_inside
from rome_pl.modules.rome_module import RomeModule
from rome_pl.requests.edit_request import EditRequest
from rome_pl.requests.sampling import sample_requests
from rome_pl.search.polyak_step import PolyakStep
from rome_pl.second_moments.moment_store import statistics_files
from rome_pl.tracing.setting_choice import RATES, Choice, SettingScores, choose, score_setting
from rome_pl.write.presets import PRESETS

__all__ = ["Tuning", "describe_optimizer", "known_first"]

log = logging.getLogger(__name__)

FEWEST = 8
"""Of fewer facts a trial tells too little."""

READ = 5
"""Edits of a trial for which ordinary text is read."""

SEARCHES: Mapping[str, tuple[float, float, float]] = {
    "p > 0.98": (0.98, 0.99, 0.0),
    "p > 0.95, shortened": (0.95, 0.97, 0.3),
    "p > 0.88, shortened": (0.88, 0.92, 0.1),
}
"""Searches to try: ``stop_probability``, and ``target_probability`` and ``shorten`` of the step."""

CLAMPS = (4.0, 2.0)
"""Clamps to try, where a search went beyond them."""


class Tuning:
    """Trial edits, question by question: layer, one layer or several, search, clamp.

    Each question is settled before the next one, by single edits of the same facts. What is settled holds in the
    trials after it.

    Args:
        module: Whose model and options are tuned.
        requests: Facts with a true target.
        edits: Number of facts to edit in each trial.
        layers: Layers to try. ``None`` (default): six, from the lowest one to the middle of the model.
        seconds: How long trials may take; a trial is begun only if it is likely to end in time.

    Raises:
        OptionError: If there are too few facts.
    """

    def __init__(
        self,
        module: RomeModule,
        requests: Sequence[EditRequest],
        edits: int = 20,
        layers: Sequence[int] | None = None,
        seconds: float = math.inf,
    ) -> None:
        self._module, self._seconds, self._started = module, seconds, time.monotonic()
        self.language_model: LanguageModel = module.load()
        self.seed: int = module.hparams["seed"]
        self.facts, self.n_known, self.n_asked = known_first(self.language_model, requests, edits, self.seed)
        if len(self.facts) < FEWEST:
            raise OptionError(
                f"data: {len(self.facts)} of the records are facts with a true and a new target; a trial needs "
                f"{FEWEST}, better 20 or more"
            )
        self.layers = self._candidates() if layers is None else list(layers)
        self.trials: list[SettingScores] = []
        self.choices: list[Choice] = []
        self.left_out: list[str] = []
        self.base: dict[str, ProbeScores] = {}
        self.options: dict[str, Any] = {}

    def run(self, device: torch.device) -> None:
        """Try and choose.

        Args:
            device: Where the model runs.

        Raises:
            StatisticsError: If second moments cannot be found or computed.
        """
        self.language_model.model.to(device)
        self._prepare(self.layers)
        self._ask("layer", {str(layer): {"layers": [layer]} for layer in self.layers}, device)
        layer = self.options["layers"][0]
        several = list(range(max(0, layer - 4), layer + 1))
        if len(several) > 1:
            self._prepare(several)
            spread = {"layers": several, "preset": "lifelong"}
            self._ask("layers", {f"{several[0]} to {layer}, shared": spread}, device, f"{layer} alone")
        now = self._search()
        others = {name: _search_options(*search) for name, search in SEARCHES.items() if search != now}
        present = next((name for name, search in SEARCHES.items() if search == now), "as configured")
        self._ask("search", others, device, present)
        longest = self.choices[-1].chosen.longest or 0.0
        clamps = {f"{clamp:g} norms": {"clamp_norm_factor": clamp} for clamp in CLAMPS if clamp < longest}
        if clamps:
            self._ask("clamp", clamps, device, f"{self._module.hparams['clamp_norm_factor']:g} norms")

    def config(self) -> dict[str, Any]:
        """Options of :class:`rome_pl.RomeModule`, as a configuration writes them: those that are not the default."""
        given = {**self._module.hparams, **self.options}
        given.pop("optimizer", None)
        defaults = inspect.signature(RomeModule).parameters
        found = {"pretrained": given["pretrained"], "layers": given["layers"]}
        for name, value in given.items():
            if name not in found and name != "sequential_edit" and value != defaults[name].default:
                found[name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        described = describe_optimizer(self.options.get("optimizer", self._module.optimizer_class))
        return found if described == describe_optimizer(PolyakStep) else {**found, "optimizer": described}

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._started

    @property
    def base_scores(self) -> dict[str, Entry]:
        """The scores of the unedited model."""
        found = score_setting(SettingScores("", "unedited"), self.base, self.base)
        return {name: found.scores[name] for name in RATES}

    def _ask(
        self, question: str, settings: Mapping[str, Mapping[str, Any]], device: torch.device, now: str = ""
    ) -> None:
        """Try settings, and keep the best one.

        Args:
            question: What they answer.
            settings: Options by name.
            device: Where the model runs.
            now: Name of what is settled so far, which takes part. Empty: nothing is.
        """
        tried = []
        if now:
            last = self.choices[-1].chosen
            tried.append(SettingScores(question, now, {}, *_measured(last)))
        for name, options in settings.items():
            expected = max((trial.seconds for trial in self.trials), default=0.0)
            if tried and expected > self._seconds - self.elapsed:
                self.left_out.append(f"{question} {name}")
                continue
            found = self._try(SettingScores(question, name, options), device)
            self.trials.append(found)
            tried.append(found)
            log.info("%s %s: %s", question, name, ", ".join(f"{rate} {_shown(found.scores[rate])}" for rate in RATES))
        choice = choose(tried)
        self.options |= choice.chosen.options
        self.choices.append(choice)
        log.info("%s", choice.verdict)

    def _try(self, setting: SettingScores, device: torch.device) -> SettingScores:
        started = time.monotonic()
        options = {**self._module.hparams, "optimizer": self._module.optimizer_class, **self.options, **setting.options}
        for name in ("pretrained", "keep_original_weight", "chat"):
            options.pop(name)
        options |= {"sequential_edit": False, "on_error": "skip", "retries": []}
        module = RomeModule.from_language_model(self.language_model, **options)
        reading = _Reading()
        callbacks: list[Callback] = [
            RepresentationCheck(),
            RankOneWriter(),
            Verification(),
            ProbeEvaluation(measure_perplexity=False),
            reading,
            EditCommit(),
        ]
        fit_inside(module, request_loader(self.facts, BATCH, by_length=True), callbacks, device)
        session = session_of(module)
        self.base = self.base or dict(session.measured.base_scores)
        edits = session.edits
        return score_setting(
            setting,
            {edit.name: edit.scores["immediate"] for edit in edits if "immediate" in edit.scores},
            self.base,
            divergence=reading.mean,
            longest=max(reading.lengths, default=None),
            evaluations=sum(len(edit.steps) for edit in edits) / max(1, len(edits)),
            applied=sum(edit.status is EditStatus.APPLIED for edit in edits),
            seconds=time.monotonic() - started,
        )

    def _candidates(self) -> list[int]:
        """Six layers from the lowest to the middle; those that cannot be edited are left out."""
        depth = len(decoder_layers(self.language_model.model)[1])
        highest = max(1, depth // 2)
        wanted = sorted({round(place * (highest - 1) / 5) for place in range(6)})
        found = []
        for layer in wanted:
            try:
                find_site(self.language_model.model, layer)
            except UnsupportedModelError as error:
                log.warning("Left out of the trials: %s", error)
                continue
            found.append(layer)
        return found

    def _prepare(self, layers: Sequence[int]) -> None:
        """Find or compute second moments of keys, in one pass."""
        hparams = self._module.hparams
        adjust = hparams["mom2_adjustment"]
        if PRESETS[hparams["preset"]].mom2_adjustment if adjust is None else adjust:
            statistics_files(
                self.language_model,
                [find_site(self.language_model.model, layer) for layer in layers],
                statistics=hparams["statistics"],
                corpus=hparams["corpus"],
                wanted=hparams["mom2_n_samples"],
                seed=hparams["seed"],
            )

    def _search(self) -> tuple[float, float, float] | None:
        """The configured search as :data:`SEARCHES` has it; ``None`` if its optimiser is another."""
        optimizer = _instance(self._module.optimizer_class)
        if not isinstance(optimizer, PolyakStep):
            return None
        group = optimizer.param_groups[0]
        return (self._module.hparams["stop_probability"], group["target_probability"], group["shorten"])


class _Reading(Callback):
    """Measures what the first edits of a trial do to ordinary text, and how long their offsets are."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self.lengths: list[float] = []

    @property
    def mean(self) -> float | None:
        """Mean divergence for an edit, in nats."""
        return sum(self.found) / len(self.found) if self.found else None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        made = [edit for edit in edits_of(outputs) if in_force(edit)]
        for edit in made[: READ - len(self.found)]:
            self.found.append(divergence_alone(session_of(pl_module), edit, held_out_text(), 1))
        for edit in made:
            if (value := edit.search.value) is not None and (delta := edit.search.delta) is not None:
                self.lengths.append(float(delta.norm() / (value - delta).norm()))  # in norms of the original value


def known_first(
    language_model: LanguageModel, requests: Sequence[EditRequest], number: int, seed: int
) -> tuple[list[EditRequest], int, int]:
    """Choose facts to edit: a seeded sample of those that the model knows, then of the others.

    A fact is known if greedy decoding gives its true target.

    Args:
        language_model: The model.
        requests: The requests; those without a true target are left out.
        number: How many facts.
        seed: Seed of the sample.

    Returns:
        The facts in the order of the requests, how many of them are known, and how many the model was asked for.
    """
    able = [request for request in requests if request.target_true is not None]
    asked = sample_requests(able, 4 * number, seed)
    rows = [
        language_model.encoder.continuation(request.prompt, request.target_true or "", request, "prompt")
        for request in asked
    ]
    answers = measure_answers(language_model, rows)
    known = [request for request, answer in zip(asked, answers, strict=True) if answer.generated]
    others = [request for request, answer in zip(asked, answers, strict=True) if not answer.generated]
    first = sample_requests(known, number, seed)
    chosen = {id(request) for request in [*first, *sample_requests(others, number - len(first), seed)]}
    return [request for request in asked if id(request) in chosen], len(first), len(asked)


def describe_optimizer(optimizer_class: OptimizerCallable) -> dict[str, Any]:
    """Class and arguments of an optimiser, as a configuration writes them; defaults and the rate are left out."""
    made = _instance(optimizer_class)
    default = _instance(type(made)).param_groups[0]
    package = "rome_pl" if isinstance(made, PolyakStep) else type(made).__module__
    arguments = {
        name: value
        for name, value in made.param_groups[0].items()
        if name not in ("params", "lr") and value != default[name]
    }
    return {"class_path": f"{package}.{type(made).__name__}"} | ({"init_args": arguments} if arguments else {})


def _instance(optimizer_class: Callable[..., Optimizer]) -> Optimizer:
    """An optimiser of one number, to see what it is."""
    return optimizer_class(cast(Iterable[Any], [torch.zeros(1, requires_grad=True)]))


def _search_options(stop: float, target: float, shorten: float) -> dict[str, Any]:
    return {
        "stop_probability": stop,
        "optimizer": lambda params: PolyakStep(params, target_probability=target, shorten=shorten),
    }


def _measured(found: SettingScores) -> tuple[Any, ...]:
    """What a trial measured, as further arguments of :class:`SettingScores`."""
    return (
        found.scores,
        found.worths,
        found.divergence,
        found.longest,
        found.evaluations,
        found.applied,
        found.seconds,
    )


def _shown(found: Entry) -> str:
    return "unknown" if found["value"] is None else f"{found['value']:.3f}"
