"""Choosing a layer: what trial edits at several layers say, and whether causal tracing says the same.

Where a fact is read from and where it is best rewritten are two questions: the layer at which tracing finds most is no
good guide to the one at which edits do best (Hase et al. 2023). So the trial decides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import yaml
from torch import Tensor

from rome_pl.metrics.intervals import Entry, bootstrap_interval, entry, harmonic_mean
from rome_pl.metrics.probes import ProbeScores
from rome_pl.metrics.scores import record_values
from rome_pl.metrics.scores import summarise as summarise_scores
from rome_pl.utils.markdown import markdown_table

__all__ = [
    "LayerScores",
    "Trial",
    "agreement",
    "edit_config",
    "recommend",
    "score_layer",
    "trial_content",
    "trial_table",
]

RATES = ("ES", "PS", "NS")


@dataclass(frozen=True)
class LayerScores:
    """What trial edits at one layer are worth.

    Args:
        layer: The layer.
        scores: ES, PS and NS right after each edit, and S, the harmonic mean of those that the facts have probes for.
        perturbation: Mean norm of an edit's change, relative to the weight's; ``None`` where none could be written.
        applied: Edits that were not rejected.
        seconds: What they took.
    """

    layer: int
    scores: dict[str, Entry]
    perturbation: float | None
    applied: int
    seconds: float


@dataclass(frozen=True)
class Trial:
    """Trial edits at several layers.

    Args:
        layers: What they are worth, by layer.
        base: The scores of the unedited model.
        edits: Number of facts that were edited at each layer.
        rates: The scores that S is made of.
    """

    layers: tuple[LayerScores, ...]
    base: dict[str, Entry]
    edits: int
    rates: tuple[str, ...]

    @property
    def recommended(self) -> LayerScores:
        """The best layer."""
        return recommend(self.layers)


def score_layer(
    measured: Mapping[str, ProbeScores], base: Mapping[str, ProbeScores]
) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """ES, PS, NS and S of edits, and which of the three S is made of: those that some fact has probes for.

    Args:
        measured: What was measured right after each edit, by name.
        base: The same on the unedited model.
    """
    summary = summarise_scores(measured, base)
    rates = tuple(name for name in RATES if summary[name]["n"])
    values = [record_values(scores, base.get(name)) for name, scores in measured.items()]
    rows = [[found[name] for name in rates] for found in values if rates and all(name in found for name in rates)]
    scores = {name: summary[name] for name in RATES}
    scores["S"] = entry(
        torch.tensor(rows, dtype=torch.float64).reshape(len(rows), max(1, len(rates))),
        lambda kept: bootstrap_interval(kept, lambda resamples: harmonic_mean(resamples.mean(1))),
        lambda kept: harmonic_mean(kept.mean(0)),
    )
    return scores, rates


def recommend(layers: Sequence[LayerScores]) -> LayerScores:
    """The layer with the best S; of several equal ones that with the smaller perturbation, then the earlier one."""

    def rank(found: LayerScores) -> tuple[float, float, int]:
        score, size = found.scores["S"]["value"], found.perturbation
        return (-1.0 if score is None else float(score), float("-inf") if size is None else -size, -found.layer)

    return max(layers, key=rank)


def agreement(trial: Trial, effects: Sequence[Entry], peak: int | None) -> dict[str, Any] | None:
    """Whether causal tracing points to the layer that the trial recommends.

    Args:
        trial: The trial.
        effects: Average indirect effect of the MLPs' output at the subject's last token, by layer.
        peak: The layer where it is largest.

    Returns:
        The peak, the nearest layer that was tried and its S, whether that is the recommended one, and Spearman's rank
        correlation of effect and S over the layers tried; ``None`` without a peak.
    """
    if peak is None:
        return None
    nearest = min(trial.layers, key=lambda found: (abs(found.layer - peak), found.layer))
    pairs = [
        (effects[found.layer]["value"], found.scores["S"]["value"])
        for found in trial.layers
        if found.scores["S"]["value"] is not None
    ]
    columns = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).unbind(1)
    return {
        "peak": peak,
        "nearest": nearest.layer,
        "nearest_S": nearest.scores["S"]["value"],
        "agrees": nearest.layer == trial.recommended.layer,
        "rank_correlation": _correlation(*map(_ranks, columns)),
    }


def trial_content(trial: Trial) -> dict[str, Any]:
    """What results.json says of a trial."""
    return {
        "recommended": trial.recommended.layer,
        "edits": trial.edits,
        "S_of": list(trial.rates),
        "base": trial.base,
        "layers": [asdict(found) for found in trial.layers],
    }


def trial_table(content: Mapping[str, Any]) -> str:
    """The trial in results.json as a table in Markdown, in per cent; the recommended layer in bold."""
    trial = content["trial"]
    names = ("S", *RATES)
    rows = [["unedited", *(_cell(trial["base"][name]) for name in names)]]
    for found in trial["layers"]:
        layer = f"**{found['layer']}**" if found["layer"] == trial["recommended"] else str(found["layer"])
        size = "" if found["perturbation"] is None else f"{found['perturbation']:.3f}"
        rows.append([layer, *(_cell(found["scores"][name]) for name in names), size, str(found["applied"])])
    columns = ("layer", *names, "relative norm", "applied")
    return markdown_table(columns, rows, numbers=len(columns), escape=str) + (
        f"\n\n{trial['edits']} single edits a layer, in % [95 % interval]; S is the harmonic mean of "
        f"{', '.join(trial['S_of'])}. Rejected edits count with what the model says without them.\n"
    )


def edit_config(content: Mapping[str, Any], model: Mapping[str, Any], command: str) -> str:
    """A configuration of ``rome-pl edit`` for the recommended layer, with what speaks for it in its header.

    Args:
        content: What results.json holds.
        model: Options of :class:`rome_pl.RomeModule`, without ``layers``.
        command: How it is run.
    """
    trial = content["trial"]
    header = [
        f"Edits {model['pretrained']} at layer {trial['recommended']}, which rome-pl locate recommends.",
        f"Run:   {command}",
        "Evidence:",
        *trial_table(content).splitlines(),
    ]
    options = {"model": {**model, "layers": [trial["recommended"]]}, "trainer": {"default_root_dir": "runs/edit"}}
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header)
    return comment + yaml.safe_dump(options, sort_keys=False, allow_unicode=True)


def _cell(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return ""
    return f"{100 * found['value']:.1f} [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 on; equal values share the mean of theirs."""
    below = (values.unsqueeze(0) < values.unsqueeze(1)).sum(1)
    equal = (values.unsqueeze(0) == values.unsqueeze(1)).sum(1)
    return below + (equal + 1) / 2


def _correlation(one: Tensor, two: Tensor) -> float | None:
    """Pearson's correlation, which of ranks is Spearman's; ``None`` of fewer than three, or where all are equal.

    torchmetrics adds 1e-6 to the denominator: of three layers in the same order it says 0.9999985.
    """
    one, two = (values.double() - values.double().mean() for values in (one, two))
    size = one.norm() * two.norm()
    return float(one @ two / size) if len(one) > 2 and size > 0 else None
