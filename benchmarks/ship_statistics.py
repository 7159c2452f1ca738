"""Computes the second moment that the package ships for its default model.

    python benchmarks/ship_statistics.py --corpus wiki_text.txt --layer 4

writes ``rome_pl/assets/smollm2-135m-instruct.layer4.safetensors`` from every token of the corpus.
"""

import argparse
import tempfile
import time
from pathlib import Path

from rome_pl.architecture import find_site
from rome_pl.corpus import Corpus
from rome_pl.language_model import DEFAULT_SOURCE, load_language_model
from rome_pl.moment_pass import PassOptions
from rome_pl.second_moment import SecondMoment
from rome_pl.statistics import compute

ALL = 10**9
"""More keys than the corpus has."""


def main() -> None:
    """Compute and write the artefact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True, help="text, in any form that 'rome-pl covariance' reads")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--out", type=Path, help="file to write; default: the package's assets")
    options = parser.parse_args()

    language_model = load_language_model(DEFAULT_SOURCE)
    site = find_site(language_model.model, options.layer)
    assets = Path(__file__).parents[1] / "rome_pl" / "assets"
    out = options.out or assets / f"smollm2-135m-instruct.layer{options.layer}.safetensors"
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        how = PassOptions(tokens=ALL, stop_agreement=2.0)
        moment = SecondMoment.load(
            compute(language_model, [site], Corpus(options.corpus), how, Path(folder))[site.layer]
        )
    moment.save(out)
    print(f"{out}: {moment.info.count} keys in {time.monotonic() - started:.0f} s, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
