"""What second moments cost: all layers in one pass against one pass a layer, the bare model, and two processes.

    python benchmarks/covariance_cost.py --corpus wiki_text.txt --json covariance_cost.json

Wall times are ratios within this run. Passes include everything but loading: the comparisons of halves, the
reduction and the saving.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import write
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file

from rome_pl.data_modules import CorpusDataModule
from rome_pl.model.architecture import RewriteSite, decoder_layers, find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.loading import DEFAULT_SOURCE, load_language_model
from rome_pl.modules.covariance_module import CovarianceModule
from rome_pl.second_moments.corpus import Corpus
from rome_pl.second_moments.moment_pass import KEYS_PER_DIMENSION, MomentPass, PassOptions
from rome_pl.second_moments.second_moment import SecondMoment
from rome_pl.second_moments.text_blocks import Packer
from rome_pl.utils.flops import count_flops

NEVER = 2.0
"""An agreement that no halves reach, so that every pass sums the same text."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_SOURCE, help="hub name, folder or GGUF file")
    parser.add_argument("--corpus", required=True, help="text, in any form that 'rome-pl covariance' reads")
    parser.add_argument("--tokens", type=int, help="keys to sum; default: 30 per dimension")
    parser.add_argument("--tokens-each", type=int, default=8192, help="keys in the passes of one layer each")
    parser.add_argument("--blocks", type=int, nargs=2, default=(16, 15), help="even and odd, for two processes")
    parser.add_argument("--part", choices=("one_pass", "two_processes"), help="only this; default: both")
    parser.add_argument("--json", type=Path, help="file for the figures; those of the other part in it are kept")
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)  # how two_processes starts itself
    parser.add_argument("--devices", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    if options.process is not None:
        _process(options)
        return
    figures: dict[str, Any] = {}
    if options.json is not None and options.json.exists():
        figures = json.loads(options.json.read_text())
    if options.part != "two_processes":
        language_model = load_language_model(options.model)
        figures |= one_pass(language_model, options.corpus, options.tokens, options.tokens_each)
        del language_model
        write(options.json, figures)
    if options.part != "one_pass":
        write(options.json, figures | two_processes(options))


def one_pass(language_model: LanguageModel, corpus: str, tokens: int | None, each: int) -> dict[str, Any]:
    """All layers together against one after the other, and against the bare model."""
    depth = len(decoder_layers(language_model.model)[1])
    sites = [find_site(language_model.model, layer) for layer in range(depth)]
    seconds_all = _timed(language_model, sites, corpus, each)
    seconds_each = [_timed(language_model, [site], corpus, each) for site in sites]
    flops_all = _flops(language_model, sites, corpus)
    flops_each = sum(_flops(language_model, [site], corpus) for site in sites)
    wanted = tokens or KEYS_PER_DIMENSION * sites[0].d_key
    forward = _forward(language_model, corpus, each)
    seconds = _timed(language_model, sites, corpus, wanted)
    return {
        "layers": depth,
        "one_pass_seconds": seconds_all,
        "one_pass_wall_ratio": sum(seconds_each) / seconds_all,
        "one_pass_flops_ratio": flops_each / flops_all,
        "gflop_per_key": flops_all / 1e9,
        "tokens": wanted,
        "tokens_each": each,
        "seconds": seconds,
        "tokens_per_second": wanted / seconds,
        "forward_tokens_per_second": forward,
        "throughput_vs_forward": wanted / seconds / forward,
    }


def two_processes(options: argparse.Namespace) -> dict[str, Any]:
    """Two processes with a thread each against one with a thread; an even and an odd number of blocks."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for blocks in options.blocks:
            runs = {}
            for devices in (1, 2):
                folder = Path(name) / f"{blocks}-{devices}"
                command = [sys.executable, __file__, "--model", options.model, "--corpus", options.corpus]
                command += ["--tokens", str(1024 * blocks), "--process", str(folder), "--devices", str(devices)]
                subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
                runs[devices] = folder
            differences, counts = [], []
            one, two = ({path.name: path for path in sorted(runs[n].glob("*.exact"))} for n in (1, 2))
            assert one.keys() == two.keys()
            for layer, path in one.items():
                left, right = load_file(path), load_file(two[layer])
                counts.append(bool(left["count"] == right["count"]))
                differences.append(float((left["matrix"] - right["matrix"]).norm() / left["matrix"].norm()))
            times = {n: json.loads((runs[n] / "time.json").read_text()) for n in (1, 2)}
            found[f"{blocks}_blocks"] = {
                "rel_diff": max(differences),
                "counts_equal": all(counts),
                "tokens_per_second": {n: times[n]["keys"] / times[n]["seconds"] for n in (1, 2)},
                "seconds_of_start_up": {n: times[n]["start_up"] for n in (1, 2)},
            }
    speeds = [entry["tokens_per_second"] for entry in found.values()]
    return {
        "two_process_speedup": max(speed[2] / speed[1] for speed in speeds[:1]),
        "two_process_rel_diff": max(entry["rel_diff"] for entry in found.values()),
        "two_process_counts_equal": all(entry["counts_equal"] for entry in found.values()),
        "two_process": found,
    }


class _Clock(Callback):
    """Seconds of the pass, from when every process has loaded the model."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier()
        self.started = time.perf_counter()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self.started


def _process(options: argparse.Namespace) -> None:
    """One of the processes of a shared pass; keeps the matrices in float64."""
    born = time.perf_counter()
    options.process.mkdir(parents=True, exist_ok=True)
    clock = _Clock()
    trainer = Trainer(
        accelerator="cpu",
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=[clock],
    )
    module = CovarianceModule(
        pretrained=options.model,
        layers="all",
        tokens=options.tokens,
        stop_agreement=NEVER,
        folder=str(options.process),
    )
    with patch.object(SecondMoment, "save", _save_exact):
        trainer.predict(module, datamodule=CorpusDataModule(options.corpus), return_predictions=False)
    if trainer.is_global_zero:
        content = {
            "keys": module.finished[0].info.count,
            "seconds": clock.seconds,
            "start_up": clock.started - born,
        }
        (options.process / "time.json").write_text(json.dumps(content))


_save = SecondMoment.save


def _save_exact(moment: SecondMoment, path: Path) -> None:
    """Keep the matrix in float64 too, which the artefact does not."""
    tensors = {"matrix": moment.matrix.contiguous(), "count": torch.tensor(moment.info.count)}
    save_file(tensors, path.parents[2] / f"{moment.info.layer}.exact")
    _save(moment, path)


def _pass(
    language_model: LanguageModel, sites: Sequence[RewriteSite], corpus: str, tokens: int, folder: Path
) -> MomentPass:
    return MomentPass(
        language_model,
        sites,
        Corpus(corpus),
        PassOptions(tokens=tokens, stop_agreement=NEVER),
        lambda site: folder / f"{site.layer}.safetensors",
        folder / "unfinished",
    )


def _timed(language_model: LanguageModel, sites: Sequence[RewriteSite], corpus: str, tokens: int) -> float:
    language_model.fingerprint_below(sites[-1])  # taken once a model, whatever is done with it
    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        moments = _pass(language_model, sites, corpus, tokens, Path(name))
        for block in moments.blocks():
            moments.step(block)
        moments.close()
        return time.perf_counter() - started


def _flops(language_model: LanguageModel, sites: Sequence[RewriteSite], corpus: str) -> float:
    """Operations per key."""
    with tempfile.TemporaryDirectory() as name:
        moments = _pass(language_model, sites, corpus, 4096, Path(name))
        first, block = islice(moments.blocks(), 2)
        moments.step(first)  # with it go the probe keys, once a pass
        assert block.counted is not None
        with count_flops() as counted:
            moments.step(block)
        moments.close()
        return counted.total / int(block.counted.sum())


def _forward(language_model: LanguageModel, corpus: str, tokens: int) -> float:
    """Tokens per second of the bare model over the same blocks, logits included."""
    encoder = language_model.encoder
    length = PassOptions().block_length
    packer = Packer(language_model.tokenizer, 1024 // length, length, encoder.pad_id, encoder.opening)
    blocks = [ids for ids, _, _ in islice(packer.blocks(Corpus(corpus).texts()), tokens // packer.size)]
    with torch.inference_mode():
        language_model.model(input_ids=blocks[0], use_cache=False)
        started = time.perf_counter()
        for ids in blocks:
            language_model.model(input_ids=ids, use_cache=False)
        return len(blocks) * packer.size / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
