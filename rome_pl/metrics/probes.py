"""Length-normalised log-probabilities of targets after prompts: what every probe score is made of."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rome_pl.encoding import EncodedRow, align
from rome_pl.hooks import add_rank_one, clean_padding, frozen, head_on
from rome_pl.language_model import LanguageModel
from rome_pl.prefix import forward_masks
from rome_pl.rank_one import Update
from rome_pl.requests import EditRequest

__all__ = [
    "Changes",
    "ProbeScores",
    "TargetMeasure",
    "measure_target",
    "measure_targets",
    "next_tokens",
    "perplexity",
    "probe_scores",
    "target_log_probs",
]

ROWS = 64
"""Rows of one forward."""


@dataclass(frozen=True)
class Changes:
    """Changes of one weight that are measured without being written, each seen by the rows it belongs to alone.

    Args:
        projection: The module whose weight changes.
        updates: For each request or row what changes for it, one factor pair; ``None`` for nothing.
    """

    projection: nn.Module
    updates: Sequence[Update | None]

    def of(self, owners: Sequence[int]) -> "Changes":
        """The changes for rows that belong to ``owners``."""
        return Changes(self.projection, [self.updates[owner] for owner in owners])


@dataclass(frozen=True)
class ProbeScores:
    """Log-probabilities ``(new, true)`` of the two targets after each kind of prompt, means over target tokens.

    Args:
        rewrite: After the rewrite prompt; the second is ``None`` where the request has no true target.
        paraphrases: After each paraphrase.
        neighbours: After each neighbourhood prompt.
    """

    rewrite: tuple[float, float | None]
    paraphrases: tuple[tuple[float, float], ...] = ()
    neighbours: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class TargetMeasure:
    """A target after one prompt.

    Args:
        probability: Geometric mean over its tokens.
        greedy: Whether greedy decoding gives it, every token being the likeliest one.
    """

    probability: float
    greedy: bool


def measure_target(language_model: LanguageModel, row: EncodedRow) -> TargetMeasure:
    """Measure one target under the model's current weights."""
    return measure_targets(language_model, [row])[0]


def measure_targets(
    language_model: LanguageModel, rows: Sequence[EncodedRow], changes: Changes | None = None
) -> list[TargetMeasure]:
    """Measure targets under the model's current weights, or under a change of them for each row."""
    log_probs, greedy = _measure(language_model, rows, changes)
    return [
        TargetMeasure(float(probability), bool(best))
        for probability, best in zip(log_probs.exp().tolist(), greedy.tolist(), strict=True)
    ]


def target_log_probs(
    language_model: LanguageModel, rows: Sequence[EncodedRow], changes: Changes | None = None
) -> Tensor:
    """Mean log-probability of each row's target tokens.

    Args:
        language_model: The model, with its current weights.
        rows: Encoded prompts with targets.
        changes: A change of the weights for each row.

    Returns:
        Shape ``[rows]``, float64, on the CPU. Rows whose text is the beginning of another row's are read off that one;
        batches are made of rows of similar length. Neither changes anything but rounding.
    """
    return _measure(language_model, rows, changes)[0]


def _measure(
    language_model: LanguageModel, rows: Sequence[EncodedRow], changes: Changes | None = None
) -> tuple[Tensor, Tensor]:
    """Mean log-probability of each row's target, and whether each of its tokens is the likeliest."""
    log_probs, greedy = torch.empty(len(rows), dtype=torch.float64), torch.empty(len(rows), dtype=torch.bool)
    groups = sorted(_shared(rows, changes), key=lambda group: len(rows[group[0]].ids))
    for start in range(0, len(groups), ROWS):
        batch = groups[start : start + ROWS]
        members = [member for group in batch for member in group]
        log_probs[members], greedy[members] = _measure_batch(
            language_model,
            [[rows[member] for member in group] for group in batch],
            changes and changes.of([group[0] for group in batch]),
        )
    return log_probs, greedy


def _shared(rows: Sequence[EncodedRow], changes: Changes | None) -> list[list[int]]:
    """Indices of rows in groups: the first one's ids begin with those of every other, and they see the same change.

    A prompt with a one-token target is the same input whatever the target, so a pair of targets mostly costs one row.
    """
    firsts: dict[int, int] = {}  # not the address itself, which would order the rows differently in every process
    updates = changes.updates if changes else [None] * len(rows)
    seen = [firsts.setdefault(id(update), len(firsts)) for update in updates]
    groups: list[list[int]] = []
    for index in sorted(range(len(rows)), key=lambda index: (seen[index], rows[index].ids), reverse=True):
        ids = rows[index].ids
        # In this order whatever begins with these ids comes right before them.
        last = groups[-1][0] if groups else None
        if last is not None and seen[last] == seen[index] and rows[last].ids[: len(ids)] == ids:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


