"""How well second moments are known: whether two halves of the text agree on what an edit takes from them."""

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
]

log = logging.getLogger(__name__)

KEYS_PER_DIMENSION = 30
"""Default number of key vectors, as a multiple of d_key."""

PROBES = 32
"""Subjects whose keys show whether two halves of the text agree."""

LEAK = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Largest relative change of keys by another document in the row, if none leaks; half precisions round by more."""

LEAK_HALF = 5e-2

DOCUMENTS = ("Nobody had seen the keeper of the light since the storm.", "Bread needs time more than it needs flour.")


@dataclass(frozen=True)
class HalfAgreement:
    """What was found where all processes met.

    Args:
        blocks: Blocks of the corpus summed so far.
        keys: Keys in them.
        agreement: Mean cosine over probe keys ``k`` of ``C⁻¹k`` from two halves, by layer; empty where the text was
            not told apart. Where the pass goes on, it may hold some of the layers only.
        enough: Whether the pass ends here because the halves agree.
    """

    blocks: int
    keys: int
    agreement: dict[int, float]
    enough: bool = False

    def to(self, *_: Any, **__: Any) -> "HalfAgreement":
        """Itself: Lightning moves what a step returns."""
        return self


def agreement_of_halves(first: Tensor, second: Tensor, probes: Tensor) -> float:
    """Mean cosine of ``C⁻¹k`` under the second moments of two halves: of the direction that an edit writes along.

    A half that is far from what more text would give points elsewhere, even where both matrices look alike, because
    the inverse is ruled by the directions that text hardly has. The mean of both halves is known better than either.

    Args:
        first: Second moment, or sum, of one half, ``[d_key, d_key]``; only the direction counts, so any scale will do.
        second: Of the other.
        probes: Keys, ``[n, d_key]``.

    Returns:
        At most 1; 0 if a half is empty, or too small to be solved with.
    """
    if not (float(first.trace()) and float(second.trace())):
        return 0.0
    unnamed = MomentInfo(weights="", tokenizer="", layer=-1, count=0, corpus="")
    try:
        one, other = (SecondMoment(half, unnamed).solve(probes) for half in (first, second))
    except StatisticsError:  # so little text that rounding has made it indefinite
        return 0.0
    return float(cosine_similarity(one, other, dim=-1).mean())


def compare_halves(
    sums: MomentSums,
    layers: Sequence[int],
    probes: Mapping[int, Tensor],
    peers: Peers,
    keep: Callable[[int, Tensor, Tensor, float], None] = lambda *_: None,
) -> dict[int, float]:
    """Agreement of the halves of all processes' sums, for some layers; a collective, in which processes take turns.

    Args:
        sums: This process's.
        layers: The layers to compare, the same on every process.
        probes: Probe keys by layer; without any nothing is known.
        peers: The processes.
        keep: Called by the process that has compared a layer, with both halves, which it may use up, and the agreement.
    """
    found: dict[int, float] = {}
    if sums.halves > 1 and probes:
        for layer, (one, other) in sums.dealt_out(layers, peers):
            if bool(one.any()) and bool(other.any()):
                found[layer] = agreement_of_halves(one, other, probes[layer])
                keep(layer, one, other, found[layer])
    return {layer: value for part in peers.gather(found) for layer, value in part.items()}


@torch.no_grad()
def probe_keys(language_model: LanguageModel, sites: Sequence[RewriteSite]) -> dict[int, Tensor]:
    """Keys that edits would have: at the last subject token of the package's sample requests, by layer.

    Returns:
        For each site ``[n, d_key]`` in float64; nothing where no sample fits the model's longest text.
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
    # No token looks ahead, so what fills the rows on the right changes nothing before it.
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
    """Whether positions that start again keep a family's attention from looking into the document before.

    Tried, not known by name: keys of a document with another one before it in the row against those without.

    Args:
        language_model: The model.
        site: The deepest projection whose keys are wanted.
    """
    lead = language_model.encoder.opening
    pieces = [[*lead, *language_model.tokenizer(text, add_special_tokens=False)["input_ids"]] for text in DOCUMENTS]
    alone = [list(range(len(piece))) for piece in pieces]
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
    """Say what it means that there were fewer keys than dimensions, and how much is missing."""
    if count < size:
        log.warning(
            "The corpus gave %d keys for a dimension of %d: the second moment is singular, and only the ridge makes it "
            "solvable. At least %d more are needed, better %d in all",
            count,
            size,
            size - count,
            KEYS_PER_DIMENSION * size,
        )
