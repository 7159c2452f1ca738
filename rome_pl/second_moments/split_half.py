"""The accuracy of second moments: whether two halves of the text give the same direction of an edit."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from rome_pl.model.architecture import RewriteSite
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import RequestError
from rome_pl.requests.record_forms import parse_records, read_records
from rome_pl.second_moments.moment_sums import MomentSums, keys_of
from rome_pl.second_moments.second_moment import MomentInfo, SecondMoment, StatisticsError
from rome_pl.utils.distributed import Peers
from rome_pl.utils.restored_state import frozen

__all__ = [
    "KEYS_PER_DIMENSION",
    "HalfAgreement",
    "agreement_of_halves",
    "compare_halves",
    "keeps_documents_apart",
    "probe_keys",
    "warn_of_little_text",
    "warn_of_unknown_experts",
]

log = logging.getLogger(__name__)

KEYS_PER_DIMENSION = 30
"""Default number of key vectors, as a multiple of d_key."""

PROBES = 32
"""Number of probe keys with which halves are compared."""

LEAK = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Largest relative change of keys by another document in the row that counts as rounding; larger in half precision."""

LEAK_HALF = 5e-2

DOCUMENTS = ("Nobody had seen the keeper of the light since the storm.", "Bread needs time more than it needs flour.")


@dataclass(frozen=True)
class HalfAgreement:
    """The agreement of halves at a meeting of all processes.

    Args:
        blocks: Blocks of the corpus summed so far.
        keys: Keys in them.
        agreement: Mean cosine over probe keys ``k`` of ``C⁻¹k`` from two halves, by layer. Empty if the text was not
            divided. While the pass continues, it may hold only some layers.
        enough: Whether the halves agree, so that the pass ends.
    """

    blocks: int
    keys: int
    agreement: dict[int, float]
    enough: bool = False

    def to(self, *_: Any, **__: Any) -> "HalfAgreement":
        """Return itself: Lightning moves the result of a step to a device."""
        return self


def agreement_of_halves(
    first: Tensor, second: Tensor, probes: Tensor, tokens: Sequence[Tensor | None] = (None, None)
) -> float:
    """Mean cosine of ``C⁻¹k``, the direction of an edit, under the second moments of two halves.

    If there is too little text, the directions differ even if both matrices look alike, because the inverse is
    dominated by directions that are rare in text. The mean of both halves is more accurate than either.

    Args:
        first: Second moment, or sum, of one half, ``[d_key, d_key]``. Its scale does not matter.
        second: That of the other half.
        probes: Keys, ``[n, d_key]``.
        tokens: Of a mixture: how many tokens each expert got in each half.

    Returns:
        At most 1; 0 if a half is empty or too small to be solved with.
    """
    if not (bool(first.any()) and bool(second.any())):
        return 0.0
    unnamed = MomentInfo(weights="", tokenizer="", layer=-1, count=0, corpus="")
    try:
        one, other = (
            SecondMoment(half, unnamed, got).solve(probes) for half, got in zip((first, second), tokens, strict=True)
        )
    except StatisticsError:  # with little text, rounding makes it indefinite
        return 0.0
    return float(cosine_similarity(one, other, dim=-1).mean())


def compare_halves(
    sums: MomentSums,
    layers: Sequence[int],
    probes: Mapping[int, Tensor],
    peers: Peers,
    keep: Callable[[int, Tensor, Tensor, float], None] = lambda *_: None,
) -> dict[int, float]:
    """Compare the halves of all processes' sums, for some layers. A collective, in which processes take turns.

    Args:
        sums: The sums of this process.
        layers: The layers to compare, the same on every process.
        probes: Probe keys by layer. If empty, nothing is compared.
        peers: The processes.
        keep: Called by the process that has compared a layer, with both halves, which may be overwritten, and the
            agreement.
    """
    found: dict[int, float] = {}
    if sums.halves > 1 and probes:
        tokens = sums.tokens_of_all(peers)
        for layer, (one, other) in sums.dealt_out(layers, peers):
            if bool(one.any()) and bool(other.any()):
                found[layer] = agreement_of_halves(one, other, probes[layer], tokens.get(layer, (None, None)))
                keep(layer, one, other, found[layer])
    return {layer: value for part in peers.gather(found) for layer, value in part.items()}


