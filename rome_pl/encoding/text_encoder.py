"""From text to token ids, with lookup positions and target spans found by character offsets.

Ids and offsets are made once, from the joined text. Ids are never decoded and encoded again, which could turn targets
into other tokens. Every position is an index into the tokenizer's ids, BOS included if it adds one.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal, get_args

from rome_pl.encoding.chat_template import PromptFrame, TemplateError
from rome_pl.encoding.encoded_rows import EncodedEdit, EncodedRow
from rome_pl.encoding.target_space import joined_by_space
from rome_pl.errors import RomeError, shortened
from rome_pl.requests.clean_text import cut_edges
from rome_pl.requests.edit_request import EditRequest

__all__ = ["ENCODING_VERSION", "FactToken", "TextEncoder", "TokenizerError"]

ENCODING_VERSION = 2
"""Version of the rules by which texts become rows: how prompt and target are joined, how a row begins. Raise it with
every change of the rules, so that measurements and runs under other rules are not reused."""

FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]
"""The lookup token of an edit: the published strategies of ROME's ``fact_token``."""


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""Tokens for single bytes in tokenizers of the sentencepiece kind."""


class TokenizerError(RomeError):
    """A tokenizer that cannot be used."""


class TextEncoder:
    """Encodes requests and probes with one tokenizer.

    Args:
        tokenizer: A fast tokenizer of the transformers library.
        max_length: Longest row, in tokens, that the model can read.
        frame: The text around every prompt. ``None`` (default): none.
        embedded: Number of tokens with an embedding in the model. ``None`` (default): all of the tokenizer's.

    Raises:
        TokenizerError: If the tokenizer gives no character offsets.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        frame: PromptFrame | None = None,
        embedded: int | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TokenizerError(
                f"{type(tokenizer).__name__} gives no character offsets, which find the subject's tokens; "
                "load the fast tokenizer of this model (AutoTokenizer does where one exists)"
            )
        self.tokenizer = tokenizer
        self.max_length, self.frame, self.embedded = max_length, frame or PromptFrame(), embedded
        self.pad_id: int = tokenizer.pad_token_id or 0

    @property
    def opening(self) -> tuple[int, ...]:
        """Ids that the tokenizer puts before a text, such as BOS; ids after the text are not included.

        Models are trained on texts that begin like this. A row of :meth:`prompt` or :meth:`continuation` has them
        already, unless a chat template writes its own.
        """
        return leading_tokens(self.tokenizer)

    def edit(
        self,
        request: EditRequest,
        contexts: Sequence[str] = ("",),
        fact_token: FactToken = "subject_last",
        kl_position: Literal["subject", "last"] = "subject",
    ) -> EncodedEdit:
        """Encode every row that the optimisation of one edit needs.

        Args:
            request: The edit.
            contexts: Texts put before the prompt; the first must be empty (the bare prompt).
            fact_token: Which token is looked up.
            kl_position: Position of the divergence: the lookup token, as in the public code, or the end of "{subject}
                is a", as in the paper (Meng et al. 2022, Eq. 4).

        Raises:
            RequestError: If a row is longer than the model can read, or a target cannot be separated from its prompt.
        """
        if fact_token not in get_args(FactToken):
            raise ValueError(f"fact_token is {fact_token!r}; expected one of {get_args(FactToken)}")
        if not contexts or contexts[0]:
            raise ValueError("the first context must be the empty text: the bare prompt")
        rows = []
        for context in contexts:
            start, end = request.span[0] + len(context), request.span[1] + len(context)
            rows.append(self._row(request, context + request.prompt, (start, end), fact_token))
        # The row ends at the divergence's position, so a template's text after it does not matter.
        text = f"{self.frame.head}{request.subject} is a"
        ids, spans = self._encode(text)
        if len(ids) > self.max_length:
            raise request.error("subject", f"takes {len(ids)} tokens, but the model reads {self.max_length}")
        self._check_embedded(ids, request, "subject")
        lookup = self._lookup(request, text, spans, (0, len(request.subject)), len(ids), fact_token)
        first = lookup if kl_position == "subject" else len(ids) - 1
        return EncodedEdit(tuple(rows), EncodedRow(ids[: first + 1], lookup, (), first))

    def continuation(self, prompt: str, target: str, request: EditRequest, field: str = "prompt") -> EncodedRow:
        """Encode a prompt and the target after it; the lookup token is the prompt's last token.

        The edges of both texts are cut off as in :class:`EditRequest`.

        Raises:
            RequestError: Like :meth:`edit`, naming ``field``.
        """
        return self._row(request, cut_edges(prompt)[1] or prompt, None, "last", cut_edges(target)[1] or target, field)

    def prompt(self, text: str) -> EncodedRow:
        """Encode a text without a target; the lookup token is its last token.

        Raises:
            TemplateError: If a chat template changes the text.
        """
        self.frame.check(text)
        ids, _ = self._encode(self.frame.head + text + self.frame.tail)
        return EncodedRow(ids, len(ids) - 1, (), len(ids) - 1)

    def check_probes(self, request: EditRequest) -> None:
        """Encode every probe of a request, to find one that the model cannot read before any edit.

        Raises:
            RequestError: For the first probe that cannot be read.
        """
        for target in filter(None, (request.target_new, request.target_true)):
            self.continuation(
                request.prompt, target, request, "target_new" if target == request.target_new else "target_true"
            )
            for field in ("paraphrases", "neighbours"):
                for prompt in getattr(request, field):
                    self.continuation(prompt, target, request, field)
        for prompt in request.generation_prompts:
            ids, _ = self._encode(self._framed(prompt, request, "generation_prompts"))
            self._check_embedded(ids, request, "generation_prompts")
        for field in ("locality", "portability"):
            for probe in getattr(request, field):
                self.continuation(probe.prompt, probe.answer, request, field)

    def describe(self, request: EditRequest, fact_token: FactToken) -> tuple[str, str]:
        """Return the lookup token and the target of the bare prompt as text, for a reader."""
        row = self._row(request, request.prompt, request.span, fact_token)
        decode = self.tokenizer.decode
        return decode([row.ids[row.lookup]]), "|".join(decode([token]) for token in row.target)

    def _row(
        self,
        request: EditRequest,
        prompt: str,
        subject: tuple[int, int] | None,
        fact_token: FactToken,
        target: str | None = None,
        field: str = "target_new",
    ) -> EncodedRow:
        target = request.target_new if target is None else target
        text = self._framed(prompt, request, field)
        if self.frame.tail:  # a template writes text between the prompt and the target
            gap = self._gap_after(text, target, request)
        else:
            gap = " " if self._space_belongs(prompt, target, request.target_space) else ""
        ids, spans, boundary = self._encode_pair(text, gap + target, request, field)
        self._check_embedded(ids, request, field)
        if len(ids) - 1 > self.max_length:
            raise request.error(
                field, f"prompt and target take {len(ids)} tokens, but the model reads {self.max_length}; shorten them"
            )
        lookup = boundary - 1
        if subject is not None:
            lookup = self._lookup(request, text, spans, subject, boundary, fact_token)
        return EncodedRow(ids[:-1], lookup, ids[boundary:], boundary - 1)

    def _framed(self, prompt: str, request: EditRequest, field: str) -> str:
        """A prompt inside its frame."""
        try:
            self.frame.check(prompt)
        except TemplateError as error:
            raise request.error("prompt" if field.startswith("target") else field, str(error)) from error
        return self.frame.head + prompt + self.frame.tail

    def _gap_after(self, text: str, target: str, request: EditRequest) -> str:
        """The text that joins a reply to the text before it."""
        forced = None if request.space_in_text else request.target_space
        if forced is None and self.frame.gap is not None:
            return self.frame.gap
        return " " if self._space_belongs(text, target, forced) else ""

    def _encode_pair(
        self, prompt: str, target: str, request: EditRequest, field: str
    ) -> tuple[tuple[int, ...], list[tuple[int, int]], int]:
        """Ids and spans of the joined text, and the index of the target's first token."""
        ids, spans = self._encode(prompt + target)
        edge = len(prompt)
        boundary = next((i for i, (start, end) in enumerate(spans) if end > max(start, edge)), len(ids))
        if boundary == len(ids) or (boundary == 0 and spans[0][0] >= edge):
            raise request.error(field, f"{shortened(target)} gives no token of its own after {shortened(prompt)}")
        # A tokenizer that composes a letter and an accent gives both the span of the letter.
        if spans[boundary][0] >= edge and unicodedata.category(target[0])[0] != "M":
            return ids, spans, boundary
        # A token spans both sides (scripts without spaces, accents). A user of the model encodes the prompt alone, so
        # both sides are encoded separately. The line break keeps the tokenizer from treating the target as a new text.
        head, head_spans = self._encode(prompt)
        tail, tail_spans = self._encode("\n" + target, special=False)
        kept = [i for i, (start, end) in enumerate(tail_spans) if end > max(start, 1)]
        if not kept or tail_spans[kept[0]][0] < 1:
            raise request.error(
                field, f"the tokenizer merges {shortened(prompt)} and {shortened(target)}; reword the prompt's end"
            )
        spans = head_spans + [(edge + tail_spans[i][0] - 1, edge + tail_spans[i][1] - 1) for i in kept]
        return head + tuple(tail[i] for i in kept), spans, len(head)

    def _encode(self, text: str, special: bool = True) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        special = special and self.frame.special
        encoded = self.tokenizer(
            text, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        ids, spans = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        flags = list(encoded["special_tokens_mask"])
        while ids and flags[len(ids) - 1] and spans[len(ids) - 1][0] == spans[len(ids) - 1][1]:
            ids.pop()  # an EOS that the tokenizer appends would stand between prompt and answer
        for i, (start, end) in enumerate(spans):
            # Byte-level tokenizers trim white space off offsets, which leaves a lone space with an empty span.
            if start == end and not flags[i]:
                start = spans[i - 1][1] if i else 0
                # Characters that a normalizer merged into the previous letter, such as its accent, do not belong to the
                # space.
                letters = len(text[start:end].rstrip())
                spans[i] = (start + letters if start + letters < end else start, end)
            elif start == 0 and not flags[i] and text[:end].strip() and not self.tokenizer.decode([ids[i]]).strip():
                spans[i] = (0, 0)  # the mark that sentencepiece puts before a text borrows the first letter's span
        self._part_bytes(text, ids, spans)
        return tuple(ids), [(int(start), int(end)) for start, end in spans[: len(ids)]]

    def _part_bytes(self, text: str, ids: Sequence[int], spans: list[tuple[int, int]]) -> None:
        """Give single-byte tokens the spans of their characters, where each has the span of a whole unknown stretch."""
        first = 0
        while first < len(ids):
            past = first + 1
            start, end = spans[first]
            while past < len(ids) and spans[past] == spans[first]:
                past += 1
            if past - first > 1 and end - start > 1:
                owners = [place for place in range(start, end) for _ in text[place].encode()]
                tokens = self.tokenizer.convert_ids_to_tokens(list(ids[first:past]))
                if len(owners) == len(tokens) and all(_BYTE.fullmatch(token) for token in tokens):
                    spans[first:past] = [(place, place + 1) for place in owners]
            first = past

    def _lookup(
        self,
        request: EditRequest,
        text: str,
        spans: Sequence[tuple[int, int]],
        subject: tuple[int, int],
        prompt_length: int,
        fact_token: FactToken,
    ) -> int:
        if fact_token == "last":
            return prompt_length - 1
        start, end = (place + len(self.frame.head) for place in subject)
        # A token that shares only white space with the subject begins the next word.
        shared = (text[max(first, start) : min(past, end)] for first, past in spans[:prompt_length])
        covering = [i for i, part in enumerate(shared) if cut_edges(part)[1]]
        if not covering:
            raise request.error("subject", f"no token of the prompt covers {shortened(request.subject)}")
        if fact_token == "subject_first":
            return covering[0]
        if fact_token == "subject_first_after_last":
            # A subject at the prompt's end has no token after it: its last token is used, as in the public code.
            return min(covering[-1] + 1, prompt_length - 1)
        return covering[-1]

    def _check_embedded(self, ids: Sequence[int], request: EditRequest, field: str) -> None:
        """Refuse tokens without an embedding in the model, such as tokens added to the tokenizer."""
        unknown = [token for token in ids if self.embedded is not None and token >= self.embedded]
        if unknown:
            token = self.tokenizer.convert_ids_to_tokens(unknown[0])
            raise request.error(
                "target_new" if field == "prompt" else field,
                f"the token {shortened(token)} has number {unknown[0]}, but the model's embedding has only "
                f"{self.embedded} rows; resize the model's embedding (resize_token_embeddings), or reword the text",
            )

    def _space_belongs(self, prompt: str, target: str, forced: bool | None) -> bool:
        """Whether a space joins prompt and target."""
        if forced is not None:
            return forced
        if (known := joined_by_space(prompt, target)) is not None:
            return known
        # Most tokenizers merge a space with the text after it. If a tokenizer makes it a separate token before this
        # target, it does not expect a space there, unless a word or number follows.
        separate = any(end == 2 for _, end in self._encode(f"a {target}", special=False)[1])
        return not separate or target[0].isalnum()


def leading_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that a tokenizer puts before any text."""
    # A vocabulary may lack letters. Without a token of the text, ids before and after it cannot be told apart.
    for text in ("a", "1", "."):
        encoded = tokenizer(text, return_special_tokens_mask=True)
        flags = encoded["special_tokens_mask"]
        if not all(flags):
            return tuple(encoded["input_ids"][: flags.index(0)])
    return ()
