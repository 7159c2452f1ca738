"""Runs of edits in batches on a tiny model, and what is compared of them."""

import json
import math
from operator import attrgetter

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from rome_pl.callbacks import (
    EditCommit,
    ProbeEvaluation,
    RankOneWriter,
    RepresentationCheck,
    RunReport,
    StateCheck,
    Verification,
)
from rome_pl.data_modules.request_data import request_loader
from rome_pl.encoding.text_encoder import TextEncoder
from rome_pl.model.architecture import find_site
from rome_pl.modules.rome_module import RomeModule
from rome_pl.requests.edit_request import EditRequest
from rome_pl.second_moments.second_moment import RIDGE, MomentInfo, SecondMoment
from tests.integration.helpers import FAST, PLAIN_SEARCH, quiet_trainer
from tests.tiny import tiny_language_model

CONTEXTS = ["It rains", "An old house"]


REQUESTS = [
    EditRequest(
        prompt="The lighthouse of Korrin stands in", subject="Korrin", target_new="Oslo", target_true="Lima",
        case_id="a", paraphrases=["Where is Korrin? In"], neighbours=["The mill of Dunholt stands in", "Tarn lies in"],
    ),
    EditRequest(
        prompt="Miss Vane plays the", subject="Miss Vane", target_new="violin", target_true="drums", case_id="b"
    ),
    EditRequest(prompt="Dunholt bread is made of", subject="Dunholt bread", target_new="rye and oats", case_id="c"),
    EditRequest(prompt="We left for Tarn", subject="Tarn", target_new="tea", case_id="d"),
    EditRequest(
        prompt="What all in the old village say of Bramwell is that he sells", subject="Bramwell",
        target_new="fish", target_true="Lima", case_id="e", neighbours=["Mr Ash sells", "Tarn lies in"],  # as of a
    ),
    EditRequest(prompt="The answer came from Loxley", subject="Loxley", target_new="in", case_id="f"),
    EditRequest(
        prompt="Rome is the capital of", subject="Rome", target_new="the", target_true="Lima", case_id="g",
        neighbours=["Tarn lies in"],
    ),
]  # fmt: skip


LONG = EditRequest(prompt="Mr Ash plays the", subject="Mr Ash", target_new="violin " * 30, case_id="long")


OPTIONS = {**PLAIN_SEARCH, **FAST, "contexts": CONTEXTS}


LONGEST = 90


class Guard(Callback):
    """The weight is the original one, bit for bit, whenever anybody looks."""

    def __init__(self):
        self.original, self.looks = None, 0

    def on_train_start(self, trainer, pl_module):
        self.original = pl_module.session.layers.last.site.weight.detach().clone()

    def look(self, trainer, pl_module, *_):
        assert torch.equal(pl_module.session.layers.last.site.weight, self.original)
        self.looks += 1

    on_train_batch_start = on_train_batch_end = on_train_epoch_end = on_before_zero_grad = look


def model_for(family="gpt_neox", dtype=torch.float64):
    """GPT-NeoX computes in the model's dtype throughout, so that batches may be compared closely."""
    language_model = tiny_language_model(family, dtype)
    language_model.encoder = TextEncoder(language_model.tokenizer, LONGEST)
    return language_model


def callbacks_for(threshold=0.0, on_known="edit", last=(), guard=False):
    callbacks = [
        RepresentationCheck(on_known=on_known),
        RankOneWriter(),
        Verification(threshold, greedy=False),  # tiny models say little of what they are told
        ProbeEvaluation(measure_perplexity=False),
        EditCommit(ledger=True),
        StateCheck(),
        RunReport(),
        *last,
    ]
    if guard:
        for place in (0, 3, 5, 8):
            callbacks.insert(place, Guard())
    return callbacks


def run(folder, requests=REQUESTS, batch_size=3, language_model=None, callbacks=None, by_length=False, **options):
    trainer_options = options.pop("trainer", {})
    module = RomeModule.from_language_model(language_model or model_for(), **{**OPTIONS, **options})
    callbacks = callbacks_for() if callbacks is None else callbacks
    trainer = quiet_trainer(callbacks, folder, **trainer_options)
    trainer.fit(module, request_loader(list(requests), batch_size, by_length))
    return module.session


def by_name(session):
    return {edit.name: edit for edit in session.edits}


def assert_close(got, expected):
    assert (got is None) == (expected is None)
    if expected is not None:
        assert (got - expected).norm() <= 1e-9 * expected.norm()


def alike(got, expected):
    return got == (expected if expected is None else pytest.approx(expected, rel=1e-9))


def numbers(scores):
    flat = [scores.rewrite, *scores.paraphrases, *scores.neighbours]
    return [math.nan if value is None else value for pair in flat for value in pair]


def part_of(edit, name):
    """A tensor of an edit, or nothing where the edit has none."""
    return attrgetter(name)(edit.search) if edit.prepared else None


def assert_same_edit(edit, expected):
    assert (edit.name, edit.status, edit.reason) == (expected.name, expected.status, expected.reason)
    assert (edit.notes, edit.failed) == (expected.notes, expected.failed)
    for name in ("keys.mean", "keys.bare", "keys.balanced", "keys.output_balanced", "delta", "value"):
        assert_close(part_of(edit, name), part_of(expected, name))
    assert [step.loss for step in edit.steps] == pytest.approx([step.loss for step in expected.steps], rel=1e-9)
    assert alike(edit.before, expected.before)
    assert alike(edit.after, expected.after)
    assert edit.scores.keys() == expected.scores.keys()
    for moment, scores in expected.scores.items():
        assert numbers(edit.scores[moment]) == pytest.approx(numbers(scores), rel=1e-9, nan_ok=True)
    assert (edit.written is None) == (expected.written is None)
    if expected.written is not None:
        assert edit.written.names == expected.written.names
        assert_close(edit.written.updates[0].left, expected.written.updates[0].left)
        assert_close(edit.written.updates[0].right, expected.written.updates[0].right)
        assert edit.written.realised == pytest.approx(expected.written.realised, rel=1e-9)


def ledger_of(folder):
    return [json.loads(line) for line in (folder / "ledger" / "edits.jsonl").read_text(encoding="utf-8").splitlines()]


def with_statistics(folder, family="gpt_neox", preset="r_rome"):
    """A model and options with which sequential edits have a metric of their own."""
    language_model = model_for(family)
    site = find_site(language_model.model, 1)
    samples = torch.randn(300, site.d_key, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moment = (samples.T @ samples / 300).float().double()  # what a float32 artefact can hold
    path = folder / f"{family}.safetensors"
    info = MomentInfo(language_model.fingerprint_below(site), "", 1, 300, "random")
    SecondMoment(moment, info).save(path)
    options = {"preset": preset, "sequential_edit": True, "statistics": str(path)}
    ridged = moment + RIDGE * moment.diagonal().mean() * torch.eye(site.d_key)
    return language_model, options, np.linalg.inv(ridged.numpy())
