"""What an edit costs: the published procedure, computed plainly, against the engine.

    python benchmarks/edit_cost.py --records counterfact.json --limit 100 --plain-cache plain/ --json edit_cost.json

Wall times are taken in this run, on the first ``--timed`` records; operations are counted. The plain procedure's scores
need every record: what it found is kept in the folder given as ``--plain-cache``, so a long run can be interrupted.
"""

import resource
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    CountedModule,
    load,
    matmul_peak,
    median,
    module_for,
    parser,
    run,
    scores,
    shipped_options,
    warm_run,
    write,
)
from plain import PlainCache, PlainEdit, PlainOptions, plain_edit, plain_flops

from rome_pl.editing.session import EditSession
from rome_pl.metrics import ProbeScores, probe_scores
from rome_pl.metrics.probes import Changes
from rome_pl.model.language_model import LanguageModel
from rome_pl.modules.rome_module import RomeModule
from rome_pl.requests.edit_request import EditRequest
from rome_pl.search.context_templates import DEFAULT_LENGTH_PARAMS, generate_contexts, join_contexts
from rome_pl.write.closed_form import Assertion
from rome_pl.write.presets import PRESETS, PresetName

EXACT = 1e-6
"""Largest relative difference of values at equal options in float64."""


def equal_options(options: dict[str, Any], plain: PlainOptions) -> dict[str, Any]:
    """The options of the engine that make it do what the plain procedure does."""
    return {
        "layers": options["layers"],
        "preset": "rome",
        "context_template_length_params": DEFAULT_LENGTH_PARAMS,
        "v_num_grad_steps": plain.steps,
        "v_lr": plain.lr,
        "v_weight_decay": plain.weight_decay,
        "clamp_norm_factor": plain.clamp,
        "kl_factor": plain.kl_factor,
        "stop_loss": plain.stop_loss,
    }


def main() -> None:
    """Measure everything."""
    arguments = parser(__doc__ or "", 100)
    arguments.add_argument("--timed", type=int, default=6, help="records on which the plain procedure is timed")
    arguments.add_argument("--stream", type=int, default=32, help="records of the stream that the engine is timed in")
    arguments.add_argument("--exact", type=int, default=1, help="records on which values are compared in float64")
    arguments.add_argument("--plain-cache", type=Path, help="folder for what the plain procedure found")
    arguments.add_argument("--plain-limit", type=int, help="most records for the plain procedure's scores")
    options = arguments.parse_args()
    language_model, requests = load(options)
    plain_options, default = PlainOptions(), shipped_options()
    equal = equal_options(default, plain_options)
    site_module = module_for(language_model, equal)
    site, encoder = site_module._sites[-1], language_model.encoder
    contexts = join_contexts(generate_contexts(language_model, DEFAULT_LENGTH_PARAMS, 0))
    timed = requests[: options.timed]
    result: dict[str, Any] = {
        "options_default": default,
        "options_equal": equal,
        "matmul_peak_gflops": matmul_peak(),
        "records": len(requests),
        "timed_records": len(timed),
        "peak_memory_mb": {"loaded": _peak_memory()},
    }
    base: dict[str, ProbeScores] = {}
    values: dict[str, Any] = {}

    # The engine first: the highest memory use so far is what can be read, and the plain procedure needs most.
    names = {str(request.case_id) for request in timed}
    for name, chosen, batch, few in (
        ("default_b8", default, 8, requests[: options.stream]),  # batches are formed within a stream
        ("default_b1", default, 1, timed),
        ("equal_b1", equal, 1, timed),
    ):
        counted = module_for(language_model, chosen, CountedModule)
        assert isinstance(counted, CountedModule)
        warm_run(counted, few, batch)
        session = warm_run(module_for(language_model, chosen), few, batch)
        if name == "equal_b1":
            values = {edit.name: edit.search.value for edit in session.edits}
        result[f"engine_{name}"] = _engine_figures(session, counted, result["matmul_peak_gflops"], names)
        result["peak_memory_mb"][name] = _peak_memory()
        print(name, result[f"engine_{name}"], flush=True)
    result["matmul_fraction"] = result["engine_default_b8"]["matmul_fraction"]
    result["matmul_fraction_b1"] = result["engine_default_b1"]["matmul_fraction"]

    plains: dict[str, PlainEdit] = {}
    for request in timed:
        encoded = encoder.edit(request, contexts, "subject_last", "subject")
        plains[str(request.case_id)] = plain_edit(language_model.model, site, encoded, plain_options, encoder.pad_id)
        print(f"plain {request.case_id}: {plains[str(request.case_id)].seconds:.1f} s", flush=True)
    result["peak_memory_mb"]["plain"] = _peak_memory()
    result["plain_seconds"] = sum(plain.seconds for plain in plains.values()) / len(timed)
    result["plain_evaluations"] = sum(len(plain.losses) for plain in plains.values()) / len(timed)
    result["plain_flops"] = sum(
        plain_flops(language_model.model, site, encoder.edit(request, contexts), encoder.pad_id, len(plain.losses))
        for request, plain in zip(timed, plains.values(), strict=True)
    ) / len(timed)
    for name, figures in (("equal", "equal_b1"), ("default", "default_b8"), ("default_b1", "default_b1")):
        engine = result[f"engine_{figures}"]
        result[f"flops_ratio_{name}"] = result["plain_flops"] / engine["flops_timed"]
        result[f"wall_ratio_{name}"] = result["plain_seconds"] / engine["seconds_timed"]
    differences = [float((values[name] - plain.value).norm() / plain.value.norm()) for name, plain in plains.items()]
    result["value_rel_diff_float32"] = {"median": median(differences), "max": max(differences)}
    write(options.json, result)

    # Scores, on every record.
    counted = module_for(language_model, default, CountedModule)
    assert isinstance(counted, CountedModule)
    session, _ = run(counted, requests, base=base)
    result["scores_default"] = scores(edit.scores["immediate"] for edit in session.edits)
    result["scores_base"] = scores(base.values())
    result["default_flops"] = sum(counted.flops.values()) / len(requests)
    result["default_evaluations"] = sum(len(edit.steps) for edit in session.edits) / len(requests)
    if options.plain_cache is not None:
        cache = PlainCache(options.plain_cache, language_model, site, plain_options, contexts)
        chosen = requests[: options.plain_limit]
        found = []
        for index, request in enumerate(chosen):
            plain = cache.load(request)
            if plain is None:
                encoded = encoder.edit(request, contexts, "subject_last", "subject")
                plain = plain_edit(language_model.model, site, encoded, plain_options, encoder.pad_id)
                cache.store(request, plain)
                print(f"plain {index + 1} of {len(chosen)}: {plain.seconds:.1f} s", flush=True)
            found.append(plain)
        presets: tuple[PresetName, ...] = ("rome", "r_rome")
        for preset in presets:
            measured = plain_scores(language_model, session, chosen, found, preset)
            result["scores_plain" if preset == "rome" else f"scores_plain_{preset}"] = scores(measured)
        result["records_plain"] = len(chosen)
        names = {str(request.case_id) for request in chosen}
        result["scores_default_same_records"] = scores(
            edit.scores["immediate"] for edit in session.edits if edit.name in names
        )
    write(options.json, result)

    if options.exact:
        result["value_rel_diff"] = exact_difference(language_model, requests[: options.exact], equal, plain_options)
        result["value_rel_diff_ok"] = result["value_rel_diff"] <= EXACT
        write(options.json, result)


