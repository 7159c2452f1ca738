"""Writes what causal tracing and trial edits have found, shows it in TensorBoard, and prints it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich import box
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from rome_pl.drawing import Figure, pixels, png
from rome_pl.exports import write_lines
from rome_pl.files import whole_file
from rome_pl.layer_choice import agreement, edit_config, trial_content, trial_table
from rome_pl.records import InvalidRecord
from rome_pl.report import invalid_record, write_json, write_text
from rome_pl.second_moment import library_versions
from rome_pl.trace_figures import effect_maps, fact_maps, trial_curve
from rome_pl.trace_results import ROLE_NAMES, TracedFact, mean_effects, peak, total_effects, trace_table

__all__ = ["TraceReport"]


class TraceReport(Callback):
    """Writes ``results.json``, ``manifest.json``, ``records.jsonl``, ``table.md`` and ``figures/`` of tracing.

    All go below the Trainer's ``default_root_dir``. Scalars ``effect/KIND/ROLE`` and, after trial edits, ``trial/…`` go
    to every logger with the layer as the x axis; a TensorBoard logger gets the pictures too. After trial edits there is
    an ``edit.yaml``, with which ``rome-pl edit`` edits at the layer that did best.

    Args:
        pictures: Facts that get a picture of their own, the first ones.
    """

    def __init__(self, pictures: int = 3) -> None:
        self.pictures = pictures

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not hasattr(pl_module, "traced"):
            raise TypeError(f"TraceReport works with TraceModule, not with {type(pl_module).__name__}")
        content = self._write(trainer, pl_module)
        for kind, roles in content["effects"].items():
            for role, entries in roles.items():
                for layer, found in enumerate(entries):
                    if found["value"] is not None:
                        _log(trainer, {f"effect/{kind}/{role}": found["value"]}, layer)
        module: Any = pl_module
        pictures = {"effects": effect_maps(content)}
        pictures |= {
            f"fact_{place}": fact_maps(fact, module.window)
            for place, fact in enumerate(module.traced[: self.pictures], start=1)
        }
        _show(trainer, pictures)
        console = Console()
        console.print(_effect_table(content))
        for note in content["notes"]:
            console.print(note, markup=False, soft_wrap=True)
        console.print(
            f"{content['n_requested']} facts: {content['n_known']} known, {content['n_traced']} of them traced in "
            f"{content['seconds']:.0f} s; {content['n_unknown']} not known, {content['n_skipped']} skipped. Results in "
            f"{Path(trainer.default_root_dir) / 'results.json'}",
            soft_wrap=True,
        )

    def report_trial(self, trainer: Trainer, module: LightningModule) -> None:
        """Add what trial edits have shown (``module.trial``) to what is written, and print it."""
        content = self._write(trainer, module)
        for found in content["trial"]["layers"]:
            scores = {f"trial/{name}": entry["value"] for name, entry in found["scores"].items()}
            _log(trainer, {name: value for name, value in scores.items() if value is not None}, found["layer"])
        _show(trainer, {"trial": trial_curve(content)})
        folder = Path(trainer.default_root_dir)
        path = folder / "edit.yaml"
        command = f"rome-pl edit --config {shlex.quote(str(path))} --data.path FILE"
        write_text(path, edit_config(content, _edit_options(module), command))
        console = Console()
        console.print(_trial_table(content))
        console.print(_verdict(content), markup=False, soft_wrap=True)
        console.print(f"To edit there: {command}", markup=False, soft_wrap=True)

    @staticmethod
    def _write(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        module: Any = pl_module
        folder = Path(trainer.default_root_dir)
        invalid = getattr(trainer.datamodule, "invalid", [])  # type: ignore[attr-defined]  # set by Trainer.predict
        content = _results(module, invalid)
        write_json(folder / "results.json", content)
        write_json(folder / "manifest.json", _manifest(module, content))
        write_lines(folder / "records.jsonl", [_record(fact) for fact in module.traced])
        table = trace_table(content)
        if content["trial"] is not None:
            table += f"\n{trial_table(content)}\n{_verdict(content)}\n"
        write_text(folder / "table.md", table)
        return content


def _results(module: Any, invalid: list[InvalidRecord]) -> dict[str, Any]:
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
        "records": [invalid_record(record) for record in (*invalid, *refused)],
    }
    if module.trial is not None:
        content["trial"] = trial_content(module.trial)
        of_mlp: Mapping[Any, Any] = effects.get("mlp", {})
        content["agreement"] = agreement(module.trial, of_mlp.get("subject_last", []), highest)
        if absent := sorted({"ES", "PS", "NS"} - set(module.trial.rates)):
            content["notes"].append(
                f"The trial's facts have no probes for {' and '.join(absent)}: S is the harmonic mean of the others"
            )
    return content


def _record(fact: TracedFact) -> dict[str, Any]:
    return {
        "case_id": fact.name,
        "tokens": list(fact.tokens),
        "roles": list(fact.roles),
        "clean": fact.trace.clean,
        "corrupted": fact.trace.corrupted,
        "restored": {kind: table.tolist() for kind, table in fact.trace.restored.items()},
    }


def _manifest(module: Any, content: Mapping[str, Any]) -> dict[str, Any]:
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
        "editing": _edit_options(module),
        "model": {
            "source": model.source,
            "fingerprint": model.fingerprint,
            "tokenizer": model.tokenizer_fingerprint,
            "dtype": str(next(model.model.parameters()).dtype),
            "device": str(model.device),
        },
    }


def _edit_options(module: Any) -> dict[str, Any]:
    """What an edit at the recommended layer is configured with, beside the layer."""
    hparams = module.hparams
    loading = {"pretrained": hparams["pretrained"]}
    if hparams["dtype"] != "auto":
        loading["dtype"] = hparams["dtype"]
    if hparams["allow_pickle"]:
        loading["allow_pickle"] = True
    return {**loading, "preset": hparams["preset"], "seed": hparams["seed"], **hparams["editing"]}


def _verdict(content: Mapping[str, Any]) -> str:
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


def _log(trainer: Trainer, scalars: Mapping[str, float], layer: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=layer)


def _show(trainer: Trainer, figures: Mapping[str, Figure]) -> None:
    for name, figure in figures.items():
        with whole_file(Path(trainer.default_root_dir) / "figures" / f"{name}.png") as work:
            work.write_bytes(png(figure))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(f"figures/{name}", pixels(figure), 0, dataformats="HWC")


def _effect_table(content: Mapping[str, Any]) -> Table:
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


def _trial_table(content: Mapping[str, Any]) -> Table:
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
