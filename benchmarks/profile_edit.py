"""Where the time of an edit goes, by torch's profiler: the published procedure against the engine.

    python benchmarks/profile_edit.py --records counterfact.json --picture profile.svg --json profile.json

The plain procedure is profiled over ``--steps`` of its 25 evaluations and scaled to what it needs; the engine over one
whole edit, and over a batch of eight.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import load, module_for, parser, run, shipped_options, write
from matplotlib.figure import Figure
from plain import PlainOptions, plain_edit
from torch.profiler import ProfilerActivity, profile

from rome_pl.model.architecture import find_site
from rome_pl.requests.edit_request import EditRequest
from rome_pl.search.context_templates import DEFAULT_LENGTH_PARAMS, generate_contexts, join_contexts

KINDS = (
    ("matrix products", ("mm", "addmm", "bmm", "linear", "matmul", "baddbmm")),
    ("attention", ("scaled_dot_product", "flash_attention")),
    ("softmax, loss", ("softmax", "nll_loss", "logsumexp", "exp", "gather")),
    ("copies", ("copy_", "cat", "clone", "index", "fill_", "zero_", "empty", "new_")),
)
OTHER = "other element-wise work and Python"


def main() -> None:
    """Profile and draw."""
    arguments = parser(__doc__ or "", 8)
    arguments.add_argument("--steps", type=int, default=3, help="evaluations of the plain procedure to profile")
    arguments.add_argument("--picture", type=Path, help="file for the picture, .svg or .png")
    options = arguments.parse_args()
    language_model, requests = load(options)
    default = shipped_options()
    contexts = join_contexts(generate_contexts(language_model, DEFAULT_LENGTH_PARAMS, 0))
    encoded = language_model.encoder.edit(requests[0], contexts, "subject_last", "subject")
    site, pad_id = find_site(language_model.model, default["layers"][0]), language_model.encoder.pad_id
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        plain_edit(language_model.model, site, encoded, PlainOptions(steps=options.steps, stop_loss=0.0), pad_id)
    scale = PlainOptions().steps / options.steps
    result: dict[str, Any] = {"plain": {kind: scale * spent for kind, spent in _by_kind(profiled).items()}}
    for size in (1, 8):
        result[f"engine_b{size}"] = _profiled_run(language_model, default, requests[:size])
    write(options.json, result)
    if options.picture is not None:
        _draw(result, options.picture)


def _profiled_run(language_model: Any, options: dict[str, Any], requests: list[EditRequest]) -> dict[str, float]:
    module = module_for(language_model, options)
    run(module, requests[:1], batch_size=1, evaluate=False)  # warm up
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run(module, requests, batch_size=len(requests), evaluate=False)
    return {kind: spent / len(requests) for kind, spent in _by_kind(profiled).items()}


def _by_kind(profiled: Any) -> dict[str, float]:
    """Seconds of each kind of operator, own time only."""
    spent: Counter[str] = Counter()
    for event in profiled.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, parts in KINDS if any(part in name for part in parts)), OTHER)
        spent[kind] += event.self_cpu_time_total / 1e6
    return {kind: spent[kind] for kind in [*(kind for kind, _ in KINDS), OTHER]}


def _draw(result: dict[str, dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    whole, close = figure.subplots(1, 2, width_ratios=(1, 1.3))
    names = {"plain": "published,\nplain", "engine_b1": "engine,\none edit", "engine_b8": "engine,\nbatch of 8"}
    for axes, shown in ((whole, list(names)), (close, ["engine_b1", "engine_b8"])):
        bottom = torch.zeros(len(shown))
        for kind in next(iter(result.values())):
            height = torch.tensor([result[name][kind] for name in shown])
            axes.bar([names[name] for name in shown], height, bottom=bottom, label=kind)
            bottom = bottom + height
        axes.set(ylabel="seconds an edit")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = close.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="outside right upper")
    figure.savefig(path)


if __name__ == "__main__":
    main()
