"""Operations that tracing facts takes, against whole forwards with one restoration each, as published code makes them.

Example:
    python benchmarks/trace_cost.py --records known_1000.json --limit 3 --samples 2
"""

from pathlib import Path

import torch
from common import parser, write

from rome_pl.data_modules import FactDataModule
from rome_pl.model.loading import load_language_model
from rome_pl.modules.trace_module import TraceModule
from rome_pl.tracing.noise import draw_noise
from rome_pl.tracing.tracer import Tracer
from rome_pl.utils.flops import count_flops
from rome_pl.utils.restored_state import frozen


def main() -> None:
    """Print the figures."""
    arguments = parser(__doc__ or "", 3)
    arguments.add_argument("--samples", type=int, default=2, help="samples of noise")
    options = arguments.parse_args()
    language_model = load_language_model(options.model)
    module = TraceModule.from_language_model(language_model)
    data = FactDataModule(options.records, limit=options.limit)
    data.setup()
    tracer = Tracer(language_model.model, module.window)
    found = []
    for request in data.requests:
        fact = module.encode(request)
        width = language_model.model.get_input_embeddings().embedding_dim
        noise = draw_noise(options.samples, fact.subject[1] - fact.subject[0], width, 0.1, 0, fact.ids)
        with count_flops() as engine:
            tracer.trace(fact, noise)
        # As published: a forward of the clean run and of all samples for each token, layer and kind.
        ids = torch.tensor([fact.ids]).expand(options.samples + 1, -1)
        with torch.no_grad(), frozen(language_model.model), count_flops() as forward:
            language_model.model(input_ids=ids, use_cache=False)
        whole = forward.total * len(fact.ids) * len(tracer.layers) * len(tracer.kinds)
        found.append(
            {
                "prompt": request.prompt,
                "tokens": len(fact.ids),
                "subject": list(fact.subject),
                "engine_tflop": engine.total / 1e12,
                "whole_tflop": whole / 1e12,
                "times_fewer": whole / engine.total,
            }
        )
    write(options.json and Path(options.json), {"samples": options.samples, "facts": found})


if __name__ == "__main__":
    main()
