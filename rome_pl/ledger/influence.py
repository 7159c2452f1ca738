"""The effect of edits at each token of a prompt."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from rome_pl.forward.hooks import capture_columns
from rome_pl.model.language_model import LanguageModel
from rome_pl.utils.restored_state import frozen
from rome_pl.write.edited_layers import EditedLayers

__all__ = ["Influence", "blame"]


@dataclass(frozen=True)
class Influence:
    """The effect of an edit at one token of a prompt.

    Args:
        name: The edit.
        token: The token's text.
        column: Its position in the prompt, from 0.
        layer: The rewrite layer.
        share: Share of the edit's change that applies there: 1 at its own key, 0 where it has no effect.
        size: Norm of that change, relative to the unedited projection's output there.
    """

    name: str
    token: str
    column: int
    layer: int
    share: float
    size: float


def blame(language_model: LanguageModel, layers: EditedLayers, prompt: str) -> list[Influence]:
    """Measure the effect of each edit at each token of a prompt, the largest change first.

    The change that edit i makes at key k is ``left_i (right_i · k)``; ``right_i · k_i = 1`` at the key where it asserts
    its value.

    Args:
        language_model: The model, with the edits.
        layers: Its rewrite layers.
        prompt: The text.
    """
    row = language_model.encoder.prompt(prompt)
    ids = torch.tensor([row.ids], device=language_model.device)
    sites = [weight.site for weight in layers.weights]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(frozen(language_model.model))
        seen = [stack.enter_context(capture_columns(site, 1, slice(None))) for site in sites]
        language_model.model(input_ids=ids, use_cache=False)
    texts = [language_model.tokenizer.decode([token]) for token in row.ids]
    found: list[Influence] = []
    for place in range(len(sites)):
        found += _at_layer(layers, place, seen[place], texts)
    return sorted(found, key=lambda one: -one.size)


def _at_layer(layers: EditedLayers, place: int, seen: dict[str, torch.Tensor], texts: list[str]) -> Iterator[Influence]:
    weight = layers.weights[place]
    keys, outputs = seen["input"][0].double(), seen["output"][0].double()
    changed = torch.zeros_like(outputs)
    shares, norms, names = list[torch.Tensor](), list[torch.Tensor](), list[str]()
    for written in weight.written:
        update = written.update.to(keys.device)
        share = keys @ update.right.T
        changed += share @ update.left
        shares.append(share)
        norms.append(update.left.norm(dim=1))
        names += written.names
    if not names:
        return
    usual = (outputs - changed).norm(dim=1).clamp(min=torch.finfo(keys.dtype).tiny)
    share = torch.cat(shares, 1)
    sizes = share.abs() * torch.cat(norms) / usual.unsqueeze(1)
    for column, text in enumerate(texts):
        for index, name in enumerate(names):
            yield Influence(
                name, text, column, weight.site.layer, float(share[column, index]), float(sizes[column, index])
            )
