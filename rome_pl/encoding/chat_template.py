"""Prompts inside a model's chat template.

A template turns messages into one text. Its text around the user's message, and between the prompt and the answer, is
found once, by rendering marks in place of the two. A template may also change a prompt, so every prompt is rendered and
compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rome_pl.errors import OptionError, RomeError

__all__ = ["ChatForm", "PromptFrame", "TemplateError", "frame_for"]

_PROMPT, _ANSWER = "\ue000", "\ue001"
"""Marks: characters for private use, which no template writes."""


class TemplateError(RomeError):
    """A text that a chat template drops or changes."""


@dataclass(frozen=True)
class ChatForm:
    """How a prompt becomes a conversation.

    Args:
        system: The system message. ``None`` (default): the template decides.
        instruction: The user's message. The reply then begins with the prompt, which suits prompts that are half a
            sentence. ``None`` (default): the prompt is the user's message, and the answer begins the reply.
        switches: Further arguments of the template, such as ``enable_thinking: false`` or a ``date_string``.
    """

    system: str | None = None
    instruction: str | None = None
    switches: dict[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """Return plain values for manifests."""
        return asdict(self)


@dataclass(frozen=True)
class PromptFrame:
    """The text that a chat template writes around a prompt; by default none.

    Args:
        head: Text before the prompt.
        tail: Text between the prompt and the answer.
        gap: Text that joins the answer to the text before it. ``None`` (default): the prompt's last character decides.
        tokenizer: The tokenizer with the template.
        form: How prompts become conversations. ``None`` (default): prompts stay as they are.
    """

    head: str = ""
    tail: str = ""
    gap: str | None = None
    tokenizer: Any = None
    form: ChatForm | None = None

    @property
    def special(self) -> bool:
        """Whether the tokenizer adds its own first and last tokens; a template has written them already."""
        return self.form is None

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that tell frames apart, for manifests; none for plain prompts."""
        return () if self.form is None else (self.head, self.tail, repr(self.gap))

    def check(self, prompt: str) -> None:
        """Make sure that the template leaves a prompt as it is.

        Raises:
            TemplateError: If it does not.
        """
        if self.form is not None and self.form.instruction is None:
            rendered = _render(self.tokenizer, self.form, [_user(self.form, prompt)], opened=True)
            if rendered != self.head + prompt + self.tail:
                raise TemplateError(
                    f"the chat template does not show {prompt!r} as it is, so where its words stand is not known; "
                    "reword the prompt, or leave chat out"
                )


def frame_for(tokenizer: Any, form: ChatForm | None) -> PromptFrame:
    """Find the text around every prompt.

    Args:
        tokenizer: A tokenizer of the transformers library, with the template.
        form: How prompts become conversations. ``None``: prompts stay as they are.

    Raises:
        OptionError: If there is no template, it refuses the messages, or it drops the user's.
    """
    if form is None:
        return PromptFrame()
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
        return PromptFrame(opened, "", None, tokenizer, form)
    if opened.count(_PROMPT) != 1:
        raise OptionError(
            "chat: the chat template drops the user's message, so the subject is lost"
            if _PROMPT not in opened
            else "chat: the chat template writes the user's message more than once; give chat.instruction"
        )
    head, tail = opened.split(_PROMPT)
    answered = _render(tokenizer, form, [user, {"role": "assistant", "content": _ANSWER}], opened=False)
    before = answered.partition(_ANSWER)[0]
    # Some templates write more before an answer than before the beginning of a reply, such as a train of thought. They
    # do not tell what joins the two, so the rule for plain prompts decides.
    gap = before.removeprefix(opened) if before.startswith(opened) and _ANSWER in answered else None
    return PromptFrame(head, tail, gap, tokenizer, form)


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
