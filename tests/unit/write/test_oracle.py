"""The package against the oracle: keys, loss trajectory, value and update agree to 1e-6 relative."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from rome_pl.callbacks import EditCommit, RankOneWriter
from rome_pl.data_modules.request_data import request_loader
from rome_pl.modules.rome_module import RomeModule
from rome_pl.requests.edit_request import EditRequest
from rome_pl.second_moments.second_moment import RIDGE, MomentInfo, SecondMoment
from tests.integration.helpers import PLAIN_SEARCH
from tests.oracle import oracle_update, oracle_value
from tests.tiny import tiny_language_model

CONTEXTS = ["It rains", "On the hill stood a house that nobody knew"]
# The divergence is read off the bare prompt where that begins with the subject; else it has a row of its own.
REQUEST = EditRequest(
    prompt="Ray Charles, the man who plays", subject="Ray Charles", target_new="violin duets", target_true="piano"
)
INSIDE = EditRequest(prompt="In the evening Miss Vane plays the", subject="Miss Vane", target_new="drums", case_id=1)
LONG = EditRequest(
    prompt="Of all the breads Dunholt bread is made of", subject="Dunholt bread", target_new="rye", case_id=2
)
OPTIONS = {"v_num_grad_steps": 8, "v_lr": 0.02, "kl_factor": 0.05, "v_weight_decay": 1e-4, "clamp_norm_factor": 3.0}


def relative(got, wanted):
    got, wanted = np.asarray(got, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def set_up(family, folder, **options):
    """A module with statistics of its own, and these."""
    language_model = tiny_language_model(family)
    module = RomeModule.from_language_model(
        language_model, layers=[1], contexts=CONTEXTS, stop_loss=0.0, statistics=str(folder / "c.safetensors"),
        **{**PLAIN_SEARCH, **OPTIONS, **options},
    )  # fmt: skip
    site = module._sites[-1]
    samples = torch.randn(200, site.d_key, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moment = (samples.T @ samples / 200).float().double()  # what a float32 artefact can hold
    info = MomentInfo(language_model.fingerprint_below(site), "", 1, 200, "random")
    SecondMoment(moment, info).save(folder / "c.safetensors")
    return module, moment + RIDGE * moment.diagonal().mean() * torch.eye(site.d_key)


def what_the_oracle_says(module, request, preset, ridged, kl_at="subject"):
    site, language_model = module._sites[-1], module.language_model
    wanted = oracle_value(
        language_model.model,
        language_model.tokenizer,
        site.projection,
        request,
        [c + ". " for c in CONTEXTS],
        steps=8,
        lr=0.02,
        kl_factor=0.05,
        decay=1e-4,
        clamp=3.0,
        kl_at=kl_at,
    )
    wanted["change"] = oracle_update(
        preset,
        wanted["keys"],
        wanted["outputs"],
        wanted["value"],
        site.matrix(site.weight.detach()),
        site.bias if site.bias is None else site.bias.detach(),
        ridged.numpy(),
    )
    return wanted


def fit(module, requests, batch_size=1):
    trainer = Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[RankOneWriter(), EditCommit()],
    )
    trainer.fit(module, request_loader(requests, batch_size))
    return module.session.edits


def assert_as_the_oracle_says(edit, wanted):
    assert relative(edit.search.keys.mean, wanted["keys"].mean(0)) < 1e-9
    assert relative(edit.search.keys.bare, wanted["keys"][0]) < 1e-9
    assert relative([step.loss for step in edit.steps], wanted["losses"]) < 1e-9
    assert wanted["losses"][-1] < wanted["losses"][0]
    assert relative(edit.search.delta, wanted["delta"]) < 1e-6


@pytest.mark.parametrize(
    ("preset", "asked", "kl_position"),
    [
        ("rome", REQUEST, "subject"),
        ("r_rome", REQUEST, "subject"),
        ("easyedit", REQUEST, "subject"),
        ("r_rome", INSIDE, "subject"),
        ("r_rome", INSIDE, "last"),
    ],
    ids=["rome", "r_rome", "easyedit", "subject inside", "divergence at the end"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_agrees_with_the_oracle(family, preset, asked, kl_position, tmp_path):
    module, ridged = set_up(family, tmp_path, preset=preset, kl_position=kl_position, sequential_edit=True)
    site = module._sites[-1]
    before = site.weight.detach().clone()
    wanted = what_the_oracle_says(module, asked, preset, ridged, kl_position)
    (edit,) = fit(module, [asked])
    assert_as_the_oracle_says(edit, wanted)
    assert relative(site.matrix(site.weight.detach() - before), wanted["change"]) < 1e-6


@pytest.mark.parametrize("kl_position", ["subject", "last"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_independent_edits_of_one_batch_agree_with_the_oracle_one_by_one(family, kl_position, tmp_path):
    module, ridged = set_up(family, tmp_path, preset="rome", kl_position=kl_position)
    requests = [REQUEST, INSIDE, LONG]
    wanted = [what_the_oracle_says(module, request, "rome", ridged, kl_position) for request in requests]
    for edit, of_one in zip(fit(module, requests, batch_size=3), wanted, strict=True):
        assert_as_the_oracle_says(edit, of_one)
        update = edit.written.updates[0]
        assert relative(update.left.T @ update.right, of_one["change"]) < 1e-6