def _engine_figures(session: EditSession, counted: CountedModule, peak: float, timed: set[str]) -> dict[str, float]:
    """Means over the stream; ``seconds_timed`` over those records of it that the plain procedure is timed on."""
    edits = session.edits
    own = [sum(edit.seconds.values()) for edit in edits if edit.name in timed]
    step = sum(edit.seconds["optimise"] for edit in edits)
    prefix = sum(edit.seconds["prefix"] for edit in edits)
    return {
        "seconds": (step + prefix + sum(edit.seconds["write"] for edit in edits)) / len(edits),
        "seconds_timed": sum(own) / len(own),
        "timed": len(own),
        "seconds_prefix": prefix / len(edits),
        "seconds_steps": step / len(edits),
        "flops": sum(counted.flops.values()) / len(edits),
        "flops_timed": sum(counted.flops[name] for name in timed) / len(own),
        "flops_steps": sum(counted.flops_steps.values()) / len(edits),
        "evaluations": sum(len(edit.steps) for edit in edits) / len(edits),
        "matmul_fraction": sum(counted.flops_steps.values()) / step / 1e9 / peak,
        "records": len(edits),
    }


def plain_scores(
    language_model: LanguageModel,
    session: EditSession,
    requests: list[EditRequest],
    plains: list[PlainEdit],
    preset: PresetName,
) -> list[ProbeScores]:
    """Probe scores of the plain procedure's edits, each on the unedited model; none is rejected."""
    choice, measured = PRESETS[preset], []
    for request, plain in zip(requests, plains, strict=True):
        keys = {"mean": plain.key_mean, "bare": plain.key_bare}
        assertion = Assertion(keys[choice.shape][None], keys[choice.at][None], plain.value[None])
        update = session.layers.last.propose(str(request.case_id), assertion).update
        measured += probe_scores(language_model, [request], Changes([session.layers.last.site.projection], [[update]]))
    return measured


def exact_difference(
    language_model: LanguageModel, requests: list[EditRequest], equal: dict[str, Any], options: PlainOptions
) -> float:
    """Largest relative difference of values in float64, with no stopping rule."""
    model = language_model.model.double()
    double = LanguageModel(model, language_model.tokenizer, source=language_model.source)
    without_stop = PlainOptions(**{**options.__dict__, "stop_loss": 0.0})
    module: RomeModule = module_for(double, {**equal, "stop_loss": 0.0, "mom2_adjustment": False})
    session, _ = run(module, requests, batch_size=8, evaluate=False)
    largest = 0.0
    for edit in session.edits:
        assert edit.search.value is not None
        encoded = double.encoder.edit(edit.request, session.contexts, "subject_last", "subject")
        plain = plain_edit(model, session.layers.last.site, encoded, without_stop, double.encoder.pad_id)
        assert len(plain.losses) == len(edit.steps) == options.steps
        largest = max(largest, float((edit.search.value - plain.value).norm() / plain.value.norm()))
    language_model.model.float()
    return largest


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    started = time.perf_counter()
    torch.manual_seed(0)
    main()
    print(f"{time.perf_counter() - started:.0f} s")
