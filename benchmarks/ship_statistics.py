"""Computes the second moment that the package ships for its default model.

    python benchmarks/ship_statistics.py --corpus wiki_text.txt --layer 4

writes ``rome_pl/assets/smollm2-135m-instruct.layer4.safetensors`` from every token of the corpus.
"""

import argparse
import time
from pathlib import Path

from rome_pl.architecture import find_site
from rome_pl.language_model import DEFAULT_SOURCE, load_language_model
from rome_pl.statistics import accumulate, corpus_fingerprint, read_corpus


def main() -> None:
    """Compute and write the artefact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True, help="text file, one passage a line")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--out", type=Path, help="file to write; default: the package's assets")
    options = parser.parse_args()

    language_model = load_language_model(DEFAULT_SOURCE)
    site = find_site(language_model.model, options.layer)
    assets = Path(__file__).parents[1] / "rome_pl" / "assets"
    out = options.out or assets / f"smollm2-135m-instruct.layer{options.layer}.safetensors"
    started = time.monotonic()
    moment = accumulate(language_model, site, read_corpus(options.corpus), 10**9, corpus_fingerprint(options.corpus))
    moment.save(out)
    print(f"{out}: {moment.info.count} keys in {time.monotonic() - started:.0f} s, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