@torch.no_grad()
def probe_keys(language_model: LanguageModel, sites: Sequence[RewriteSite]) -> dict[int, Tensor]:
    """Compute keys of edits: at the last subject token of the package's sample requests, by layer.

    Returns:
        For each site ``[n, d_key]`` in float64. Empty if no sample fits the model's context.
    """
    path = Path(str(files("rome_pl") / "assets" / "sample_records.json"))
    requests, _ = parse_records(read_records(path)[:PROBES], str(path), None)
    texts: list[tuple[int, ...]] = []
    for request in requests:
        try:
            row = language_model.encoder.edit(request).rows[0]
        except RequestError:  # longer than the model reads
            continue
        texts.append(row.ids[: row.lookup + 1])
    found: dict[int, Tensor] = {}
    if not texts:
        return found
    # No token looks ahead, so padding on the right has no effect.
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), language_model.encoder.pad_id)
    for place, text in enumerate(texts):
        ids[place, : len(text)] = torch.tensor(text)
    last = torch.tensor([place * width + len(text) - 1 for place, text in enumerate(texts)])

    def take(layer: int, keys: Tensor) -> None:
        found[layer] = keys[last.to(keys.device)].double()

    with frozen(language_model.model), keys_of(sites, take):
        language_model.model(input_ids=ids.to(language_model.device), use_cache=False)
    return found


@torch.no_grad()
def keeps_documents_apart(language_model: LanguageModel, site: RewriteSite) -> bool:
    """Whether positions that restart with a document keep attention within it.

    Tested, not known by name: compare the keys of a document with and without another one before it in the row.

    Args:
        language_model: The model.
        site: The deepest projection whose keys are wanted.
    """
    lead, first = language_model.encoder.opening, language_model.first_position
    if first is None:
        return False
    pieces = [[*lead, *language_model.tokenizer(text, add_special_tokens=False)["input_ids"]] for text in DOCUMENTS]
    alone = [list(range(first, first + len(piece))) for piece in pieces]
    rows = [(pieces[1], alone[1]), (pieces[0] + pieces[1], alone[0] + alone[1])]
    kept: list[Tensor] = []
    try:
        for ids, positions in rows:
            with frozen(language_model.model), keys_of([site], lambda _, keys: kept.append(keys.double())):
                language_model.model(
                    input_ids=torch.tensor([ids], device=language_model.device),
                    position_ids=torch.tensor([positions], device=language_model.device),
                    use_cache=False,
                )
    except TypeError:  # takes no positions
        return False
    without, within = kept[0], kept[1][-len(pieces[1]) :]
    tolerance = LEAK.get(next(language_model.model.parameters()).dtype, LEAK_HALF)
    return float((within - without).norm()) <= tolerance * float(without.norm())


def warn_of_little_text(size: int, count: int) -> None:
    """Warn if there were fewer keys than dimensions, with the number that is missing."""
    if count < size:
        log.warning(
            "The corpus gave %d keys for a dimension of %d: the second moment is singular, and only the ridge makes it "
            "solvable. At least %d more are needed, better %d in all",
            count,
            size,
            size - count,
            KEYS_PER_DIMENSION * size,
        )


def warn_of_unknown_experts(moment: SecondMoment) -> None:
    """Warn if experts of a mixture got fewer tokens than their keys have dimensions."""
    if moment.tokens is not None and None in moment.known:
        log.warning(
            "Layer %d: %d of %d experts got fewer tokens than their keys have dimensions (%d; the fewest %d). Edits do "
            "not write into them. Compute the second moment from more text to change that",
            moment.info.layer,
            moment.known.count(None),
            len(moment.known),
            moment.matrix.shape[-1],
            int(moment.tokens.min()),
        )
