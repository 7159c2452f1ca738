"""Editing without a config: the same module, data and callbacks behind one object."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import torch

from rome_pl.callbacks import Verification, default_callbacks
from rome_pl.data_modules.request_data import request_loader
from rome_pl.editing.edit import Edit
from rome_pl.editing.session import session_of
from rome_pl.errors import OptionError, named
from rome_pl.forward.generation import generate
from rome_pl.interop.case_files import easyedit_case
from rome_pl.interop.easyedit_arguments import EasyEditResult, accumulates, easyedit_requests, place_errors
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics.probes import MEASURED_TOGETHER, ProbeScores, measure_target, probe_scores
from rome_pl.model.devices import check_device
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.loading import load_language_model
from rome_pl.modules.embedded_fit import fit_inside
from rome_pl.modules.rome_module import RomeModule
from rome_pl.requests.edit_request import EditRequest
from rome_pl.utils.did_you_mean import did_you_mean
from rome_pl.utils.restored_state import differentiable, undisturbed

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
        says_target: Whether that begins with the new answer. Before an edit: whether it held already.
    """

    target_new: float
    target_true: float | None
    continuation: str
    says_target: bool


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

    @differentiable()
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
        source: str | os.PathLike[str] | tuple[Any, Any],
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
            device: Where the model runs. ``None`` (default): a GPU if there is one. A given pair stays where it is.
            allow_pickle: Whether weights that do not come as safetensors may be read.
            options: Options of :class:`RomeModule`.

        Raises:
            OptionError: If a loaded model is given without its tokenizer, or together with a precision or device, or
                the device is not here.
            SourceError: If the source cannot be loaded.
            UnsupportedModelError: If the MLP at the rewrite layer cannot be edited.
        """
        if isinstance(source, tuple):
            if dtype != "auto" or device is not None:
                raise OptionError("dtype and device are for sources to load; a given model keeps its own")
            return cls(LanguageModel(*source), **options)
        if not isinstance(source, str | os.PathLike):
            raise OptionError(
                "source: expected the name, folder or file of a model, or a pair (model, tokenizer), got "
                f"{type(source).__name__}"
            )
        chosen = check_device(device)
        language_model = load_language_model(source, dtype, allow_pickle)
        language_model.model.to(chosen)
        return cls(language_model, **options)

    @property
    def model(self) -> Any:
        """The model, with every edit made so far."""
        return self._language_model.model

    @overload
    def edit(
        self, prompt: str, subject: str, target_new: str, target_true: str | None = None, *, verify: bool = True,
        **others: Any,
    ) -> EditOutcome: ...  # fmt: skip

    @overload
    def edit(self, *, prompts: str | Sequence[str], verify: bool = True, **others: Any) -> EasyEditResult: ...

    @undisturbed()
    @differentiable()
    def edit(
        self,
        prompt: str | None = None,
        subject: Any = None,
        target_new: Any = None,
        target_true: str | None = None,
        *,
        verify: bool = True,
        **others: Any,
    ) -> EditOutcome | EasyEditResult:
        """Rewrite one fact; with EasyEdit's ``prompts`` in the place of ``prompt``, see :meth:`edit_many`.

        Args:
            prompt: Text that ends right before the answer, with the subject in it.
            subject: The entity whose fact changes, exactly as in the prompt.
            target_new: The answer the model shall give.
            target_true: The answer before; only measured.
            verify: Whether an edit that has not taken is undone: see :class:`rome_pl.callbacks.Verification`.
            others: Further fields of :class:`EditRequest`, such as ``subject_span`` or ``target_space``.

        Raises:
            RequestError: If the request is not valid.
            OptionError: If an argument is not known.
            EditRejectedError: If the edit failed or was refused; the model is as it was before.
        """
        if "prompts" in others:
            if prompt is not None or target_true is not None:
                raise OptionError("prompts goes with ground_truth, and prompt with target_true")
            return self.edit_many(target_new=target_new, subject=subject, verify=verify, **others)
        if isinstance(prompt, list | tuple):
            raise OptionError("prompt is one text; several are prompts, with EasyEdit's other arguments")
        if unknown := sorted(set(others) - _FIELDS):
            near = did_you_mean(unknown[0], {*_FIELDS, "prompts"})
            raise OptionError(f"{named(unknown[0])}: no field of a request{near}")
        asked: dict[str, Any] = {"case_id": self._edited, **others}
        asked |= {"prompt": prompt, "subject": subject, "target_new": target_new, "target_true": target_true}
        request = EditRequest(**asked)
        self._edited += 1
        before = self._measure(request)
        (edit,) = self._run([request], verify)
        if edit.status is not EditStatus.APPLIED:
            raise EditRejectedError(f"{edit.status}: {edit.reason}")
        return EditOutcome(before, self._measure(request), self.model, edit)

    @undisturbed()
    @differentiable()
    def edit_many(
        self,
        prompts: str | Sequence[str],
        target_new: str | Sequence[str],
        subject: str | Sequence[str],
        *,
        sequential_edit: bool | None = None,
        keep_original_weight: bool | None = None,
        verify: bool = True,
        **others: Any,
    ) -> EasyEditResult:
        """Rewrite several facts, one after the other, with the arguments and the return value of EasyEdit's ``edit``.

        What is measured before stands under ``pre``; ``post`` is measured with all of them in the model, or with its
        own alone where edits do not accumulate. A fact whose edit was refused is measured too; ``status`` says so, and
        ``reason`` why. ``held_already`` says whether a fact was applied that the model gave before.

        Args:
            prompts: Texts that end right before the answers; a text is a list of one, here and in the others.
            target_new: The answers that the model shall give.
            subject: The entities, each exactly as in its prompt.
            sequential_edit: Whether edits accumulate and stay, which they do unless this is ``False``: then each is
                made on the model as it is now, measured, and reverted.
            keep_original_weight: The opposite of it, by its older name.
            verify: Whether an edit that has not taken is undone: see :class:`rome_pl.callbacks.Verification`.
            others: ``ground_truth``, ``rephrase_prompts``, ``locality_inputs`` and ``portability_inputs``; see
                :func:`rome_pl.interop.easyedit_arguments.easyedit_requests`.

        Raises:
            RequestError: If a request is not valid, with argument and position; nothing was edited.
            OptionError: If an argument is not known or has no meaning here.
        """
        requests = easyedit_requests(prompts, target_new, subject, first=self._edited, **others)
        stay = accumulates(sequential_edit, keep_original_weight)
        for place, request in enumerate(requests):
            with place_errors(place):
                self._language_model.encoder.check_probes(request)
        self._edited += len(requests)
        own = {str(request.case_id) for request in requests} - set(self._names)  # one of that name may be there
        before = self._probe(requests)
        after: list[ProbeScores] = []
        edits: list[Edit] = []
        try:
            for group in [requests] if stay else [[request] for request in requests]:
                edits += self._run(group, verify)
                after += self._probe(group)
                if not stay:
                    self._take_out(own)
        except BaseException:  # also Ctrl-C: half of a list is not what was asked for
            self._take_out(own)
            raise
        metrics = [
            easyedit_case(edit, then, now)
            | {
                "case_id": place,
                "status": str(edit.status),
                "reason": edit.reason,
                "held_already": edit.held_already,
            }
            for place, (edit, then, now) in enumerate(zip(edits, before, after, strict=True))
        ]
        return EasyEditResult(metrics, self.model, lambda: self._take_out(own))

    @undisturbed()
    @differentiable()
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

    @property
    def _names(self) -> Sequence[str]:
        """Names of the edits that are in the model."""
        return self._module.session.layers.names if self._module.session is not None else ()

    @undisturbed()
    @differentiable()
    def _take_out(self, names: set[str]) -> None:
        """Undo those of some edits that are in the model."""
        if present := [name for name in self._names if name in names]:
            layers = session_of(self._module).layers
            layers.resume()
            layers.remove(present)

    def _probe(self, requests: Sequence[EditRequest]) -> list[ProbeScores]:
        """What is measured for requests, some at a time."""
        parts = (requests[start : start + MEASURED_TOGETHER] for start in range(0, len(requests), MEASURED_TOGETHER))
        return [scores for part in parts for scores in probe_scores(self._language_model, part)]

    def _run(self, requests: Sequence[EditRequest], verify: bool) -> list[Edit]:
        """Edit a stream of requests; the edits, whatever became of them."""
        chosen = default_callbacks(evaluate=False, watch=False)
        callbacks = [callback for callback in chosen if verify or not isinstance(callback, Verification)]
        fit_inside(self._module, request_loader(requests), callbacks, self._language_model.device)
        return session_of(self._module).edits

    def _measure(self, request: EditRequest) -> Measured:
        language_model = self._language_model
        new, true = (
            None
            if target is None
            else measure_target(language_model, language_model.encoder.continuation(request.prompt, target, request))
            for target in (request.target_new, request.target_true)
        )
        assert new is not None
        (text,) = generate(language_model, [request.prompt.rstrip(" ")], 8)
        return Measured(new.probability, true.probability if true is not None else None, text, new.greedy)


_FIELDS = {field.name for field in fields(EditRequest) if field.init} - {"source"}
