"""The pictures of a run: each is drawn in one place, from the run's results, for TensorBoard, PNG files and the report.

A function returns ``None`` where the data for its picture are missing. Pictures are :class:`matplotlib.figure.Figure`
objects of their own: pyplot would keep them alive.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, wraps
from typing import Any

import torch

from rome_pl.edit import Edit
from rome_pl.metrics.intervals import wilson_interval
from rome_pl.metrics.scores import SCORES

__all__ = [
    "CAPTIONS",
    "accuracy_trend",
    "draw_figures",
    "loss_curves",
    "perplexity_trend",
    "png",
    "probabilities",
    "relation_bars",
    "retention_curves",
    "weight_norms",
]

Figure = Any
"""matplotlib's, which is imported when something is drawn: it takes half a second."""
Content = Mapping[str, Any]
"""What results.json holds."""
Records = Sequence[Mapping[str, Any]]
"""What records.jsonl holds."""

CAPTIONS = {
    "accuracy": "Accuracy over the stream: means over the edits so far on the unedited model and right after each edit, "
    "and over all records at the end, with 95 % intervals.",
    "retention": "Retention: what earlier edits are worth later in the stream, and the share of edits that had taken and "
    "still hold, by the number of edits made since.",
    "relations": "Scores by relation, with 95 % intervals and the number of records.",
    "probabilities": "Probability of the new answer (geometric mean over its tokens) before and after each edit.",
    "loss_curves": "Loss and probability of the target during the optimisation of each value.",
    "weight_change": "Norm of the weight's change so far, relative to the original weight, and of each update.",
    "perplexity": "Perplexity of held-out text over the stream.",
}
"""What each picture shows, in the order in which reports show them."""

LABELLED = 10
"""Most curves of one picture that get a label and a colour each; more are drawn as a bundle with its median."""
LABEL = 50
"""Longest label of a curve, in characters; of a longer one the end is shown, where the answer stands."""
RELATIONS = 20
"""Most bars of one panel; what is left shares the last one."""
AGES = 8
"""Most groups of ages in the retention curve."""

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#7B4FA3", GREY)
"""Okabe and Ito's colours, which colour-blind people can tell apart, and three more."""

PANELS = (
    (("ES", "rewrite_acc"), "the edit itself"),
    (("PS", "rephrase_acc"), "paraphrases"),
    (("NS", "locality", "neighbour_acc", "locality_acc"), "what shall stay"),
)
"""For each panel the scores it may show, the first one that there is, and what they are about."""

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "errorbar.capsize": 3,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "text.usetex": False,
}


def draw_figures(
    content: Content, records: Records, edits: Sequence[Edit], changes: Mapping[int, float]
) -> dict[str, Figure]:
    """All pictures of a run that there are data for, by name.

    Args:
        content: What results.json holds.
        records: What records.jsonl holds.
        edits: The run's edits, for their loss curves.
        changes: Norm of the weight's change, relative to the original, by number of edits.
    """
    ordered = sorted(edits, key=lambda edit: edit.index)
    figures = {
        "accuracy": accuracy_trend(content, records),
        "retention": retention_curves(content, records),
        "relations": relation_bars(records),
        "probabilities": probabilities(records),
        "loss_curves": loss_curves(ordered),
        "weight_change": weight_norms(records, changes),
        "perplexity": perplexity_trend(content),
    }
    return {name: figures[name] for name in CAPTIONS if figures[name] is not None}


def png(figure: Figure) -> bytes:
    """A picture as a PNG file's content."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _styled[**P, T](draw: Callable[P, T]) -> Callable[P, T]:
    """Draw in this module's style, whatever the user's own settings of matplotlib."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context({**_STYLE, "font.family": list(_fonts()[0])}):
            return draw(*args, **kwargs)

    return styled
