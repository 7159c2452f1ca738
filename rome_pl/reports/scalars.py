"""A run as loggers take it: scalars of each edit and at the end, settings, and TensorBoard's charts."""

from collections.abc import Mapping
from typing import Any

from rome_pl.editing.edit import Edit
from rome_pl.editing.session import EditSession

__all__ = ["charts", "edit_scalars", "final_scalars", "run_settings"]

_CHARTS = {
    "What the edits do": {
        "right after each edit, mean so far": ["Multiline", [r"running/(ES|PS|NS)$"]],
        "probability of the new answer": ["Multiline", [r"edit/probability_(before|after)$"]],
        "answers generated greedily, mean so far": ["Multiline", [r"running/re(write|phrase)_match$"]],
    },
    "How they go": {
        "loss at the end": ["Multiline", [r"edit/(loss|nll|kl)$"]],
        "norm of each update": ["Multiline", [r"edit/update_norm$"]],
        "evaluations": ["Multiline", [r"edit/steps$"]],
        "seconds": ["Multiline", [r"edit/seconds_.*"]],
    },
}
_OF_ACCUMULATED = {
    "What they add up to": {"norm of the accumulated change": ["Multiline", [r"stream/weight_change$"]]},
}
_OF_RETENTION = {
    "What earlier edits are worth": {
        "earlier edits, later in the stream": ["Multiline", [r"retention/(ES|PS|NS)$"]],
        "held-out perplexity": ["Multiline", [r"retention/perplexity$"]],
    },
}


def charts(accumulated: bool, retention: bool) -> dict[str, Any]:
    """TensorBoard's custom scalars: what belongs together, in a chart each.

    Args:
        accumulated: Whether edits accumulate.
        retention: Whether earlier edits are measured again.
    """
    return {**_CHARTS, **(_OF_ACCUMULATED if accumulated else {}), **(_OF_RETENTION if retention else {})}


def edit_scalars(edit: Edit) -> dict[str, float]:
    """What is known of an edit: probabilities, the search's last evaluation, the update's norm, seconds."""
    scalars = {f"edit/seconds_{stage}": seconds for stage, seconds in edit.seconds.items()}
    for name, value in (("probability_before", edit.before), ("probability_after", edit.after)):
        if value is not None:
            scalars[f"edit/{name}"] = value
    if edit.steps:
        last = edit.steps[-1]
        scalars |= {"edit/loss": last.loss, "edit/nll": last.nll, "edit/kl": last.kl, "edit/steps": len(edit.steps)}
    if edit.written is not None:
        scalars["edit/update_norm"] = edit.written.norm
    return scalars


def final_scalars(content: Mapping[str, Any]) -> dict[str, float]:
    """The scores of the final model, ES, PS, NS and S first; where there is none, those right after each edit.

    Args:
        content: What results.json holds.
    """
    stage = "final" if content["final"] is not None else "immediate"
    names = sorted(content[stage], key=lambda name: name not in ("ES", "PS", "NS", "S"))
    scalars = {f"{stage}/{name}": content[stage][name]["value"] for name in names}
    scalars |= {f"perplexity/{name}": value for name, value in content["perplexity"].items()}
    scalars["final/divergence"] = content["divergence"]
    return {name: value for name, value in scalars.items() if value is not None}


def run_settings(hparams: Mapping[str, Any], session: EditSession, data: Any) -> dict[str, Any]:
    """What tells one run from another in TensorBoard's HParams; what is not set is no column there.

    Args:
        hparams: The module's options.
        session: The run.
        data: Its data module; ``None``: it has none.
    """
    chosen = {name: value for name, value in hparams.items() if value is not None and not name.startswith("_")}
    return chosen | {
        "layers": ", ".join(map(str, session.layers.main)),
        "data": str(getattr(data, "path", "")),
        "requests": len(session.requests),
    }