@torch.no_grad()
def _measure_batch(
    language_model: LanguageModel, groups: Sequence[Sequence[EncodedRow]], changes: Changes | None
) -> tuple[Tensor, Tensor]:
    """Measure the targets of groups that share a row each, in the groups' order."""
    model: Any = language_model.model
    aligned = align([group[0] for group in groups], language_model.encoder.pad_id, language_model.device)
    wanted, count = [], 0
    for index, group in enumerate(groups):
        shift = aligned.prefix - group[0].lookup
        for row in group:
            wanted += [(index, shift + row.first + step, label, count) for step, label in enumerate(row.target)]
            count += 1
    at_row, at_column, labels, owner = torch.tensor(wanted, device=language_model.device).unbind(1)
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(clean_padding(model, aligned.attention_mask))
        stack.enter_context(head_on(model, at_row, at_column))
        if changes is not None and any(update is not None for update in changes.updates):
            stack.enter_context(add_rank_one(changes.projection, *_stacked(changes.updates)))
        logits = model(
            input_ids=aligned.input_ids,
            use_cache=False,
            **forward_masks(model, aligned.attention_mask, aligned.position_ids),
        ).logits[0]
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    picked = log_probs.gather(1, labels.unsqueeze(1)).squeeze(1).double()
    missed = (log_probs.argmax(-1) != labels).double()
    sums = torch.zeros(2, count, dtype=torch.float64, device=picked.device)
    sums.index_add_(1, owner, torch.stack([picked, missed]))
    return (sums[0] / owner.bincount(minlength=count)).cpu(), (sums[1] == 0).cpu()


def _stacked(updates: Sequence[Update | None]) -> tuple[Tensor, Tensor]:
    """Factors of each row's change, ``[rows, d_value]`` and ``[rows, d_key]``; zeros where nothing changes."""
    some = next(update for update in updates if update is not None)
    nothing = Update(torch.zeros_like(some.left), torch.zeros_like(some.right))
    chosen = [update or nothing for update in updates]
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
    for index, request in enumerate(requests):
        targets = [target for target in (request.target_new, request.target_true) if target is not None]
        probes = [*request.paraphrases, *request.neighbours] if len(targets) == 2 else []
        rows += [encode(prompt, target, request) for prompt in (request.prompt, *probes) for target in targets]
        owners += [index] * (len(rows) - len(owners))
    measured = iter(target_log_probs(language_model, rows, changes and changes.of(owners)).tolist())
    scores = []
    for request in requests:
        if request.target_true is None:
            scores.append(ProbeScores(rewrite=(next(measured), None)))
            continue
        count = len(request.paraphrases) + len(request.neighbours)
        pairs = [(next(measured), next(measured)) for _ in range(1 + count)]
        border = 1 + len(request.paraphrases)
        scores.append(ProbeScores(pairs[0], tuple(pairs[1:border]), tuple(pairs[border:])))
    return scores


@torch.no_grad()
def perplexity(language_model: LanguageModel, text: str, window: int = 256) -> float:
    """Perplexity per token of a text, read in windows of ``window`` tokens without overlap.

    Raises:
        ValueError: If the text has fewer than two tokens.
    """
    model: Any = language_model.model
    ids = torch.tensor(language_model.tokenizer(text, add_special_tokens=False)["input_ids"])
    window = min(window, language_model.encoder.max_length)
    total, count = 0.0, 0
    pieces = [piece for piece in torch.split(ids, window) if len(piece) > 1]
    if not pieces:
        raise ValueError("the text for perplexity needs at least two tokens")
    with frozen(model):
        for piece in pieces:
            row = piece.unsqueeze(0).to(language_model.device)
            logits = model(input_ids=row, use_cache=False).logits[0, :-1]
            log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            total -= float(log_probs.gather(1, row[0, 1:].unsqueeze(1)).double().sum())
            count += len(piece) - 1
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


@torch.no_grad()
def next_tokens(language_model: LanguageModel, prompts: Sequence[str]) -> list[int]:
    """The likeliest next token after each prompt."""
    model: Any = language_model.model
    rows = [language_model.encoder.prompt(prompt) for prompt in prompts]
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
