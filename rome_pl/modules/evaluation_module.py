"""The LightningModule that evaluates: one batch is a list of requests whose probes are measured."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rome_pl.encoding.chat_template import ChatForm
from rome_pl.errors import OptionError
from rome_pl.ledger.replay import read_edits, read_manifest, read_writes, replay
from rome_pl.ledger.run import chat_of, run_folder
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics import ProbeScores, TextMeasure, held_out_text, measure_text, probe_scores
from rome_pl.metrics.fluency import Fluency, measure_fluency
from rome_pl.metrics.score_cache import KnownScores
from rome_pl.metrics.scores import record_values
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.loading import DEFAULT_SOURCE
from rome_pl.modules.language_model_module import LanguageModelModule
from rome_pl.modules.trainer_checks import check_precision
from rome_pl.requests.conflicts import touched_neighbours
from rome_pl.requests.edit_request import EditRequest, RequestError
from rome_pl.utils.distributed import check_strategy, gather
from rome_pl.write.edited_layers import EditedLayers

__all__ = ["EvaluationModule"]


class EvaluationModule(LanguageModelModule):
    """Measures requests on a model, by ``Trainer.predict``: an unedited one, one with a ledger's edits, or a saved one.

    Each step returns the scores of its requests by name; :attr:`scores` and :attr:`base_scores` have all that was
    measured. Several devices share the requests.

    Args:
        pretrained: Model: hub name, folder, GGUF file or ``package:NAME/FILE``.
        dtype: Precision of its weights; ``auto`` is the checkpoint's own.
        allow_pickle: Whether weights that are not safetensors may be read.
        chat: How prompts become conversations in the model's chat template. ``None`` (default): as in the ledger's
            run, if a ledger is given; else they stay plain text.
        ledger: Folder of a run of ``rome-pl edit`` whose edits are put into the model first.
        base: The unedited model that ``pretrained`` was edited from, for ``locality`` and the divergence; not with
            ``ledger``, which knows it.
        measure_perplexity: Whether held-out perplexity, and the divergence if there is a base, are measured.
        held_out: UTF-8 text for these. ``None`` (default): the shipped one.
        fluency_tokens: Tokens generated after each generation prompt for fluency and consistency; 0 measures neither.
        seed: Seed of the generation.
    """

    def __init__(
        self,
        pretrained: str = DEFAULT_SOURCE,
        dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto",
        allow_pickle: bool = False,
        chat: ChatForm | None = None,
        ledger: str | None = None,
        base: str | None = None,
        measure_perplexity: bool = True,
        held_out: str | None = None,
        fluency_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if ledger is not None and base is not None:
            raise OptionError("base: a ledger knows the model that it began with; give one of the two")
        if fluency_tokens < 0:
            raise OptionError(f"fluency_tokens: expected a number from 0 on, got {fluency_tokens}")
        self.unedited_model: LanguageModel | None = None
        self.layers: EditedLayers | None = None
        self.requests: list[EditRequest] = []
        self.refused: list[RequestError] = []
        self.scores: dict[str, ProbeScores] = {}
        self.base_scores: dict[str, ProbeScores] = {}
        self.text: dict[str, TextMeasure] = {}
        self.fluency: dict[str, Fluency] = {}
        self.seconds = 0.0
        self._touched: dict[str, tuple[bool, ...]] = {}

    @property
    def edited(self) -> bool:
        """Whether there are two models to compare."""
        return self.layers is not None or self.unedited_model is not None

    def load(self) -> LanguageModel:
        """Load the model, and the unedited one if there is one, on first use, also without a Trainer."""
        loaded = super().load()
        if self.unedited_model is None and self.hparams["base"] is not None:
            self.unedited_model = self._loaded(self.hparams["base"]).with_chat(loaded.chat)
            self.other = self.unedited_model.model  # registered, so that the Trainer moves it
        return loaded

    def setup(self, stage: str) -> None:
        """Check how the Trainer is set.

        Raises:
            OptionError: With the setting that works.
        """
        check_strategy(self.trainer.strategy)
        if stage != "predict":
            raise OptionError(f"models are evaluated by Trainer.predict, not by {stage}")
        check_precision(self.trainer)
        if self.hparams["measure_perplexity"]:
            held_out_text(self.hparams["held_out"])

    def begin(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """Put the ledger's edits in, and see which requests can be measured; the data module asks for it.

        Returns:
            The requests that can be measured, on all devices together.

        Raises:
            LedgerError: If the ledger is damaged or of another model.
        """
        model = self._language_model
        if self.hparams["ledger"] is not None and self.layers is None:
            self.layers = replay(model, self._run)
        self.requests, self.refused = [], []
        for request in requests:
            try:
                model.encoder.check_probes(request)
                self.requests.append(request)
            except RequestError as error:
                self.refused.append(error)
        if self.layers is not None:
            tried = [edit for edit in read_edits(self._run) if edit["status"] != EditStatus.SKIPPED]
            self._touched = touched_neighbours(self.requests, {edit["request"]["subject"] for edit in tried})
        return self.requests

    def on_predict_start(self) -> None:
        """Begin anew."""
        self.scores, self.base_scores, self.text, self.fluency = {}, {}, {}, {}
        self._started = time.monotonic()
        # Before anything is measured with its edits; what other runs have measured of it holds here.
        self._known = KnownScores(self.unedited_model or self._language_model)

    def predict_step(self, batch: list[EditRequest], batch_idx: int) -> dict[str, dict[str, float]]:
        """Measure requests; what each score of each is, by their names."""
        names = [str(request.case_id) for request in batch]
        with self._unedited():
            self.base_scores.update(self._mark(names, self._known.measure(batch)))
        if self.edited:
            scores = self._mark(names, probe_scores(self._language_model, batch))
        else:
            scores = {name: self.base_scores[name] for name in names}
        self.scores.update(scores)
        # Plain values: Lightning looks into what it collects, and refuses frozen dataclasses.
        return {name: record_values(found, self.base_scores[name]) for name, found in scores.items()}

    def on_predict_epoch_end(self) -> None:
        """Bring together what the devices have found, and measure text."""
        if self.trainer.world_size > 1:
            names = [str(request.case_id) for request in self.requests]  # intervals depend on the order of records
            found, base = (dict(gather(list(mine.items()))) for mine in (self.scores, self.base_scores))
            self.scores = {name: found[name] for name in names if name in found}
            self.base_scores = {name: base[name] for name in names if name in base}
        hparams = self.hparams
        if hparams["measure_perplexity"]:
            text = held_out_text(hparams["held_out"])
            with self._unedited() as unedited:
                self.text["base"] = measure_text(unedited, text)
            if self.edited:
                self.text["final"] = measure_text(self._language_model, text, self._unedited)
        if hparams["fluency_tokens"]:
            tokens, seed = hparams["fluency_tokens"], hparams["seed"]
            with self._unedited() as unedited:
                self.fluency["base"] = measure_fluency(unedited, self.requests, tokens, seed)
            if self.edited:
                self.fluency["final"] = measure_fluency(self._language_model, self.requests, tokens, seed)
        self.seconds = time.monotonic() - self._started

    def check(self) -> None:
        """Load what is needed, so that whatever is wrong comes to light before anything is measured or replaced.

        Raises:
            RomeError: If a model, the ledger or the text cannot be used.
        """
        self.load()
        if self.hparams["ledger"] is not None:
            read_writes(self._language_model, self._run)
        if self.hparams["measure_perplexity"]:
            held_out_text(self.hparams["held_out"])

    def _mark(self, names: Sequence[str], scores: Sequence[ProbeScores]) -> dict[str, ProbeScores]:
        """Scores by name; they know which of their prompts are about subjects that the ledger edits."""
        return {
            name: replace(found, touched=self._touched.get(name, ())) for name, found in zip(names, scores, strict=True)
        }

    @property
    def _run(self) -> Path:
        return run_folder(self.hparams["ledger"])

    @contextmanager
    def _unedited(self) -> Iterator[LanguageModel]:
        """The model without edits."""
        if self.layers is not None:
            with self.layers.unedited():
                yield self._language_model
        else:
            yield self.unedited_model or self._language_model

    def _adopt(self, language_model: LanguageModel) -> None:
        chat = self.hparams["chat"] or language_model.chat
        if chat is None and self.hparams["ledger"] is not None:
            chat = chat_of(read_manifest(self._run))
        super()._adopt(language_model.with_chat(chat))
        self._language_model.remember_weights()
