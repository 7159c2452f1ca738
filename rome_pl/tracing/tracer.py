"""Causal tracing: which hidden states carry a fact (Meng et al. 2022, section 2 and App. B).

The subject's embeddings are corrupted by noise, which costs the answer its probability. Then the clean run's state at
one token and layer is restored in the corrupted run. The probability that this recovers is its *indirect effect*.

A state restored at token ``t`` and layer ``l`` changes nothing before ``t`` and nothing below ``l``. So each fact has
one clean and one corrupted run. After that only columns from ``t`` on are run, from layer ``l`` on, with the corrupted
run's attention keys and values and hidden states.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rome_pl.forward.hooks import capture_columns, capture_input, head_on, put_at_column
from rome_pl.forward.partial import cache_of, forward_masks, layer_answer
from rome_pl.forward.staggered_rows import join_layers
from rome_pl.forward.suffix_engine import LARGEST_ERROR
from rome_pl.model.architecture import UnsupportedModelError, decoder_layers, find_attention_output, find_site
from rome_pl.tracing.trace import KINDS, Fact, Kind, Trace
from rome_pl.utils.restored_state import frozen

__all__ = ["Tracer"]


TOKENS_PER_FORWARD = 4096
"""Largest number of tokens of one forward. Restorations at one token share it, and join it at their layers."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Restoration:
    """The restored states at a token: the input of layer ``start``, or outputs of layers up to ``end``."""

    kind: Kind
    layer: int
    start: int
    end: int


@dataclass(frozen=True)
class _Runs:
    """The clean run of a fact and the corrupted ones, layer by layer.

    Args:
        clean: Hidden states that enter each layer, ``[tokens, hidden]``.
        outputs: Outputs of MLPs and attention in the clean run, ``[tokens, hidden]`` per layer.
        corrupted: Hidden states that enter each layer, ``[samples, tokens, hidden]``.
        cache: Attention's keys and values of the corrupted runs, ``[samples, heads, tokens, d]``.
        answer: Wraps hidden states as the family's decoder layers return them.
    """

    clean: list[Tensor]
    outputs: dict[Kind, list[Tensor]]
    corrupted: list[Tensor]
    cache: list[tuple[Tensor, Tensor]]
    answer: Any


