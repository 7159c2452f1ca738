"""Length-normalised log-probabilities of targets after prompts: what every probe score is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rome_pl.encoding import EncodedRow, align
from rome_pl.hooks import clean_padding, frozen, head_on
from rome_pl.language_model import LanguageModel
from rome_pl.prefix import forward_masks
from rome_pl.requests import EditRequest

__all__ = ["ProbeScores", "TargetMeasure", "measure_target", "perplexity", "probe_scores", "target_log_probs"]

ROWS = 64
"""Rows of one forward."""


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
    log_probs, greedy = _batch_log_probs(language_model, [row])
    return TargetMeasure(float(log_probs[0].exp()), bool(greedy[0]))


def target_log_probs(language_model: LanguageModel, rows: Sequence[EncodedRow]) -> Tensor:
    """Mean log-probability of each row's target tokens.

    Args:
        language_model: The model, with its current weights.
        rows: Encoded prompts with targets.

    Returns:
        Shape ``[rows]``, float64, on the CPU. Batches are made of rows of similar length; which rows share a batch
        changes nothing but rounding.
    """
    means = torch.empty(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        means[chosen], _ = _batch_log_probs(language_model, [rows[index] for index in chosen])
    return means


@torch.no_grad()
def _batch_log_probs(language_model: LanguageModel, rows: Sequence[EncodedRow]) -> tuple[Tensor, Tensor]:
    """Mean log-probability of each row's target, and whether each of its tokens is the likeliest."""
    model: Any = language_model.model
    aligned = align(rows, language_model.encoder.pad_id, language_model.device)
    with (
        frozen(model),
        clean_padding(model, aligned.attention_mask),
        head_on(model, aligned.predict_row, aligned.predict_column),
    ):
        logits = model(
            input_ids=aligned.input_ids,
            use_cache=False,
            **forward_masks(model, aligned.attention_mask, aligned.position_ids),
        ).logits[0]
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    picked = log_probs.gather(1, aligned.labels.unsqueeze(1)).squeeze(1).double()
    missed = (log_probs.argmax(-1) != aligned.labels).double()
    lengths = aligned.predict_row.bincount(minlength=len(rows))
    sums = torch.zeros(2, len(rows), dtype=torch.float64, device=picked.device)
    sums.index_add_(1, aligned.predict_row, torch.stack([picked, missed]))
    return (sums[0] / lengths).cpu(), (sums[1] == 0).cpu()


def probe_scores(language_model: LanguageModel, request: EditRequest) -> ProbeScores:
    """Measure one request's probes under the model's current weights.

    Raises:
        RequestError: If a probe does not fit into the model's context.
    """
    encode = language_model.encoder.continuation
    if request.target_true is None:
        rows = [encode(request.prompt, request.target_new, request)]
        return ProbeScores(rewrite=(float(target_log_probs(language_model, rows)[0]), None))
    prompts = [request.prompt, *request.paraphrases, *request.neighbours]
    rows = [
        encode(prompt, target, request) for prompt in prompts for target in (request.target_new, request.target_true)
    ]
    pairs = [(float(new), float(true)) for new, true in target_log_probs(language_model, rows).reshape(-1, 2)]
    border = 1 + len(request.paraphrases)
    return ProbeScores(rewrite=pairs[0], paraphrases=tuple(pairs[1:border]), neighbours=tuple(pairs[border:]))


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
