"""Editing without a config: the same module, data and callbacks behind one object."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from rome_pl.callbacks import EditCommit, RankOneWriter, RepresentationCheck, Verification
from rome_pl.data_modules.request_data import request_loader
from rome_pl.edit import Edit, EditStatus
from rome_pl.edit_module import RomeModule
from rome_pl.errors import OptionError
from rome_pl.hooks import frozen
from rome_pl.language_model import LanguageModel, load_language_model
from rome_pl.metrics.probes import measure_target
from rome_pl.requests import EditRequest
from rome_pl.session import session_of

__all__ = ["EditOutcome", "EditRejectedError", "KnowledgeEditor", "Measured"]


class EditRejectedError(RuntimeError):
    """An edit that was refused; the model is as it was before."""


@dataclass(frozen=True)
class Measured:
    """What the model says at the rewrite prompt.

    Args:
        target_new: Probability of the new answer (geometric mean over its tokens).
        target_true: Probability of the old answer, if the request names it.
        continuation: What greedy decoding continues the prompt with.
    """

    target_new: float
    target_true: float | None
    continuation: str


@dataclass(frozen=True)
class EditOutcome:
    """An edit that was made.

    Args:
        before: What the model said before.
        after: What it says now.
        model: The edited model: the very object the editor holds.
        edit: Everything measured on the way.
    """

    before: Measured
    after: Measured
    model: Any
    edit: Edit


class KnowledgeEditor:
    """Edits a language model fact by fact; edits accumulate, and each can be undone.

    Args:
        language_model: The model.
        options: Options of :class:`RomeModule`, such as ``layers``, ``preset`` or ``corpus``.

    Example:
        >>> editor = KnowledgeEditor.from_pretrained("gpt2-xl")  # doctest: +SKIP
        >>> result = editor.edit("Ray Charles, the", subject="Ray Charles", target_new="violin")  # doctest: +SKIP
        >>> editor.undo(result)  # doctest: +SKIP
    """

    def __init__(self, language_model: LanguageModel, **options: Any) -> None:
        if "sequential_edit" in options:
            raise OptionError(
                "sequential_edit: edits of a KnowledgeEditor always accumulate; take one back with undo()"
            )
        self._module = RomeModule.from_language_model(language_model, sequential_edit=True, on_error="skip", **options)
        adopted = self._module.language_model  # with the form of prompts that the options ask for
        assert adopted is not None
        self._language_model = adopted
        self._edited = 0

    @classmethod
    def from_pretrained(
        cls,
        source: str | tuple[Any, Any],
        *,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        allow_pickle: bool = False,
        **options: Any,
    ) -> "KnowledgeEditor":
        """Load a model to edit.

        Args:
            source: Hub name, folder, GGUF file, ``package:NAME/FILE``, or a pair ``(model, tokenizer)``.
            dtype: Precision of the weights; ``auto`` takes the checkpoint's own.
            device: Where the model runs; nothing takes a GPU if there is one. A given pair stays where it is.
            allow_pickle: Whether weights that do not come as safetensors may be read.
            options: Options of :class:`RomeModule`.

        Raises:
            OptionError: If a loaded model is given together with a precision or device.
            SourceError: If the source cannot be loaded.
            UnsupportedModelError: If the model has no dense MLP at the rewrite layer.
        """
        if isinstance(source, tuple):
            if dtype != "auto" or device is not None:
                raise OptionError("dtype and device are for sources to load; a given model keeps its own")
            return cls(LanguageModel(*source), **options)
        language_model = load_language_model(source, dtype, allow_pickle)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        language_model.model.to(device)
        return cls(language_model, **options)

    @property
    def model(self) -> Any:
        """The model, with every edit made so far."""
        return self._language_model.model

    def edit(
        self,
        prompt: str,
        subject: str,
        target_new: str,
        target_true: str | None = None,
        *,
        verify: bool = True,
        **fields: Any,
    ) -> EditOutcome:
        """Rewrite one fact.

        Args:
            prompt: Text that ends right before the answer, with the subject in it.
            subject: The entity whose fact changes, exactly as in the prompt.
            target_new: The answer the model shall give.
            target_true: The answer before; only measured.
            verify: Whether an edit whose target stays unlikely is taken back.
            fields: Further fields of :class:`EditRequest`, such as ``subject_span`` or ``target_space``.

        Raises:
            RequestError: If the request is not valid.
            EditRejectedError: If the edit failed or was refused; the model is as it was before.
        """
        request = EditRequest(
            prompt=prompt, subject=subject, target_new=target_new, target_true=target_true,
            case_id=fields.pop("case_id", self._edited), **fields,
        )  # fmt: skip
        self._edited += 1
        before, device = self._measure(request), self._language_model.device
        callbacks: list[Callback] = [RepresentationCheck(), RankOneWriter(), EditCommit()]
        if verify:
            callbacks.insert(2, Verification())
        self._run(request, callbacks, device)
        edit = session_of(self._module).edits[-1]
        if edit.status is not EditStatus.APPLIED:
            raise EditRejectedError(f"{edit.status}: {edit.reason}")
        return EditOutcome(before, self._measure(request), self.model, edit)

    def undo(self, *results: EditOutcome) -> None:
        """Undo edits, in any order; without arguments, all of them.

        The others are replayed on the original weight, so undoing all gives the original bit for bit.

        Raises:
            KeyError: If an edit was undone before, or is not this editor's.
        """
        if self._module.session is None:
            raise KeyError("nothing was edited yet")
        layers = session_of(self._module).layers
        layers.resume()
        names = [result.edit.name for result in results] if results else layers.names
        layers.remove(names)

    def _run(self, request: EditRequest, callbacks: list[Callback], device: torch.device) -> None:
        with _quiet(), _interruptible():
            trainer = Trainer(
                max_epochs=1,
                accelerator=device.type,
                devices=[device.index or 0] if device.type == "cuda" else 1,
                callbacks=callbacks,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            try:
                trainer.fit(self._module, request_loader([request]))
            finally:
                self.model.to(device)  # the Trainer leaves the model on the CPU

    def _measure(self, request: EditRequest) -> Measured:
        language_model = self._language_model
        probabilities = [
            None
            if target is None
            else measure_target(
                language_model, language_model.encoder.continuation(request.prompt, target, request)
            ).probability
            for target in (request.target_new, request.target_true)
        ]
        assert probabilities[0] is not None
        row = language_model.encoder.prompt(request.prompt.rstrip(" "))
        ids = torch.tensor([row.ids], device=language_model.device)
        with frozen(language_model.model), torch.no_grad():
            out = language_model.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                repetition_penalty=1.0,
                max_new_tokens=8,
                pad_token_id=language_model.encoder.pad_id,
            )
        text = language_model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return Measured(probabilities[0], probabilities[1], text)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C stays what it is: Lightning would end the process and leave the signal ignored."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """No lines about hardware for every single edit."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
