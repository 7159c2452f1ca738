"""Length-normalised log-probabilities of targets after prompts, on which all probe scores are based."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rome_pl.encoding.aligned_rows import align
from rome_pl.encoding.encoded_rows import EncodedRow
from rome_pl.forward.hooks import add_rank_one, clean_padding, head_on
from rome_pl.forward.left_padding import padded_together
from rome_pl.forward.partial import forward_masks
from rome_pl.forward.token_trees import Pack, forwards, pack_texts, stack_packs, takes_branches
from rome_pl.model.architecture import RewriteSite
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest
from rome_pl.utils.restored_state import frozen
from rome_pl.write.closed_form import Update

__all__ = [
    "MEASURED_TOGETHER",
    "Answer",
    "Changes",
    "ProbeScores",
    "TargetMeasure",
    "measure_answers",
    "measure_target",
    "measure_targets",
    "next_tokens",
    "probe_scores",
    "wanted_answers",
]


@dataclass(frozen=True)
class Changes:
    """Changes of weights that are measured without being written. Each applies only to its own rows.

    Args:
        sites: The projections whose weights change.
        updates: For each request or row its changes, one pair of factors per projection. ``None``: no change.
    """

    sites: Sequence[RewriteSite]
    updates: Sequence[Sequence[Update | None] | None]

    def of(self, owners: Sequence[int]) -> "Changes":
        """The changes for rows that belong to ``owners``."""
        return Changes(self.sites, [self.updates[owner] for owner in owners])


@dataclass(frozen=True)
class Answer:
    """An answer after a prompt.

    Args:
        log_prob: Mean log-probability of its tokens.
        accuracy: Share of its tokens that are the likeliest, each after those before it in the answer.
        predicted: The likeliest token at each of its positions.
    """

    log_prob: float
    accuracy: float
    predicted: tuple[int, ...]

    @property
    def generated(self) -> bool:
        """Whether greedy generation gives the answer, which is so if every token is the likeliest."""
        # If logits are NaN, the likeliest token is meaningless.
        return self.accuracy == 1.0 and math.isfinite(self.log_prob)


@dataclass(frozen=True)
class ProbeScores:
    """Log-probabilities ``(new, true)`` of the two targets after each kind of prompt, means over target tokens.

    Args:
        rewrite: After the rewrite prompt; the second is ``None`` where the request has no true target.
        paraphrases: After each paraphrase.
        neighbours: After each neighbourhood prompt.
        touched: For each neighbourhood prompt whether its own subject was edited too; empty if none was.
        answers: The expected answers, by kind of prompt: ``rewrite`` and ``paraphrase`` (the new target), ``neighbour``
            (the true one), ``locality`` and ``portability`` (the probes' own).
    """

    rewrite: tuple[float, float | None]
    paraphrases: tuple[tuple[float, float], ...] = ()
    neighbours: tuple[tuple[float, float], ...] = ()
    answers: Mapping[str, tuple[Answer, ...]] = field(default_factory=dict)
    touched: tuple[bool, ...] = ()


@dataclass(frozen=True)
class TargetMeasure:
    """A target after one prompt.

    Args:
        probability: Geometric mean over its tokens.
        greedy: Whether greedy decoding gives it, every token being the likeliest one.
        target: Its tokens.
        predicted: The likeliest token at the position of each, after those before it in the target.
    """

    probability: float
    greedy: bool
    target: tuple[int, ...] = ()
    predicted: tuple[int, ...] = ()


def measure_target(language_model: LanguageModel, row: EncodedRow) -> TargetMeasure:
    """Measure one target under the model's current weights."""
    return measure_targets(language_model, [row])[0]


def measure_targets(
    language_model: LanguageModel, rows: Sequence[EncodedRow], changes: Changes | None = None
) -> list[TargetMeasure]:
    """Measure targets under the model's current weights, or under a change of them for each row."""
    return [
        TargetMeasure(math.exp(answer.log_prob), answer.generated, tuple(row.target), answer.predicted)
        for row, answer in zip(rows, measure_answers(language_model, rows, changes), strict=True)
    ]


def measure_answers(
    language_model: LanguageModel, rows: Sequence[EncodedRow], changes: Changes | None = None
) -> list[Answer]:
    """Measure each row's target tokens.

    A beginning that several rows share runs once, see :mod:`rome_pl.forward.token_trees`. This changes only rounding.

    Args:
        language_model: The model, with its current weights.
        rows: Encoded prompts with targets.
        changes: A change of the weights for each row. ``None`` (default): no change.

    Returns:
        An answer for each row, in the order of the rows.
    """
    if not rows:
        return []
    firsts: dict[int, int] = {}  # not the id itself, which would order the rows differently in every process
    owners = [
        firsts.setdefault(id(update), len(firsts)) for update in (changes.updates if changes else [None] * len(rows))
    ]
    packs = pack_texts([row.ids for row in rows], owners, takes_branches(language_model))
    answers: dict[int, Answer] = {}
    for batch in forwards(packs):
        numbers = [number for pack in batch for number in pack.texts]
        measured = _measure_batch(
            language_model, batch, rows, changes and changes.of([pack.texts[0] for pack in batch])
        )
        answers.update(zip(numbers, measured, strict=True))
    return [answers[index] for index in range(len(rows))]


@torch.no_grad()
def _measure_batch(
    language_model: LanguageModel, packs: Sequence[Pack], rows: Sequence[EncodedRow], changes: Changes | None
) -> list[Answer]:
    """Measure the targets of packs, in the packs' order."""
    model: Any = language_model.model
    wanted: list[tuple[int, int, int]] = []
    lengths = []
    for index, pack in enumerate(packs):
        for number, columns in zip(pack.texts, pack.columns, strict=True):
            row = rows[number]
            wanted += [(index, columns[row.first + step], label) for step, label in enumerate(row.target)]
            lengths.append(len(row.target))
    at_pack, at_column, labels = torch.tensor(wanted, device=language_model.device).unbind(1)
    stacked = stack_packs(language_model, packs)
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(head_on(model, at_pack, at_column))
        if changes is not None and any(update is not None for update in changes.updates):
            for place, site in enumerate(changes.sites):
                here = [None if update is None else update[place] for update in changes.updates]
                if any(update is not None for update in here):
                    stack.enter_context(add_rank_one(site, *_stacked(here)))
        logits = model(input_ids=stacked.input_ids, use_cache=False, **stacked.masks).logits[0]
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    picked = log_probs.gather(1, labels.unsqueeze(1)).squeeze(1).double().cpu()
    likeliest = log_probs.argmax(-1).cpu()
    hits = (likeliest == labels.cpu()).double()
    return [
        Answer(float(values.mean()), float(right.mean()), tuple(tokens.tolist()))
        for values, right, tokens in zip(
            picked.split(lengths), hits.split(lengths), likeliest.split(lengths), strict=True
        )
    ]


def _stacked(updates: Sequence[Update | None]) -> tuple[Tensor, Tensor]:
    """Factors of each row's change of one module, ``[rows, d_value]`` and ``[rows, d_key]``; zeros for no change."""
    some = next(update for update in updates if update is not None)
    nothing = Update(torch.zeros_like(some.left), torch.zeros_like(some.right))
    chosen = [nothing if update is None else update for update in updates]
    return torch.cat([update.left for update in chosen]), torch.cat([update.right for update in chosen])


def probe_scores(
    language_model: LanguageModel, requests: Sequence[EditRequest], changes: Changes | None = None
) -> list[ProbeScores]:
    """Measure the probes of requests under the model's current weights, or under a change of them for each request.

    Raises:
        RequestError: If a probe does not fit into the model's context.
    """
    encode = language_model.encoder.continuation
    rows: list[EncodedRow] = []
    owners: list[int] = []
    wanted = [list(wanted_answers(request)) for request in requests]
    for index, (request, probes) in enumerate(zip(requests, wanted, strict=True)):
        rows += [encode(prompt, answer, request, name) for name, prompt, answer, _ in probes]
        owners += [index] * len(probes)
    measured = iter(measure_answers(language_model, rows, changes and changes.of(owners)))
    return [_assemble(probes, [next(measured) for _ in probes]) for probes in wanted]


def wanted_answers(request: EditRequest) -> Iterator[tuple[str, str, str, str]]:
    """Yield field, prompt, answer and role of each measurement for a request."""
    new, true = request.target_new, request.target_true
    for name, prompts in (
        ("prompt", [request.prompt]),
        ("paraphrases", request.paraphrases),
        ("neighbours", request.neighbours if true is not None else ()),
    ):
        for prompt in prompts:
            yield name, prompt, new, "new"
            if true is not None:
                yield name, prompt, true, "true"
    for name in ("locality", "portability"):
        for probe in getattr(request, name):
            yield name, probe.prompt, probe.answer, "own"


_KINDS = {"prompt": "rewrite", "paraphrases": "paraphrase", "neighbours": "neighbour"}


def _assemble(wanted: Sequence[tuple[str, str, str, str]], measured: Sequence[Answer]) -> ProbeScores:
    log_probs: dict[tuple[str, str], list[float]] = {}
    answers: dict[str, list[Answer]] = {}
    for (name, _, _, role), answer in zip(wanted, measured, strict=True):
        log_probs.setdefault((name, role), []).append(answer.log_prob)
        if role == ("true" if name == "neighbours" else "own" if name not in _KINDS else "new"):
            answers.setdefault(_KINDS.get(name, name), []).append(answer)

    def pairs(name: str) -> tuple[tuple[float, float], ...]:
        new, true = log_probs.get((name, "new"), []), log_probs.get((name, "true"), [])
        return tuple(zip(new, true, strict=True)) if true else ()

    both = pairs("prompt")
    return ProbeScores(
        rewrite=both[0] if both else (log_probs["prompt", "new"][0], None),
        paraphrases=pairs("paraphrases"),
        neighbours=pairs("neighbours"),
        answers={kind: tuple(found) for kind, found in answers.items()},
    )


@torch.no_grad()
def next_tokens(language_model: LanguageModel, prompts: Sequence[str]) -> list[int]:
    """Return the likeliest next token after each prompt."""
    model: Any = language_model.model
    rows = [language_model.encoder.prompt(prompt) for prompt in prompts]
    groups = padded_together(language_model, [len(row.ids) for row in rows])
    if len(groups) > 1:
        found = {
            number: token
            for numbers in groups
            for number, token in zip(
                numbers, next_tokens(language_model, [prompts[number] for number in numbers]), strict=True
            )
        }
        return [found[number] for number in range(len(prompts))]
    aligned = align(rows, language_model.encoder.pad_id, language_model.device)
    last = torch.full_like(aligned.input_ids[:, 0], aligned.prefix)  # the lookup token is each prompt's last
    with (
        frozen(model),
        clean_padding(model, aligned.attention_mask),
        head_on(model, torch.arange(len(rows), device=last.device), last),
    ):
        logits = model(
            input_ids=aligned.input_ids,
            use_cache=False,
            **forward_masks(model, aligned.attention_mask, aligned.position_ids),
        ).logits[0]
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


MEASURED_TOGETHER = 16
"""Number of requests whose probes are measured at once."""
