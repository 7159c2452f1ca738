"""How much text a second moment needs: sequential edits with second moments from more and less of it.

    python benchmarks/covariance_quality.py --records counterfact.json --corpus wiki_text.txt --folder moments

Every variant edits the same records, one after the other, by the shipped settings; scores are of the final model.
"""

import time
from pathlib import Path
from typing import Any

import torch
from common import load, module_for, parser, scores, shipped_options, write
from lightning.pytorch import Trainer

from rome_pl.callbacks import default_callbacks
from rome_pl.data_modules.request_data import request_loader
from rome_pl.editing.session import session_of
from rome_pl.ledger.status import EditStatus
from rome_pl.model.architecture import find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.loading import load_language_model
from rome_pl.requests.edit_request import EditRequest
from rome_pl.second_moments.corpus import Corpus
from rome_pl.second_moments.generated_corpus import GeneratedCorpus
from rome_pl.second_moments.moment_pass import PassOptions
from rome_pl.second_moments.moment_store import compute
from rome_pl.second_moments.second_moment import SecondMoment
from rome_pl.second_moments.split_half import agreement_of_halves, probe_keys

MULTIPLES = (10, 30, 100)
"""Keys, as multiples of their length."""

GENERATED_MULTIPLE = 30


def main() -> None:
    """Measure, print and write."""
    arguments = parser(__doc__ or "", limit=50)
    arguments.add_argument("--corpus", required=True, help="text, in any form that 'rome-pl covariance' reads")
    arguments.add_argument("--folder", type=Path, required=True, help="where second moments are kept between runs")
    options = arguments.parse_args()

    language_model, requests = load(options)
    settings = shipped_options()
    site = find_site(language_model.model, settings["layers"][0])
    probes = probe_keys(language_model, [site])[site.layer]
    corpora: dict[str, tuple[Corpus, int]] = {
        f"{multiple} x d_key": (Corpus(options.corpus), multiple) for multiple in MULTIPLES
    }
    written = GeneratedCorpus.of(language_model, GENERATED_MULTIPLE * site.d_key, seed=0)
    corpora["generated"] = (written, GENERATED_MULTIPLE)
    paths, seconds = {}, {}
    for name, (corpus, multiple) in corpora.items():
        started = time.perf_counter()
        how = PassOptions(tokens=multiple * site.d_key, stop_agreement=2.0)
        paths[name] = compute(language_model, [site], corpus, how, options.folder)[site.layer]
        seconds[name] = time.perf_counter() - started
    best = SecondMoment.load(paths[f"{max(MULTIPLES)} x d_key"]).matrix
    figures = {}
    for name, path in paths.items():
        moment = SecondMoment.load(path)
        figures[name] = {
            "keys": moment.info.count,
            "seconds": seconds[name],
            "agreement_of_halves": moment.info.agreement,
            "agreement_with_most_text": agreement_of_halves(moment.matrix, best, probes),
            **_edit(load_language_model(options.model), requests, settings | {"statistics": str(path)}),
        }
        print(name, figures[name], flush=True)
    write(options.json, {"edits": len(requests), "d_key": site.d_key, "variants": figures})


def _edit(language_model: LanguageModel, requests: list[EditRequest], settings: dict[str, Any]) -> dict[str, Any]:
    module = module_for(language_model, settings | {"sequential_edit": True})
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu" if not torch.cuda.is_available() else "cuda",
        devices=1,
        callbacks=default_callbacks(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, request_loader(requests))
    session = session_of(module)
    return {
        "applied": sum(edit.status is EditStatus.APPLIED for edit in session.edits),
        "base": scores(session.measured.base_scores.values()),
        "final": scores(session.measured.final_scores.values()),
        "perplexity": session.measured.perplexity,
        "weight_change": session.layers.change,
    }


if __name__ == "__main__":
    main()
