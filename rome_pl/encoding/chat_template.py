"""Prompts inside a model's chat template.

A template turns messages into one text. What it writes around the user's message, and between the end of the prompt and
the answer, is found once, by rendering marks in their places; every prompt is rendered too and compared, since a
template may change what it is given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rome_pl.errors import OptionError, RomeError

__all__ = ["ChatForm", "ChatFrame", "PlainFrame", "TemplateError", "frame_for"]

_PROMPT, _ANSWER = "\ue000", "\ue001"
"""Marks: characters for private use, which no template writes."""


class TemplateError(RomeError):
    """A text that a chat template drops or changes."""


@dataclass(frozen=True)
class ChatForm:
    """How a prompt becomes a conversation.

    Args:
        system: The system message; nothing leaves it to the template.
        instruction: Nothing makes the prompt the user's message, and an answer the beginning of the reply. A text is
            the user's message in its place, and the reply begins with the prompt: for prompts that are half a sentence.
        switches: Further arguments of the template, such as ``enable_thinking: false`` or a ``date_string``.
    """

    system: str | None = None
    instruction: str | None = None
    switches: dict[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """Plain values for manifests."""
        return asdict(self)


@dataclass(frozen=True)
class PlainFrame:
    """Prompts as they are."""

    head: str = ""
    tail: str = ""
    gap: str | None = None
    special: bool = True
    texts: tuple[str, ...] = ()

    def check(self, prompt: str) -> None:
        """Every prompt is itself."""


@dataclass(frozen=True)
class ChatFrame:
    """What a template writes around a prompt.

    Args:
        head: Text before it.
        tail: Text between it and the answer.
        gap: What joins the answer to the text before it; ``None`` leaves that to the prompt's last character.
        special: Whether the tokenizer adds its own first and last tokens; the template has written them already.
    """

    head: str
    tail: str
    gap: str | None
    tokenizer: Any
    form: ChatForm
    special: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """What tells frames apart."""
        return (self.head, self.tail, repr(self.gap))

    def check(self, prompt: str) -> None:
        """Make sure that the template leaves a prompt as it is.

        Raises:
            TemplateError: If it does not.
        """
        if self.form.instruction is None:
            rendered = _render(self.tokenizer, self.form, [_user(self.form, prompt)], opened=True)
            if rendered != self.head + prompt + self.tail:
                raise TemplateError(
                    f"the chat template does not show {prompt!r} as it is, so where its words stand is not known; "
                    "reword the prompt, or leave chat out"
                )


def frame_for(tokenizer: Any, form: ChatForm | None) -> PlainFrame | ChatFrame:
    """What stands around every prompt.

    Args:
        tokenizer: A tokenizer of the transformers library, with the template.
        form: How prompts become conversations; nothing leaves them as they are.

    Raises:
        OptionError: If there is no template, it refuses the messages, or it drops the user's.
    """
    if form is None:
        return PlainFrame()
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError(
            "chat: this model's tokenizer has no chat template (chat_template.jinja or tokenizer_config.json); choose "
            "an instruct model, or leave chat out"
        )
    user = _user(form, _PROMPT)
    opened = _render(tokenizer, form, [user], opened=True)
    if form.instruction is not None:
        if form.instruction.strip() not in opened:
            raise OptionError("chat.instruction: the chat template drops the user's message")
        return ChatFrame(opened, "", None, tokenizer, form)
    if opened.count(_PROMPT) != 1:
        raise OptionError(
            "chat: the chat template drops the user's message, so the subject is lost"
            if _PROMPT not in opened
            else "chat: the chat template writes the user's message more than once; give chat.instruction"
        )
    head, tail = opened.split(_PROMPT)
    answered = _render(tokenizer, form, [user, {"role": "assistant", "content": _ANSWER}], opened=False)
    before = answered.partition(_ANSWER)[0]
    # Templates that write more before an answer than before the reply's beginning, such as a train of thought, do not
    # say what joins the two: there the rule for plain prompts decides.
    gap = before.removeprefix(opened) if before.startswith(opened) and _ANSWER in answered else None
    return ChatFrame(head, tail, gap, tokenizer, form)


def _user(form: ChatForm, prompt: str) -> dict[str, str]:
    return {"role": "user", "content": prompt if form.instruction is None else form.instruction}


def _render(tokenizer: Any, form: ChatForm, messages: Sequence[Mapping[str, str]], *, opened: bool) -> str:
    """The text of messages; ``opened`` with the beginning of a reply."""
    from jinja2 import TemplateError as JinjaError

    system = [{"role": "system", "content": form.system}] if form.system is not None else []
    try:
        text: str = tokenizer.apply_chat_template(
            [*system, *messages], tokenize=False, add_generation_prompt=opened, **form.switches
        )
    except (JinjaError, TypeError, ValueError) as error:
        raise OptionError(f"chat: the chat template refuses these messages or switches: {error}") from error
    return text
