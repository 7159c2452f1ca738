"""Global measures of damage: a model's predictions on ordinary text, compared with the unedited model's."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rome_pl.errors import OptionError
from rome_pl.files.readable_files import FileError, read_text
from rome_pl.files.whole_files import local_path
from rome_pl.model.language_model import LanguageModel
from rome_pl.utils.restored_state import frozen

__all__ = ["TextMeasure", "held_out_text", "measure_text", "perplexity"]

WINDOW = 256
"""Number of tokens of the text that are read together."""


@dataclass(frozen=True)
class TextMeasure:
    """Measurements on a text.

    Args:
        perplexity: Per token of the text.
        divergence: ``KL(unedited ‖ model)`` of the next token, in nats, mean over positions. ``None``: the unedited
            model was not given.
        n: Number of tokens predicted.
    """

    perplexity: float
    divergence: float | None
    n: int


def held_out_text(path: str | None = None) -> str:
    """Return the text for perplexity: that of a file, or the one shipped with the package.

    Raises:
        OptionError: If the file cannot be read as UTF-8.
    """
    if not path:
        return _shipped_text()
    source = local_path(path)
    try:
        return read_text(source, "give a text file")
    except FileError as error:
        raise OptionError(f"held_out_text: {source} cannot be read as UTF-8 text: {error}") from error


def _shipped_text() -> str:
    return (files("rome_pl") / "assets" / "held_out_text.txt").read_text(encoding="utf-8")


def perplexity(language_model: LanguageModel, text: str, window: int = WINDOW) -> float:
    """Perplexity per token of a text, read in windows of ``window`` tokens without overlap.

    Every window begins with the ids that the tokenizer puts before a text (BOS). They are not predicted.

    Raises:
        ValueError: If the text has fewer than two tokens.
    """
    return measure_text(language_model, text, window=window).perplexity


@torch.no_grad()
def measure_text(
    language_model: LanguageModel,
    text: str,
    unedited: Callable[[], AbstractContextManager[LanguageModel]] | None = None,
    window: int = WINDOW,
    *,
    edited: Callable[[], AbstractContextManager[LanguageModel]] | None = None,
    windows: int | None = None,
) -> TextMeasure:
    """Measure the perplexity of a text, and the divergence of next-token distributions from the unedited model's.

    Args:
        language_model: The model, with its current weights.
        text: Ordinary text.
        unedited: Context manager that gives the unedited model, possibly the same one with its original weights.
        window: Tokens of the text that are read together, without overlap. Each window begins with the ids that the
            tokenizer puts before a text (BOS), as in training. A window is shorter if the model's context is. All its
            tokens but the first are predicted, the same ones with and without BOS.
        edited: Context manager that gives the model to measure, where ``language_model`` is the unedited one.
        windows: Most windows to read. ``None`` (default): all.

    Raises:
        ValueError: If the text has fewer than two tokens.
    """

    @contextmanager
    def as_it_is() -> Iterator[LanguageModel]:
        yield language_model

    present, original = (as_it_is, unedited) if edited is None else (edited, as_it_is)
    surprise, divergence, count = 0.0, 0.0, 0
    # The opening and the token after it are not predicted: a window may begin in mid-sentence.
    first = len(language_model.encoder.opening) + 1
    for row in islice(_windows(language_model, text, window), windows):
        with present() as measured:
            now = _log_probs(measured, row, first)
        surprise -= float(now.gather(1, row[0, first:].unsqueeze(1)).double().sum())
        count += len(now)
        if original is not None:
            with original() as other:
                then = _log_probs(other, row, first)
            divergence += float((then.exp() * (then - now)).sum(-1).double().sum())
    if not count:
        raise ValueError("the text for perplexity needs at least two tokens")
    mean = torch.tensor(surprise / count, dtype=torch.float64)
    return TextMeasure(float(mean.exp()), divergence / count if original is not None else None, count)


def _windows(language_model: LanguageModel, text: str, window: int) -> Iterator[Tensor]:
    """Yield the text's tokens in rows ``[1, length]``, each with the tokenizer's opening ids."""
    encoder = language_model.encoder
    ids = torch.tensor(language_model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    opening = torch.tensor(encoder.opening, dtype=torch.long)
    for piece in torch.split(ids.long(), max(1, min(window, encoder.max_length - len(opening)))):
        if len(piece) > 1:
            yield torch.cat([opening, piece]).unsqueeze(0).to(language_model.device)


def _log_probs(language_model: LanguageModel, row: Tensor, first: int) -> Tensor:
    """Log-probabilities of each token from ``first`` on, given those before it, ``[length - first, vocabulary]``."""
    model: Any = language_model.model
    with frozen(model):
        logits: Tensor = model(input_ids=row.to(language_model.device), use_cache=False).logits[0, first - 1 : -1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
