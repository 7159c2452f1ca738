"""The health of a model whose weights change, compared with its first state."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from rome_pl.metrics.probes import next_tokens
from rome_pl.metrics.text import measure_text
from rome_pl.model.language_model import LanguageModel

__all__ = ["CANARIES", "Bounds", "ModelWatch", "TrainedWeights", "Weights", "language_model_of"]

CANARIES = (
    "One, two, three, four,",
    "The opposite of hot is",
    "She opened the door and walked into the",
    "Monday, Tuesday, Wednesday,",
    "He was so tired that he fell",
    "The sun rises in the",
    "Once upon a",
    "Please let me know if you have any",
    "Thank you very",
    "The cat sat on the",
    "At the end of the",
    "Twice two makes",
)
"""Prompts whose next word an intact model keeps, whatever facts change."""


class Weights(Protocol):
    """Changing weights and their original values; :class:`rome_pl.write.edited_layers.EditedLayers` is one."""

    @property
    def finite(self) -> bool:
        """Whether every entry is a finite number."""

    @property
    def change(self) -> float:
        """Frobenius norm of the change, relative to the original weights."""

    def unedited(self) -> AbstractContextManager[None]:
        """The original weights inside; the present ones after, whatever happens."""


class TrainedWeights:
    """All weights of a model, with a copy of their present values.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = list(model.parameters())
        self._originals = [weight.detach().clone() for weight in self._weights]

    @property
    def finite(self) -> bool:
        """Whether every entry is a finite number."""
        return all(bool(weight.isfinite().all()) for weight in self._weights)

    @property
    def change(self) -> float:
        """Frobenius norm of the change, relative to the original weights."""
        pairs = zip(self._weights, self._originals, strict=True)
        changed = torch.stack([(weight.detach() - original).double().norm() for weight, original in pairs])
        before = torch.stack([original.double().norm() for original in self._originals])
        return float(changed.norm() / before.norm())

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """The original weights inside; the present ones after, whatever happens."""
        with ExitStack() as stack, torch.no_grad():
            for weight, original in zip(self._weights, self._originals, strict=True):
                # Restored even after an exception, and by copying: the optimiser holds these tensors.
                stack.callback(weight.data.copy_, weight.detach().clone())
                weight.data.copy_(original)
            yield


@dataclass(frozen=True)
class Bounds:
    """The bounds of a healthy model; see :class:`rome_pl.callbacks.StateCheck` for their meaning.

    Raises:
        ValueError: If one is out of range.
    """

    largest_change: float
    least_canary_agreement: float
    largest_perplexity_ratio: float | None
    largest_divergence: float | None

    def __post_init__(self) -> None:
        if not 0 <= self.least_canary_agreement <= 1:
            raise ValueError(f"least_canary_agreement: expected a share in [0, 1], got {self.least_canary_agreement}")
        if not self.largest_change > 0:
            raise ValueError(f"largest_change: expected a positive number, got {self.largest_change}")
        if self.largest_perplexity_ratio is not None and not self.largest_perplexity_ratio > 1:
            raise ValueError(
                f"largest_perplexity_ratio: expected a number above 1, got {self.largest_perplexity_ratio}"
            )
        if self.largest_divergence is not None and not self.largest_divergence > 0:
            raise ValueError(f"largest_divergence: expected a positive number, got {self.largest_divergence}")

    @property
    def need_text(self) -> bool:
        """Whether they need held-out text."""
        return self.largest_perplexity_ratio is not None or self.largest_divergence is not None


class ModelWatch:
    """Compares a model with its first state.

    Args:
        language_model: The model in its first state.
        weights: Its changing weights.
        bounds: The bounds of a healthy state.
        canaries: Prompts whose next token should stay the same.
        text: Held-out text for perplexity and divergence. ``None``: the bounds do not need it.
    """

    def __init__(
        self, language_model: LanguageModel, weights: Weights, bounds: Bounds, canaries: Sequence[str], text: str
    ) -> None:
        self.language_model, self.weights, self.bounds = language_model, weights, bounds
        self._canaries, self._text = canaries, text
        self._expected = next_tokens(language_model, canaries)
        self._perplexity = (
            measure_text(language_model, text).perplexity if bounds.largest_perplexity_ratio is not None else 0.0
        )

    def look(self) -> dict[str, Any]:
        """Measure the model's state. ``failures`` describes every bound that is exceeded."""
        bounds = self.bounds
        now = next_tokens(self.language_model, self._canaries)
        agreement = sum(a == b for a, b in zip(now, self._expected, strict=True)) / len(now)
        finite, change = self.weights.finite, self.weights.change
        failures = []
        if not finite:
            failures.append("a weight is not finite")
        if not change <= bounds.largest_change:
            failures.append(f"the weight changed by {change:.2f} of its norm (largest_change: {bounds.largest_change})")
        if agreement < bounds.least_canary_agreement:
            failures.append(
                f"{agreement:.0%} of the canaries hold (least_canary_agreement: {bounds.least_canary_agreement})"
            )
        found = {"finite": finite, "change": change, "canary_agreement": agreement, "failures": failures}
        if bounds.need_text:
            self._read(found, failures)
        return found

    def _read(self, found: dict[str, Any], failures: list[str]) -> None:
        """Measure perplexity and divergence on held-out text."""
        bounds = self.bounds
        unedited = self._unedited if bounds.largest_divergence is not None else None
        measured = measure_text(self.language_model, self._text, unedited)
        if bounds.largest_perplexity_ratio is not None:
            found["perplexity_ratio"] = ratio = measured.perplexity / self._perplexity
            if not ratio <= bounds.largest_perplexity_ratio:
                failures.append(
                    f"perplexity of held-out text is {ratio:.2f} times the unedited model's "
                    f"(largest_perplexity_ratio: {bounds.largest_perplexity_ratio})"
                )
        if bounds.largest_divergence is not None:
            found["divergence"] = divergence = measured.divergence
            assert divergence is not None  # the unedited model was given
            if not divergence <= bounds.largest_divergence:
                failures.append(
                    f"the next token's divergence on held-out text is {divergence:.3g} nats "
                    f"(largest_divergence: {bounds.largest_divergence})"
                )

    @contextmanager
    def _unedited(self) -> Iterator[LanguageModel]:
        with self.weights.unedited():
            yield self.language_model


def language_model_of(module: Any) -> LanguageModel:
    """Return the language model of a module: its ``language_model``, or its ``model`` with its ``tokenizer``.

    Raises:
        TypeError: If it has neither.
        UnsupportedModelError: If the model cannot be edited.
    """
    known = getattr(module, "language_model", None)
    if isinstance(known, LanguageModel):
        return known
    model, tokenizer = getattr(module, "model", None), getattr(module, "tokenizer", None)
    if model is None or tokenizer is None:
        raise TypeError(
            f"{type(module).__name__} has no language model to look at: give it the attributes 'model' (a causal "
            "language model of transformers) and 'tokenizer' (its fast tokenizer)"
        )
    return LanguageModel(model, tokenizer)
