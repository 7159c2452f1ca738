"""Which settings of the value search are good enough, and what they cost.

    python benchmarks/search_study.py --records counterfact.json --limit 100 --json study.json

edits every record on its own, once for each candidate, and prints ES, PS and NS against the operations of an edit.
Candidates that the JSON file holds already are not run again.
"""

import json
import time
from typing import Any

from common import ADAM, POLYAK, CountedModule, load, module_for, parser, run, scores, shipped_options

from rome_pl.ledger.status import EditStatus

TWENTY, TEN, FOUR, TWO = ([[5, n], [10, n]] for n in (10, 5, 2, 1))


def adam(**options: Any) -> dict[str, Any]:
    """Adam as published."""
    return {
        "optimizer": {"class_path": ADAM},
        "v_lr": 0.5,
        "contexts_per_step": None,
        "stop_probability": 0.9,
    } | options


def polyak(target: float = 0.95, **options: Any) -> dict[str, Any]:
    """Polyak's step."""
    chosen = {"v_lr": 1.0, "contexts_per_step": None, "stop_probability": 0.9} | options
    return {"optimizer": {"class_path": POLYAK, "init_args": {"target_probability": target}}, **chosen}


def contexts(params: list[list[int]], **options: Any) -> dict[str, Any]:
    """Contexts that the model writes."""
    return {"context_template_length_params": params, **options}


PUBLISHED = {"preset": "rome", "clamp_norm_factor": 4.0, "stop_probability": 1.0}

CANDIDATES: dict[str, dict[str, Any]] = {
    "shipped": {},
    "Polyak, 5 contexts, p > 0.9": contexts(FOUR, **polyak()),
    "Polyak, 5 contexts, p > 0.98": contexts(FOUR, **polyak(0.99, stop_probability=0.98)),
    "Polyak, 5 contexts, p > 0.98, preset rome": contexts(FOUR, **polyak(0.99, stop_probability=0.98, preset="rome")),
    "Polyak, 5 contexts, p > 0.95": contexts(FOUR, **polyak(0.98, stop_probability=0.95)),
    "Polyak, 5 contexts, p > 0.8": contexts(FOUR, **polyak(0.9, stop_probability=0.8)),
    "Polyak, 5 contexts, argmax": contexts(FOUR, **polyak(stop_greedy=True)),
    "Polyak, 3 contexts, p > 0.9": contexts(TWO, **polyak()),
    "Polyak, 11 contexts, 1 + 2 a step, p > 0.9": contexts(TEN, **polyak(contexts_per_step=2)),
    "Polyak, 11 contexts, p > 0.9": contexts(TEN, **polyak()),
    "Polyak, 11 contexts, p > 0.95": contexts(TEN, **polyak(0.98, stop_probability=0.95)),
    "Polyak, 11 contexts, p > 0.98": contexts(TEN, **polyak(0.99, stop_probability=0.98)),
    "Polyak, 11 contexts, p > 0.98, preset rome": contexts(TEN, **polyak(0.99, stop_probability=0.98, preset="rome")),
    "Polyak, 11 contexts, 1 + 4 a step, p > 0.98": contexts(
        TEN, **polyak(0.99, stop_probability=0.98, contexts_per_step=4)
    ),
    "Polyak, 21 contexts, 1 + 2 a step, p > 0.98": contexts(
        TWENTY, **polyak(0.99, stop_probability=0.98, contexts_per_step=2)
    ),
    "Polyak, 21 contexts, 1 + 2 a step, p > 0.98, preset rome": contexts(
        TWENTY, **polyak(0.99, stop_probability=0.98, contexts_per_step=2, preset="rome")
    ),
    "Polyak, 21 contexts, 1 + 3 a step, p > 0.98": contexts(
        TWENTY, **polyak(0.99, stop_probability=0.98, contexts_per_step=3)
    ),
    "Polyak, 21 contexts, 1 + 4 a step, p > 0.99": contexts(
        TWENTY, **polyak(0.995, stop_probability=0.99, contexts_per_step=4)
    ),
    "Polyak, 21 contexts, 1 + 4 a step, p > 0.98": contexts(
        TWENTY, **polyak(0.99, stop_probability=0.98, contexts_per_step=4)
    ),
    "Adam, 5 contexts, p > 0.9": contexts(FOUR, **adam()),
    "Adam, 21 contexts, preset rome, loss < 0.05 (published)": contexts(TWENTY, **adam(**PUBLISHED)),
}


def main() -> None:
    """Run the candidates."""
    arguments = parser(__doc__ or "", 100)
    arguments.add_argument("--only", nargs="*", help="candidates whose name holds one of these")
    options = arguments.parse_args()
    language_model, requests = load(options)
    done: dict[str, Any] = {}
    if options.json is not None and options.json.exists():
        done = json.loads(options.json.read_text())
    base: dict[str, Any] = {}
    for name, candidate in CANDIDATES.items():
        if name in done or (options.only and not any(part in name for part in options.only)):
            continue
        started = time.perf_counter()
        module = module_for(language_model, {**shipped_options(), **candidate}, CountedModule)
        assert isinstance(module, CountedModule)
        session, _ = run(module, requests, base=base)
        edits = session.edits
        done[name] = {
            "options": {**shipped_options(), **candidate},
            "flops": sum(module.flops.values()) / len(edits),
            "evaluations": sum(len(edit.steps) for edit in edits) / len(edits),
            "rejected": sum(edit.status is EditStatus.REJECTED for edit in edits),
            "scores": scores(edit.scores["immediate"] for edit in edits),
            "base": scores(session.measured.base_scores.values()),
            "records": len(edits),
            "seconds_counted": time.perf_counter() - started,
        }
        if options.json is not None:
            options.json.write_text(json.dumps(done, indent=2) + "\n")
        print(_line(name, done[name]), flush=True)
    print(_table(done))


def _line(name: str, result: dict[str, Any]) -> str:
    values = [f"{result['scores'][score]['value']:.3f}" for score in ("ES", "PS", "NS", "PM")]
    cost = f"{result['flops'] / 1e9:.0f} | {result['evaluations']:.1f} | {result['rejected']}"
    return f"| {name} | {' | '.join(values)} | {cost} |"


def _table(done: dict[str, Any]) -> str:
    head = "| search | ES | PS | NS | PM | GFLOP an edit | evaluations | rejected |\n|---|---|---|---|---|---|---|---|"
    return "\n".join([head, *(_line(name, result) for name, result in done.items())])


if __name__ == "__main__":
    main()
