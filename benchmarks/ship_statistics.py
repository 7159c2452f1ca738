"""Computes the second moments that the package ships for its default model.

    python benchmarks/ship_statistics.py --corpus wiki_text.txt --layers 4
    python benchmarks/ship_statistics.py --corpus wiki_text.txt --layers 0 1 2 3 --tokens 160000

write ``rome_pl/assets/smollm2-135m-instruct.layerN.safetensors``, from every token of the corpus unless told otherwise.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rome_pl.model.architecture import find_site
from rome_pl.model.loading import DEFAULT_SOURCE, load_language_model
from rome_pl.second_moments.corpus import Corpus
from rome_pl.second_moments.moment_pass import PassOptions
from rome_pl.second_moments.moment_store import compute
from rome_pl.second_moments.second_moment import SecondMoment

ALL = 10**9
"""More keys than the corpus has."""


def main() -> None:
    """Compute and write the artefact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True, help="text, in any form that 'rome-pl covariance' reads")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=ALL)
    parser.add_argument("--out", type=Path, help="folder to write to; default: the package's assets")
    options = parser.parse_args()

    language_model = load_language_model(DEFAULT_SOURCE)
    sites = [find_site(language_model.model, layer) for layer in options.layers]
    folder = options.out or Path(__file__).parents[1] / "rome_pl" / "assets"
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        how = PassOptions(tokens=options.tokens, stop_agreement=2.0)
        made = compute(language_model, sites, Corpus(options.corpus), how, Path(work))
        for layer, path in made.items():
            moment = SecondMoment.load(path)
            out = folder / f"smollm2-135m-instruct.layer{layer}.safetensors"
            # Whose machine it was computed on, and from which file there, is nobody's business.
            SecondMoment(moment.matrix, replace(moment.info, source="")).save(out)
            print(f"{out}: {moment.info.count} keys, {out.stat().st_size} bytes")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
