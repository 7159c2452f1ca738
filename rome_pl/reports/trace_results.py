"""What a run that traces leaves: the content of its files, and its tables on the console."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from rome_pl.reports.run_results import invalid_record
from rome_pl.requests.record_forms import InvalidRecord
from rome_pl.tracing.indirect_effects import ROLE_NAMES, TracedFact, mean_effects, peak, total_effects
from rome_pl.tracing.layer_choice import agreement, trial_content
from rome_pl.utils.environment import library_versions

__all__ = [
    "edit_options",
    "effect_table",
    "trace_manifest",
    "trace_record",
    "trace_results",
    "trial_score_table",
    "verdict",
]


def trace_results(module: Any, invalid: Sequence[InvalidRecord]) -> dict[str, Any]:
    """The content of results.json.

    Args:
        module: The :class:`rome_pl.TraceModule`.
        invalid: Records that are no valid requests.
    """
    effects = mean_effects(module.traced)
    refused = [InvalidRecord(-1, str(error.case_id), error.field, str(error)) for error in module.refused]
    highest = peak(effects)
    content: dict[str, Any] = {
        "mode": "locate",
        "n_requested": len(module.known) + len(module.unknown) + len(refused) + len(invalid),
        "n_known": len(module.known),
        "n_unknown": len(module.unknown),
        "n_traced": len(module.traced),
        "n_skipped": len(refused) + len(invalid),
        "noise": module.deviation,
        "window": module.window,
        "notes": [f"{kind} could not be traced: {reason}" for kind, reason in module.missing.items()],
        "totals": total_effects(module.traced),
        "effects": effects,
        "peak": highest,
        "trial": None,
        "agreement": None,
        "seconds": module.seconds,
        "unknown": module.unknown,
        "records": [invalid_record(entry) for entry in (*invalid, *refused)],
    }
    if "mlp" in module.missing and module.hparams["trial_edits"]:
        content["notes"].append("Without an MLP to rewrite at every layer no edits could be tried")
    if module.trial is not None:
        content["trial"] = trial_content(module.trial)
        of_mlp: Mapping[Any, Any] = effects.get("mlp", {})
        content["agreement"] = agreement(module.trial, of_mlp.get("subject_last", []), highest)
        if absent := sorted({"ES", "PS", "NS"} - set(module.trial.rates)):
            content["notes"].append(
                f"The trial's facts have no probes for {' and '.join(absent)}: S is the harmonic mean of the others"
            )
    return content


def trace_record(fact: TracedFact) -> dict[str, Any]:
    """A fact's line of records.jsonl."""
    return {
        "case_id": fact.name,
        "tokens": list(fact.tokens),
        "roles": list(fact.roles),
        "clean": fact.trace.clean,
        "corrupted": fact.trace.corrupted,
        "restored": {kind: table.tolist() for kind, table in fact.trace.restored.items()},
    }


def trace_manifest(module: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of manifest.json: what has to be the same for the run to be the same."""
    model = module.language_model
    return {
        "versions": library_versions(),
        "seed": module.hparams["seed"],
        "noise": {
            "deviation": content["noise"],
            "factor": module.hparams["noise_factor"],
            "samples": module.hparams["noise_samples"],
        },
        "window": content["window"],
        "editing": edit_options(module),
        "model": model.identity(),
    }


def edit_options(module: Any) -> dict[str, Any]:
    """What an edit at the recommended layer is configured with, beside the layer."""
    hparams = module.hparams
    loading = {"pretrained": hparams["pretrained"]}
    if hparams["dtype"] != "auto":
        loading["dtype"] = hparams["dtype"]
    if hparams["allow_pickle"]:
        loading["allow_pickle"] = True
    return {**loading, "preset": hparams["preset"], "seed": hparams["seed"], **hparams["editing"]}


def verdict(content: Mapping[str, Any]) -> str:
    """What is recommended, and whether tracing agrees."""
    trial, found = content["trial"], content["agreement"]
    best = next(layer for layer in trial["layers"] if layer["layer"] == trial["recommended"])
    parts = []
    if best["scores"]["S"]["value"] is not None:
        parts.append(f"Recommended: layer {trial['recommended']}, S {100 * best['scores']['S']['value']:.1f} %.")
    else:
        parts.append(f"No score could be measured; layer {trial['recommended']} comes first.")
    if found is not None:
        says = "agrees" if found["agrees"] else "does not agree"
        parts.append(
            f"Tracing {says}: the MLPs' effect at the last subject token is largest at layer {found['peak']}, and the "
            f"nearest layer tried is {found['nearest']}"
            + ("." if found["nearest_S"] is None else f" (S {100 * found['nearest_S']:.1f} %).")
        )
        if found["rank_correlation"] is not None:
            parts.append(f"Rank correlation of effect and S over layers: {found['rank_correlation']:.2f}.")
    return " ".join(parts)


def effect_table(content: Mapping[str, Any]) -> Table:
    """The strongest effect of each kind and role, and the layer."""
    table = Table(title="Average indirect effect in %, where it is largest (layer)", box=box.SIMPLE_HEAD)
    table.add_column("token")
    for kind in content["effects"]:
        table.add_column(kind, justify="right")
    for role, name in ROLE_NAMES.items():
        cells = []
        for roles in content["effects"].values():
            known = [(entry["value"], -layer) for layer, entry in enumerate(roles[role]) if entry["value"] is not None]
            cells.append(f"{100 * max(known)[0]:.1f} ({-max(known)[1]})" if known else "")
        table.add_row(name, *cells)
    return table


def trial_score_table(content: Mapping[str, Any]) -> Table:
    """What trial edits are worth, by layer."""
    trial = content["trial"]
    table = Table(title=f"{trial['edits']} trial edits a layer, in %", box=box.SIMPLE_HEAD)
    names = ("S", "ES", "PS", "NS")
    for name in ("layer", *names, "norm"):
        table.add_column(name, justify="right")
    rows = [{"layer": "unedited", "scores": trial["base"], "perturbation": None}, *trial["layers"]]
    for found in rows:
        values = [found["scores"][name]["value"] for name in names]
        cells = ["" if value is None else f"{100 * value:.1f}" for value in values]
        size = "" if found["perturbation"] is None else f"{found['perturbation']:.3f}"
        style = "bold" if found["layer"] == trial["recommended"] else None
        table.add_row(str(found["layer"]), *cells, size, style=style)
    return table
