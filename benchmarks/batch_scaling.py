"""Edits per second as more of them share a forward, and whether they come out the same.

    python benchmarks/batch_scaling.py --records counterfact.json --limit 32 --json batch_scaling.json

uses the options of configs/smollm2.yaml. Equality with a batch of one is taken in float64 with no stopping rule.
"""

import resource
from typing import Any

from common import load, matmul_peak, module_for, parser, run, shipped_options, warm_run, write

from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest

SIZES = (1, 2, 4, 8, 16)


def main() -> None:
    """Measure every batch size."""
    arguments = parser(__doc__ or "", 32)
    arguments.add_argument("--exact", type=int, default=8, help="records compared in float64")
    options = arguments.parse_args()
    language_model, requests = load(options)
    default = shipped_options()
    result: dict[str, Any] = {
        "options": default,
        "records": len(requests),
        "matmul_peak_gflops": matmul_peak(),
        "edits_per_second": {},
        "seconds_prefix": {},
        "peak_memory_mb": {},
    }
    for size in SIZES:  # ascending, since a process only tells its highest memory use so far
        session = warm_run(module_for(language_model, default), requests, size)
        seconds = sum(sum(edit.seconds[stage] for stage in ("prefix", "optimise")) for edit in session.edits)
        result["edits_per_second"][str(size)] = len(session.edits) / seconds
        result["seconds_prefix"][str(size)] = sum(edit.seconds["prefix"] for edit in session.edits) / len(requests)
        result["peak_memory_mb"][str(size)] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"B = {size}: {result['edits_per_second'][str(size)]:.2f} edits a second", flush=True)
    result["speedup_b8"] = result["edits_per_second"]["8"] / result["edits_per_second"]["1"]
    result["value_rel_diff"] = difference(language_model, requests[: options.exact], default)
    write(options.json, result)


def difference(language_model: LanguageModel, requests: list[EditRequest], default: dict[str, Any]) -> float:
    """Largest relative difference between values of a batch of 8 and of batches of one."""
    double = LanguageModel(language_model.model.double(), language_model.tokenizer, source=language_model.source)
    options = {**default, "stop_loss": 0.0, "stop_probability": 1.0, "stop_greedy": False, "mom2_adjustment": False}
    values = []
    for size in (1, 8):
        session, _ = run(module_for(double, options), requests, batch_size=size, evaluate=False)
        values.append({edit.name: edit.search.value for edit in session.edits})
    language_model.model.float()
    return max(float((values[1][name] - alone).norm() / alone.norm()) for name, alone in values[0].items())


if __name__ == "__main__":
    main()
