"""An edit request: one fact to rewrite, as validated text.

This module does not depend on tokens, tensors or files. Braces are plain text; only CounterFact's rewrite template (see
:mod:`rome_pl.requests.record_forms`) has a placeholder.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any

from rome_pl.errors import RomeError, shortened
from rome_pl.requests.clean_text import cut_edges, no_answer, note_of_cut, unreadable
from rome_pl.requests.subject_search import find_alike, hint_of_difference, locate_subject
from rome_pl.requests.words import character_edges

__all__ = ["EditRequest", "Probe", "RequestError", "locate_subject"]

MOST_BITS = 256
"""Most digits of a number that names a record."""


class RequestError(RomeError):
    """A request that cannot be edited. The message names the field and tells what to do.

    Args:
        field: Name of the invalid field, as the user wrote it.
        message: The fault, and how to fix it.
        case_id: Identifier of the record, if it has one.
        source: File (and line) or data set of the record.
    """

    def __init__(
        self, field: str, message: str, *, case_id: str | int | None = None, source: str | None = None
    ) -> None:
        self.field, self.message, self.case_id, self.source = field, message, case_id, source
        super().__init__(str(self))

    def __str__(self) -> str:
        place = ", ".join(
            part
            for part in (
                self.source,
                f"record {str(self.case_id)[:80]}" if self.case_id is not None else None,
                f"field '{self.field}'",
            )
            if part
        )
        return f"{place}: {self.message}"


@dataclass(frozen=True)
class Probe:
    """A prompt with an answer of its own.

    Args:
        prompt: Text that ends right before the answer.
        answer: The expected answer.
        kind: Kind of test, such as KnowEdit's ``Reasoning``, for reports.
    """

    prompt: str
    answer: str
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One fact to rewrite.

    White space and invisible characters at the edges of its texts are cut off, see :mod:`rome_pl.requests.clean_text`.

    Args:
        prompt: Text that ends right before the answer, with the subject in it.
        subject: The entity whose fact changes, exactly as in the prompt. If it is not there, but one text that looks
            the same is, that text becomes the subject; see :mod:`rome_pl.requests.subject_search`.
        target_new: The answer that the edited model should give. White space at its beginning requests a space before
            it.
        target_true: The answer before the edit; scores ES, PS and NS need it. Empty text and EasyEdit's
            ``<|endoftext|>`` stand for ``None``.
        paraphrases: Other prompts about the same fact, expected to give ``target_new`` too.
        neighbours: Prompts about other subjects, expected to keep ``target_true``.
        locality: Unrelated prompts with their answers; the model's predictions should not change. Here and in
            ``portability``, prompts without an answer are left out.
        portability: Prompts whose answers follow from the new fact.
        generation_prompts: Openings about the subject that the model continues, for fluency.
        references: Texts about the subject under the new fact, for consistency.
        subject_span: Character span of the subject in the prompt; overrides the search.
        target_space: Whether a space joins a prompt and a target. ``None`` (default): text and tokenizer decide.
        case_id: Identifier in results and ledger: a number, or text that is not ``all`` and has no comma.
        relation: Identifier of the relation, for reports.
        source: File or data set of the record, for error messages.
        notes: Texts that were cut off, left out or matched by likeness. Set by this class, and ignored in comparisons.
        space_in_text: Whether ``target_space`` is true only because ``target_new`` began with white space. A chat
            template then overrides it.

    Raises:
        RequestError: If a field is empty, of the wrong type or not encodable, or the subject is not in the prompt.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    paraphrases: Sequence[str] = ()
    neighbours: Sequence[str] = ()
    locality: Sequence[Probe] = ()
    portability: Sequence[Probe] = ()
    generation_prompts: Sequence[str] = ()
    references: Sequence[str] = ()
    subject_span: tuple[int, int] | None = None
    target_space: bool | None = None
    case_id: str | int = 0
    relation: str | None = None
    source: str | None = None
    notes: tuple[str, ...] = field(default=(), init=False, compare=False)
    space_in_text: bool = field(default=False, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._check_names()
        notes: list[str] = []
        for name in ("prompt", "subject", "target_new", "target_true"):
            if name != "target_true" or self.target_true is not None:
                self._check_text(name, getattr(self, name))
        given = self._given_span()
        if self.target_space is None and any(map(str.isspace, cut_edges(self.target_new)[0])):
            self._set("target_space", True)
            self._set("space_in_text", True)
        elif not isinstance(self.target_space, bool | None):
            raise self.error("target_space", f"expected true, false or nothing, got {shortened(self.target_space)}")
        cut = len(cut_edges(self.prompt)[0])
        if self.target_true is not None and no_answer(self.target_true):
            notes.append(f"target_true: {self.target_true!r} is taken for none")
            self._set("target_true", None)
        for name in ("prompt", "subject", "target_new", "target_true"):
            if getattr(self, name) is not None:
                self._set(name, self._clean(name, getattr(self, name), notes))
        if self.target_true == self.target_new:
            raise self.error("target_new", "equals target_true: there is nothing to change")
        for name in ("paraphrases", "neighbours", "generation_prompts", "references"):
            texts = self._list(name)
            for text in texts:
                self._check_text(name, text)
            self._set(name, tuple(self._clean(name, text, notes) for text in texts))
        for name in ("locality", "portability"):
            probes = [self._probe(name, probe, notes) for probe in self._list(name)]
            self._set(name, tuple(probe for probe in probes if probe is not None))
        self._set("subject_span", self._find(notes) if given is None else (given[0] - cut, given[1] - cut))
        self._set("notes", tuple(dict.fromkeys(notes)))

    def content(self) -> dict[str, Any]:
        """Return the request and its probes as plain values, without ``case_id``, notes and source."""
        others = ("source", "case_id", "notes", "space_in_text")
        return {name: value for name, value in asdict(self).items() if name not in others}

    @property
    def span(self) -> tuple[int, int]:
        """Character span ``(start, end)`` of the subject in the prompt."""
        assert self.subject_span is not None  # set by __post_init__
        return self.subject_span

    def noted(self, notes: Iterable[str]) -> "EditRequest":
        """Return the same request with more notes."""
        other = copy(self)
        other._set("notes", tuple(dict.fromkeys((*self.notes, *notes))))
        return other

    def error(self, field: str, message: str) -> RequestError:
        """Make an error about a field of this request."""
        return RequestError(field, message, case_id=self.case_id, source=self.source)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_names(self) -> None:
        """Check ``case_id`` and ``relation``."""
        name = self.case_id
        self._set("case_id", None)  # errors must not use it before it is checked
        if isinstance(name, bool) or not isinstance(name, int | str):
            raise self.error("case_id", f"expected a number or text, got {type(name).__name__}")
        if isinstance(name, str):
            self._check_text("case_id", name)
            name = cut_edges(name)[1]
            if not name or name == "all" or "," in name:
                raise self.error(
                    "case_id",
                    "is empty; give a number or text, or leave it out"
                    if not name
                    else f"{shortened(name)} cannot name a record: 'all' and commas have a meaning where undo and pick "
                    "name records",
                )
        elif name.bit_length() > MOST_BITS:
            raise self.error("case_id", "is a number of too many digits; give a shorter one, or text")
        self._set("case_id", name)
        if self.relation is not None:
            self._check_text("relation", self.relation)

    def _list(self, name: str) -> Sequence[Any]:
        prompts = getattr(self, name)
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
            raise self.error(name, f"expected a list of prompts, got {type(prompts).__name__}")
        return prompts

    def _probe(self, name: str, probe: object, notes: list[str]) -> Probe | None:
        if isinstance(probe, Mapping):
            if unknown := set(map(shortened, probe)) - {"'prompt'", "'answer'", "'kind'"}:
                raise self.error(name, f"unknown field {min(unknown)}; a probe has prompt, answer and kind")
            probe = Probe(probe.get("prompt", ""), probe.get("answer", ""), probe.get("kind") or "")
        if not isinstance(probe, Probe):
            raise self.error(name, f"expected prompts with answers, got {type(probe).__name__}")
        self._check_text(f"{name}.prompt", probe.prompt)
        self._check_text(f"{name}.answer", probe.answer)
        self._check_text(f"{name}.kind", probe.kind)
        prompt = self._clean(f"{name}.prompt", probe.prompt, notes)
        if no_answer(probe.answer):
            notes.append(f"{name}: a prompt whose answer is {probe.answer!r} was left out")
            return None
        return Probe(prompt, self._clean(f"{name}.answer", probe.answer, notes), probe.kind)

    def _check_text(self, name: str, value: object) -> None:
        if not isinstance(value, str):
            quotes = "; put it in quotes" if isinstance(value, bool | int | float | date) else ""
            raise self.error(name, f"expected text, got {type(value).__name__}{quotes}")
        if (reason := unreadable(value)) is not None:
            raise self.error(name, reason)

    def _clean(self, name: str, text: str, notes: list[str]) -> str:
        """Cut a text's edges, and note what was cut off."""
        head, core, tail = cut_edges(text)
        if not core:
            raise self.error(name, "is empty; give the text or remove the record")
        if head or tail:
            notes.append(note_of_cut(name, head, tail))
        return core

    def _given_span(self) -> tuple[int, int] | None:
        """The given span of the subject in the prompt, without the edges that are cut off."""
        if self.subject_span is None:
            return None
        edges = tuple(self.subject_span) if isinstance(self.subject_span, Sequence) else ()
        if len(edges) != 2 or not all(isinstance(edge, int) and not isinstance(edge, bool) for edge in edges):
            raise self.error(
                "subject_span", f"expected two character positions [start, end], got {shortened(self.subject_span)}"
            )
        start, end = edges
        if not 0 <= start < end <= len(self.prompt):
            raise self.error(
                "subject_span",
                f"[{shortened(start)}, {shortened(end)}] lies outside the prompt of {len(self.prompt)} characters",
            )
        head, core, _ = cut_edges(self.prompt[start:end])
        if core != cut_edges(self.subject)[1]:
            covered, subject = shortened(self.prompt[start:end]), shortened(self.subject)
            raise self.error("subject_span", f"covers {covered}, but the subject is {subject}")
        start += len(head)
        if not {start, start + len(core)} <= character_edges(self.prompt):
            raise self.error(
                "subject_span", "cuts a character in half: a letter from its accent, or a part of an emoji"
            )
        return start, start + len(core)

    def _find(self, notes: list[str]) -> tuple[int, int]:
        """Find the subject's span in the prompt."""
        if (span := locate_subject(self.prompt, self.subject)) is not None:
            return span
        span, found = find_alike(self.prompt, self.subject)
        if span is None:
            several = ", and several texts there look like it" if found else ""
            hint = hint_of_difference(self.prompt, self.subject, found)
            raise self.error(
                "subject",
                f"{shortened(self.subject)} does not occur in the prompt {shortened(self.prompt)}{several}"
                + (f" ({hint})" if hint else "")
                + "; write it exactly as in the prompt, or give subject_span",
            )
        notes.append(f"subject: found by what looks alike: {hint_of_difference(self.prompt, self.subject, found)}")
        self._set("subject", self.prompt[slice(*span)])
        return span
