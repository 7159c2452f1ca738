"""Bits flipped in what a run has left: each is found, and the file named, or changes nothing at all."""

import random
import shutil
from collections import Counter
from dataclasses import asdict

import pytest
import torch

from rome_pl.callbacks import EditCommit, RunReport, StateCheck
from rome_pl.errors import RomeError
from rome_pl.export.delta import apply_delta, read_delta
from rome_pl.export.run_export import export_run
from rome_pl.ledger.replay import read_edits, read_manifest, replay
from rome_pl.ledger.undo import undo, with_edits
from rome_pl.model.architecture import find_site
from rome_pl.requests.edit_request import EditRequest
from rome_pl.second_moments.moment_store import resolve_second_moments
from rome_pl.second_moments.second_moment import MomentInfo, SecondMoment
from rome_pl.utils.restored_state import seeded
from tests.integration.helpers import lenient_callbacks, lighthouses, run_edits, snapshot
from tests.tiny import tiny_language_model

KINDS = ("statistics", "shards", "edits.jsonl", "delta", "manifest")
REQUESTS = [EditRequest(**record, case_id=f"r{index}") for index, record in enumerate(lighthouses(4))]
DTYPE = torch.float32


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with a second moment, some of its edits written anew after another was undone, and its delta."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rome_pl.callbacks.probe_evaluation.perplexity", lambda *_: 1.0)
        language_model = tiny_language_model("llama", DTYPE)
        site = find_site(language_model.model, 1)
        with seeded(0, torch.device("cpu")):
            keys = torch.randn(300, site.d_key, dtype=torch.float64)
        info = MomentInfo(**language_model.moment_identity(site), layer=1, count=300, corpus="random")
        SecondMoment(keys.T @ keys / 300, info).save(folder / "c.safetensors")
        callbacks = [*lenient_callbacks(), RunReport(figures=False)]
        for callback in callbacks:
            if isinstance(callback, EditCommit):
                callback.ledger = True
        callbacks = [callback for callback in callbacks if not isinstance(callback, StateCheck)]
        options = {"sequential_edit": True, "statistics": str(folder / "c.safetensors"), "preset": "rome"}
        run_edits(language_model, folder / "run", REQUESTS, callbacks, **options)
    undo(tiny_language_model("llama", DTYPE), folder / "run", ["r1"], [folder / "c.safetensors"])
    export_run(tiny_language_model("llama", DTYPE), folder / "run", folder / "delta", "delta")
    return folder


def files_of(kind, folder):
    return {
        "statistics": [folder / "c.safetensors"],
        "shards": sorted((folder / "run" / "ledger" / "shards").iterdir()),
        "edits.jsonl": [folder / "run" / "ledger" / "edits.jsonl"],
        "delta": [folder / "delta" / "rome_pl.json", folder / "delta" / "delta.safetensors"],
        "manifest": [folder / "run" / "manifest.json"],
    }[kind]


def outcome(kind, folder):
    """All that is made of a file of a kind: weights, and what is told."""
    language_model = tiny_language_model("llama", DTYPE)
    if kind == "statistics":
        site = find_site(language_model.model, 1)
        (moment,) = resolve_second_moments(language_model, [site], statistics=str(folder / "c.safetensors"))
        return {"matrix": moment.matrix}, asdict(moment.info)
    if kind == "delta":
        delta = read_delta(folder / "delta")
        assert apply_delta(language_model, delta)
        return snapshot(language_model.model), {n: v for n, v in delta.about.items() if n != "checksum"}
    if kind == "manifest":
        with_edits(language_model, folder / "run", [folder / "c.safetensors"])
    else:
        replay(language_model, folder / "run")
    return snapshot(language_model.model), [read_manifest(folder / "run"), read_edits(folder / "run")]


def flip(path, chance):
    content = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flips(kind, count, made, tmp_path):
    """How many flipped bits were found, were harmless, and were neither."""
    chance, expected, counts = random.Random(kind), outcome(kind, made), Counter()
    for number in range(count):
        folder = tmp_path / str(number)
        shutil.copytree(made, folder)
        damaged = chance.choice(files_of(kind, folder))
        flip(damaged, chance)
        try:
            weights, told = outcome(kind, folder)
        except RomeError as error:
            counts["found" if damaged.name in str(error) or damaged.parent.name in str(error) else "unnamed"] += 1
        else:
            same = all(torch.equal(weights[name], tensor) for name, tensor in expected[0].items())
            counts["harmless" if same and told == expected[1] else "silent"] += 1
        shutil.rmtree(folder)
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_flipped_bits(kind, made, tmp_path):
    counts = flips(kind, 6, made, tmp_path)
    assert counts["found"] + counts["harmless"] == 6, counts


@pytest.mark.slow
def test_two_hundred_flipped_bits(made, tmp_path):
    found = {kind: flips(kind, 40, made, tmp_path / kind) for kind in KINDS}
    print("\n" + "\n".join(f"{kind:12} {dict(counts)}" for kind, counts in found.items()))
    assert sum(sum(counts.values()) for counts in found.values()) == 200
    for kind, counts in found.items():
        assert counts["found"] + counts["harmless"] == 40, (kind, counts)
