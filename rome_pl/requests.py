"""What a user asks for: one fact to rewrite, as validated text.

Nothing here knows tokens, tensors or files. Braces in any text are plain text; only CounterFact's rewrite template
(see :mod:`rome_pl.records`) has a placeholder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rome_pl.errors import RomeError

__all__ = ["EditRequest", "Probe", "RequestError", "locate_subject"]


class RequestError(RomeError):
    """A request that cannot be edited, with the field at fault and what to do about it.

    Args:
        field: Name of the field at fault, as the user wrote it.
        message: What is wrong and how to mend it.
        case_id: Identifier of the record, if it has one.
        source: File (and line) or data set that the record came from.
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
                f"record {self.case_id}" if self.case_id is not None else None,
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
        answer: What is wanted after it.
        kind: What it tests, such as KnowEdit's ``Reasoning``, for reports.
    """

    prompt: str
    answer: str
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One fact to rewrite.

    Args:
        prompt: Text that ends right before the answer, with the subject in it.
        subject: The entity whose fact changes, exactly as it stands in the prompt.
        target_new: The answer the edited model shall give.
        target_true: The answer before the edit; scores ES, PS and NS need it.
        paraphrases: Other prompts about the same fact, expected to give ``target_new`` too.
        neighbours: Prompts about other subjects, expected to keep ``target_true``.
        locality: Unrelated prompts with their answers, expected to stay as the unedited model has them.
        portability: Prompts whose answers follow from the new fact.
        generation_prompts: Openings about the subject that the model continues, for fluency.
        references: Texts about the subject under the new fact, for consistency.
        subject_span: Character span of the subject in the prompt; overrides the search.
        target_space: Whether a space joins a prompt and a target; ``None`` decides from text and tokenizer.
        case_id: Identifier that results and ledger carry.
        relation: Identifier of the relation, for reports.
        source: Where the record came from, for error messages.

    Raises:
        RequestError: If a field is empty or of the wrong type, or the subject is not in the prompt.
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

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new"):
            self._check_text(name, getattr(self, name))
        if self.target_true is not None:
            self._check_text("target_true", self.target_true)
            if self.target_true.strip() == self.target_new.strip():
                raise self.error("target_new", "equals target_true: there is nothing to change")
        for name in ("paraphrases", "neighbours", "generation_prompts", "references"):
            prompts = self._list(name)
            for prompt in prompts:
                self._check_text(name, prompt)
            object.__setattr__(self, name, tuple(prompts))
        for name in ("locality", "portability"):
            object.__setattr__(self, name, tuple(self._probe(name, probe) for probe in self._list(name)))
        if self.target_space is not None and not isinstance(self.target_space, bool):
            raise self.error("target_space", f"expected true, false or nothing, got {self.target_space!r}")
        object.__setattr__(self, "subject_span", self._resolve_span())

    def content(self) -> dict[str, Any]:
        """What it asks for and is measured on, in plain values; without its number and where it was read."""
        return {name: value for name, value in asdict(self).items() if name not in ("source", "case_id")}

    @property
    def span(self) -> tuple[int, int]:
        """Character span ``(start, end)`` of the subject in the prompt."""
        assert self.subject_span is not None  # set by __post_init__
        return self.subject_span

    def error(self, field: str, message: str) -> RequestError:
        """An error that carries this request's identity."""
        return RequestError(field, message, case_id=self.case_id, source=self.source)

    def _list(self, name: str) -> Sequence[Any]:
        prompts = getattr(self, name)
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise self.error(name, f"expected a list of prompts, got {type(prompts).__name__}")
        return prompts

    def _probe(self, name: str, probe: object) -> Probe:
        if isinstance(probe, Mapping):
            if unknown := set(map(str, probe)) - {"prompt", "answer", "kind"}:
                raise self.error(name, f"unknown field '{min(unknown)}'; a probe has prompt, answer and kind")
            probe = Probe(probe.get("prompt", ""), probe.get("answer", ""), probe.get("kind", ""))
        if not isinstance(probe, Probe):
            raise self.error(name, f"expected prompts with answers, got {type(probe).__name__}")
        self._check_text(f"{name}.prompt", probe.prompt)
        self._check_text(f"{name}.answer", probe.answer)
        return probe

    def _check_text(self, name: str, value: object) -> None:
        if not isinstance(value, str):
            raise self.error(name, f"expected text, got {type(value).__name__}")
        if not value.strip():
            raise self.error(name, "is empty; give the text or remove the record")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(name, "holds half a character (a lone surrogate), which no tokenizer reads") from None

    def _resolve_span(self) -> tuple[int, int]:
        if self.subject_span is None:
            span = locate_subject(self.prompt, self.subject)
            if span is None:
                raise self.error(
                    "subject",
                    f"{self.subject!r} does not occur in the prompt {self.prompt!r}; "
                    "write it exactly as in the prompt, or give subject_span",
                )
            return span
        edges = tuple(self.subject_span) if isinstance(self.subject_span, Sequence) else ()
        if len(edges) != 2 or not all(isinstance(edge, int) for edge in edges):
            raise self.error(
                "subject_span", f"expected two character positions [start, end], got {self.subject_span!r}"
            )
        start, end = edges
        if not 0 <= start < end <= len(self.prompt):
            raise self.error(
                "subject_span", f"[{start}, {end}] lies outside the prompt of {len(self.prompt)} characters"
            )
        if self.prompt[start:end] != self.subject:
            raise self.error("subject_span", f"covers {self.prompt[start:end]!r}, but the subject is {self.subject!r}")
        return start, end


def locate_subject(prompt: str, subject: str) -> tuple[int, int] | None:
    """Find the subject in the prompt: its last whole-word occurrence, else its last occurrence.

    Args:
        prompt: Text to search.
        subject: Text to find, case-sensitive.

    Returns:
        Character span ``(start, end)``, or ``None`` if the subject does not occur.

    Example:
        >>> locate_subject("Rome, the romance of Rome in Romea", "Rome")
        (21, 25)
    """
    last = last_whole = -1
    position = prompt.find(subject)
    while position >= 0:
        last = position
        end = position + len(subject)
        starts_word = position == 0 or not (prompt[position - 1].isalnum() and subject[0].isalnum())
        ends_word = end == len(prompt) or not (prompt[end].isalnum() and subject[-1].isalnum())
        if starts_word and ends_word:
            last_whole = position
        position = prompt.find(subject, position + 1)
    start = last_whole if last_whole >= 0 else last
    return None if start < 0 else (start, start + len(subject))
