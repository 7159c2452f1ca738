# ruff: noqa: RUF001 -- characters that look alike are what this is about
"""What a request means: its texts, the space before its target, its lookup token and its target ids.

Written from the rules in words (docs/data.md), for the cases that the campaign makes: where the subject stands is
known from how the prompt was put together, so nothing is searched here.
"""

import re
import unicodedata
from dataclasses import dataclass, replace

from tests.campaign.facts import Answer, Fact
from tests.campaign.vocabularies import Vocabulary

INVISIBLE = "\u200b\u2060\ufeff\u200e\u200f"
FILLER = "<|endoftext|>"


@dataclass(frozen=True)
class Meaning:
    """A request as it was meant."""

    prompt: str
    start: int
    end: int
    target_new: str
    target_true: str | None
    target_space: bool | None
    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]
    generation_prompts: tuple[str, ...]
    references: tuple[str, ...]
    locality: tuple[Answer, ...]
    portability: tuple[Answer, ...]

    @property
    def subject(self) -> str:
        return self.prompt[self.start : self.end]


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt with an answer; ``target`` are the last of ``ids``."""

    ids: list[int]
    target: list[int]
    lookup: int


def edge(character: str) -> bool:
    return character.isspace() or character in INVISIBLE


def cut(text: str) -> tuple[int, str]:
    """How much goes at the front, and what is left."""
    inside = [place for place, character in enumerate(text) if not edge(character)]
    return (inside[0], text[inside[0] : inside[-1] + 1]) if inside else (len(text), "")


def bare(text: str) -> str:
    return cut(text)[1]


def meaning(fact: Fact, form: str) -> Meaning:
    """What a fact of a form says, white space at the edges aside."""
    written = fact.subject if form == "counterfact" else fact.written  # a template gets the subject as it is
    front, prompt = cut(fact.before + written + fact.after)
    inner, subject = cut(written)
    start = len(fact.before) + inner - front
    opens = fact.target_new[: cut(fact.target_new)[0]]
    truth = _answer(fact.target_true)
    if form in ("zsre", "knowedit") and truth == bare(fact.target_new):
        truth = None
    asked = fact.target_space if form in ("short", "api", "editor") else None
    space = True if asked is None and any(map(str.isspace, opens)) else asked
    texts = {
        name: tuple(map(bare, getattr(fact, name)))
        for name in ("paraphrases", "neighbours", "generation_prompts", "references")
    }
    probes = {name: _probes(getattr(fact, name)) for name in ("locality", "portability")}
    if form in ("knowedit", "easyedit"):  # these hold them by kind
        for name, given in probes.items():
            order = list(dict.fromkeys(probe.kind for probe in getattr(fact, name)))
            probes[name] = tuple(sorted(given, key=lambda probe: order.index(probe.kind)))
    whole = Meaning(
        prompt, start, start + len(subject), bare(fact.target_new), truth, space, **texts, **probes
    )  # fmt: skip
    return _as_far_as(form, whole, fact)


def _answer(text: str | None) -> str | None:
    """A true answer; an empty one or a filler is none."""
    return None if text is None or bare(text) in ("", FILLER) else bare(text)


def _probes(probes: tuple[Answer, ...]) -> tuple[Answer, ...]:
    return tuple(
        replace(probe, prompt=bare(probe.prompt), answer=bare(probe.answer))
        for probe in probes
        if _answer(probe.answer)
    )


def _as_far_as(form: str, whole: Meaning, fact: Fact) -> Meaning:
    """Forms hold different parts of a fact."""
    none: tuple[str, ...] = ()
    no_probes: tuple[Answer, ...] = ()
    match form:
        case "flat":
            kept = whole.neighbours if whole.target_true is not None else ()
            return replace(
                whole, paraphrases=none, neighbours=kept, generation_prompts=none, references=none, locality=no_probes,
                portability=no_probes,
            )  # fmt: skip
        case "counterfact":
            return replace(whole, references=none, locality=no_probes, portability=no_probes)
        case "zsre":
            untold = {
                name: tuple(replace(probe, kind="") for probe in _probes(getattr(fact, name)[:1]))
                for name in ("locality", "portability")
            }
            return replace(whole, neighbours=none, generation_prompts=none, references=none, **untold)
        case "knowedit" | "easyedit":
            return replace(whole, neighbours=none, generation_prompts=none, references=none)
    return whole


# ---- the space between a prompt and its target

SIGNS = ".,;:!?%/-–—…'’"
CLITIC = re.compile(r"['’](s|t|re|ve|ll|d|m)(?![^\W\d_])")
NO_SPACES = re.compile(
    "[\u0e01-\u0e4e\u0e80-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Myanmar, Khmer
    "\u3001-\u3003\u3005-\u3011\u3014-\u301c\u3041-\u30ff\u3400-\u9fff\uff01-\uff0f\uff1a-\uff20\uff21-\uff3a\uff66-\uff9d]"
)


def spaced(prompt: str, target: str, asked: bool | None, vocabulary: Vocabulary) -> bool:
    """Whether a space joins them."""
    if asked is not None:
        return asked
    left, before, right, after = prompt[-1], prompt[-2:-1], target[0], target[1:2]
    if NO_SPACES.match(left) or NO_SPACES.match(right):
        return False
    free = not before or before.isspace()
    if left in "'\"" and (free or unicodedata.category(before) in ("Ps", "Pi")):
        return False
    if left in "/-–—" and (not free or not before):
        return False
    if left in "@#$€£_¿¡" or unicodedata.category(left) in ("Ps", "Pi"):
        return False
    if right in SIGNS:
        if not after.isalnum() or CLITIC.match(target):
            return False
        return not (left.isdigit() and after.isdigit())
    if unicodedata.category(right) in ("Pe", "Pf"):
        return False
    return right.isalnum() or _opens_a_word(right, after) or not _space_stands_alone(target, vocabulary)


def _opens_a_word(sign: str, after: str) -> bool:
    """Whether a sign, which is no accent, stands before a letter or digit."""
    return after.isalnum() and not NO_SPACES.match(after) and not unicodedata.category(sign).startswith("M")


def _space_stands_alone(target: str, vocabulary: Vocabulary) -> bool:
    """Whether the tokenizer makes a token of nothing but the space before a target."""
    border = len(vocabulary.seen("a").encode())
    return (border, border + 1) in vocabulary.spans(f"a {target}")


# ---- tokens


def row(vocabulary: Vocabulary, prompt: str, end: int | None, target: str, space: bool | None) -> Row | None:
    """A prompt and an answer in tokens, or nothing where the two cannot be told apart.

    Args:
        vocabulary: The tokenizer.
        prompt: The prompt.
        end: Where the subject ends in it; ``None`` looks up the prompt's last token.
        target: The answer.
        space: Whether a space was asked for.
    """
    gap = " " if spaced(prompt, target, space, vocabulary) else ""
    ids, spans = vocabulary.own_ids(prompt + gap + target), vocabulary.spans(prompt + gap + target)
    border = len(vocabulary.seen(prompt).encode())
    if not vocabulary.seen(prompt + gap + target).startswith(vocabulary.seen(prompt)):
        return None  # the normaliser joins the two, as an accent that opens the target joins a letter before it
    first = next((place for place, (_, past) in enumerate(spans) if past > border), len(ids))
    if first == len(ids):
        return None
    if spans[first][0] < border:
        # One token holds parts of both. Whoever asks the model encodes the prompt alone, so both are encoded alone.
        ids, spans = vocabulary.own_ids(prompt), vocabulary.spans(prompt)
        tail, tail_spans = vocabulary.own_ids(f"\n{gap}{target}"), vocabulary.spans(f"\n{gap}{target}")
        lines = len(vocabulary.seen("\n").encode())
        opening = next((place for place, (_, past) in enumerate(tail_spans) if past > lines), len(tail))
        if opening == len(tail) or tail_spans[opening][0] < lines:
            return None
        first, ids = len(ids), ids + tail[opening:]
    lookup = first - 1 if end is None else covering(vocabulary, spans, prompt, end)
    before = vocabulary.ids(prompt + gap + target)[: vocabulary.before]
    return Row(before + ids, ids[first:], vocabulary.before + lookup)


def covering(vocabulary: Vocabulary, spans: list[tuple[int, int]], prompt: str, end: int) -> int:
    """The token that holds the last byte of the subject; white space that a normaliser puts after it is none of it."""
    last = len(vocabulary.seen(prompt[:end]).rstrip().encode()) - 1
    return next(place for place, (start, past) in enumerate(spans) if start <= last < past)


def divergence_ids(vocabulary: Vocabulary, subject: str) -> tuple[list[int], int]:
    """Ids of "{subject} is a" up to the subject's last token, and the index of that token."""
    text = f"{subject} is a"
    lookup = covering(vocabulary, vocabulary.spans(text), text, len(subject)) + vocabulary.before
    return vocabulary.ids(text)[: lookup + 1], lookup


def rows(vocabulary: Vocabulary, said: Meaning) -> dict[str, Row | None]:
    """Every row that a request is measured with, by what it is."""
    found = {"rewrite": row(vocabulary, said.prompt, said.end, said.target_new, said.target_space)}
    for name, target in (("new", said.target_new), ("true", said.target_true)):
        if target is not None:
            for place, prompt in enumerate((said.prompt, *said.paraphrases, *said.neighbours)):
                found[f"{name} after {place}"] = row(vocabulary, prompt, None, target, said.target_space)
    for probe in (*said.locality, *said.portability):
        found[f"{probe.answer} after {probe.prompt}"] = row(
            vocabulary, probe.prompt, None, probe.answer, said.target_space
        )
    return found


__all__ = ["FILLER", "INVISIBLE", "Meaning", "Row", "bare", "divergence_ids", "meaning", "row", "rows"]