class Tracer:
    """Traces facts through one model.

    Before its first trace it compares a forward that continues from a cached prefix with a whole one. If the model's
    cache cannot do this, whole rows are run, with a warning.

    Args:
        model: A causal language model of the transformers library.
        window: Number of layers over which outputs of MLPs or attention are restored together.

    Raises:
        ValueError: If the window is below 1.
    """

    def __init__(self, model: Any, window: int) -> None:
        if window < 1:
            raise ValueError(f"window: expected a number of layers from 1 on, got {window}")
        self.model, self.window = model, window
        self.layers = decoder_layers(model)[1]
        self.modules: dict[Kind, list[nn.Module]] = {}
        #: Why some kinds cannot be traced.
        self.missing: dict[Kind, str] = {}
        depth = range(len(self.layers))
        try:
            self.modules["mlp"] = [find_site(model, layer).projection for layer in depth]
        except UnsupportedModelError as error:
            self.missing["mlp"] = str(error)
        try:
            self.modules["attention"] = [find_attention_output(model, layer) for layer in depth]
        except UnsupportedModelError as error:
            self.missing["attention"] = str(error)
        self._whole_rows: bool | None = None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of states that can be restored in this model."""
        return tuple(kind for kind in KINDS if kind not in self.missing)

    @torch.no_grad()
    def trace(self, fact: Fact, noise: Tensor) -> Trace:
        """Trace one fact.

        Args:
            fact: The fact.
            noise: Noise for the embeddings of the subject's tokens, ``[samples, subject tokens, hidden]``.
        """
        with frozen(self.model):
            clean, corrupted, runs = self._run(fact, noise)
            if self._whole_rows is None and len(fact.ids) > 1:
                self._check(fact, runs, corrupted)
            mean, tokens, depth = float(corrupted.exp().mean()), len(fact.ids), len(self.layers)
            restored = {
                # Nothing is corrupted before the subject, and the last layer's output affects only its own token.
                kind: torch.full((tokens, depth), mean, dtype=torch.float64)
                for kind in self.kinds
            }
            restored["hidden"][-1, -1] = clean
            for token in range(fact.subject[0], tokens):
                for group in self._groups(len(noise) * (tokens - token)):
                    found = self._restore(fact, runs, token, group).exp().mean(1)
                    for restoration, probability in zip(group, found.tolist(), strict=True):
                        restored[restoration.kind][token, restoration.layer] = probability
        return Trace(clean, mean, restored)

    def _groups(self, size: int) -> Iterator[list[_Restoration]]:
        """Yield all restorations at a token, in groups that share a forward. Each has ``size`` tokens."""
        depth, window = len(self.layers), self.window
        wanted = [_Restoration("hidden", layer, layer + 1, layer + 1) for layer in range(depth - 1)]
        wanted += [
            # As published: an even window has one more layer below its centre than above it.
            _Restoration(kind, layer, max(0, layer - window // 2), min(depth, layer + (window + 1) // 2))
            for kind in self.modules
            for layer in range(depth)
        ]
        wanted.sort(key=lambda restoration: restoration.start)
        together = max(1, TOKENS_PER_FORWARD // size)
        for first in range(0, len(wanted), together):
            yield wanted[first : first + together]

    def _run(self, fact: Fact, noise: Tensor) -> tuple[float, Tensor, _Runs]:
        """Return the answer's clean probability, its log-probability for each sample of noise, and the runs."""
        model, tokens, samples = self.model, len(fact.ids), len(noise)
        ids = torch.tensor([fact.ids], device=model.device)
        answers: list[Any] = []
        with ExitStack() as stack:
            inputs = [stack.enter_context(capture_input(layer, slice(None))) for layer in self.layers]
            outputs = {
                kind: [stack.enter_context(capture_columns(module, 1, slice(None))) for module in modules]
                for kind, modules in self.modules.items()
            }
            handle = self.layers[0].register_forward_hook(lambda _, __, output: answers.append(layer_answer(output)))
            stack.callback(handle.remove)
            clean = self._answer(fact, ids, {"use_cache": False})
        first, end = fact.subject

        def corrupt(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
            embedded = embedded.clone()
            embedded[:, first:end] += noise.to(embedded)
            return embedded

        cache = DynamicCache()
        with ExitStack() as stack:
            stack.callback(model.get_input_embeddings().register_forward_hook(corrupt).remove)
            seen = [stack.enter_context(capture_input(layer, slice(None))) for layer in self.layers]
            corrupted = self._answer(fact, ids.expand(samples, tokens), {"past_key_values": cache, "use_cache": True})
        runs = _Runs(
            clean=[state["hidden"][0] for state in inputs],
            outputs={kind: [state["output"][0] for state in states] for kind, states in outputs.items()},
            corrupted=[state["hidden"] for state in seen],
            cache=[(layer.keys, layer.values) for layer in cache.layers],
            answer=answers[0],
        )
        return float(clean.exp()), corrupted, runs

    def _restore(
        self, fact: Fact, runs: _Runs, token: int, group: Sequence[_Restoration], whole: bool | None = None
    ) -> Tensor:
        """Log-probabilities of the answer with each of a group's restorations, ``[group, samples]``."""
        whole = bool(self._whole_rows) if whole is None else whole
        first = 0 if whole else token
        samples, depth = len(runs.corrupted[0]), len(self.layers)
        running = [samples * sum(one.start <= layer for one in group) for layer in range(depth)]
        hidden = torch.cat([runs.corrupted[one.start][:, first:] for one in group])
        rows = [list(range(place * samples, (place + 1) * samples)) for place in range(len(group))]
        for place, one in enumerate(group):
            if one.kind == "hidden":
                hidden[rows[place], token - first] = runs.clean[one.start][token]
        options: dict[str, Any] = {"use_cache": False}
        if first:
            start = group[0].start
            kept = []
            for (keys, values), here in zip(runs.cache[start:], running[start:], strict=True):
                copies = (here // samples, 1, 1, 1)
                kept.append((keys[:, :, :first].repeat(copies), values[:, :, :first].repeat(copies)))
            options = {"past_key_values": cache_of(kept, start), "use_cache": True}
        ids = torch.tensor([fact.ids[first:]], device=hidden.device).expand(len(hidden), -1)
        with ExitStack() as stack:
            for kind, modules in self.modules.items():
                for layer, module in enumerate(modules):
                    chosen = [
                        row
                        for place, one in enumerate(group)
                        if one.kind == kind and one.start <= layer < one.end
                        for row in rows[place]
                    ]
                    if chosen:
                        value = runs.outputs[kind][layer][token]
                        stack.enter_context(put_at_column(module, value, running[layer], chosen, token - first))
            stack.enter_context(join_layers(self.model, hidden, running, runs.answer))
            return self._answer(fact, ids, options, first).view(len(group), samples)

    def _answer(self, fact: Fact, ids: Tensor, options: dict[str, Any], first: int = 0) -> Tensor:
        """Log-probability of the answer's first token after the prompt, ``[rows]`` in float64 on the CPU."""
        rows, length = len(ids), len(fact.ids)
        mask = torch.ones(rows, length, dtype=torch.long, device=ids.device)
        positions = torch.arange(first, length, device=ids.device).expand(rows, -1)
        last = torch.full((rows,), length - first - 1, device=ids.device)
        with head_on(self.model, torch.arange(rows, device=ids.device), last):
            logits = self.model(input_ids=ids, **options, **forward_masks(self.model, mask, positions)).logits[0]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found: Tensor = wide.log_softmax(-1)[:, fact.answer]
        return found.double().cpu()

    def _check(self, fact: Fact, runs: _Runs, corrupted: Tensor) -> None:
        """Find out whether forwards can continue from a cached prefix, by restoring nothing."""
        nothing = [_Restoration("mlp", 0, 0, 0)]
        token = max(1, fact.subject[1] - 1)
        largest = LARGEST_ERROR.get(runs.corrupted[0].dtype, 0.2)
        for whole in (False, True):
            try:
                found = self._restore(fact, runs, token, nothing, whole)[0]
                error = float((found - corrupted).abs().max())
            except torch.OutOfMemoryError:
                raise
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as failure:
                reason = f"{type(failure).__name__}: {failure}"  # another kind of cache may raise this
                continue
            if error <= largest or not bool(corrupted.isfinite().all()):
                if whole:
                    log.warning(
                        "%s cannot continue from a cached prefix (%s): every restoration runs whole rows, which is "
                        "slower",
                        type(self.model).__name__,
                        reason,
                    )
                self._whole_rows = whole
                return
            reason = f"the answer's log-probability is off by {error:.1g}"
        raise UnsupportedModelError(f"{type(self.model).__name__} cannot be run from a layer on ({reason})")
