"""The package against the oracle: keys, loss trajectory, value and update agree to 1e-6 relative."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from rome_pl.callbacks import EditCommit, RankOneWriter
from rome_pl.data_modules.request_data import request_loader
from rome_pl.edit_module import RomeModule
from rome_pl.requests import EditRequest
from rome_pl.second_moment import RIDGE, MomentInfo, SecondMoment
from tests.oracle import oracle_update, oracle_value
from tests.tiny import tiny_language_model

CONTEXTS = ["It rains", "On the hill stood a house that nobody knew"]
REQUEST = EditRequest(
    prompt="Ray Charles, the man who plays", subject="Ray Charles", target_new="violin duets", target_true="piano"
)
OPTIONS = {"v_num_grad_steps": 8, "v_lr": 0.02, "kl_factor": 0.05, "v_weight_decay": 1e-4, "clamp_norm_factor": 3.0}


def relative(got, wanted):
    got, wanted = np.asarray(got, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("preset", ["rome", "r_rome", "easyedit"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_agrees_with_the_oracle(family, preset, tmp_path):
    language_model = tiny_language_model(family)
    module = RomeModule.from_language_model(
        language_model,
        layers=[1],
        preset=preset,
        sequential_edit=True,
        contexts=CONTEXTS,
        stop_loss=0.0,
        statistics=str(tmp_path / "c.safetensors"),
        **OPTIONS,
    )
    site = module._site
    samples = torch.randn(200, site.d_key, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moment = (samples.T @ samples / 200).float().double()  # what a float32 artefact can hold
    info = MomentInfo(language_model.fingerprint_below(site), "", 1, 200, "random")
    SecondMoment(moment, info).save(tmp_path / "c.safetensors")
    ridged = moment + RIDGE * moment.diagonal().mean() * torch.eye(site.d_key)
    before = site.weight.detach().clone()

    wanted = oracle_value(
        language_model.model,
        language_model.tokenizer,
        site.projection,
        REQUEST,
        [c + ". " for c in CONTEXTS],
        steps=8,
        lr=0.02,
        kl_factor=0.05,
        decay=1e-4,
        clamp=3.0,
    )
    change = oracle_update(
        preset,
        wanted["keys"],
        wanted["outputs"],
        wanted["value"],
        site.matrix(before),
        site.bias if site.bias is None else site.bias.detach(),
        ridged.numpy(),
    )
    trainer = Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[RankOneWriter(), EditCommit()],
    )
    trainer.fit(module, request_loader([REQUEST]))
    edit = module.session.edits[0]

    assert relative(edit.key_mean, wanted["keys"].mean(0)) < 1e-9
    assert relative(edit.key_bare, wanted["keys"][0]) < 1e-9
    assert relative([step.loss for step in edit.steps], wanted["losses"]) < 1e-9
    assert wanted["losses"][-1] < wanted["losses"][0]
    assert relative(edit.delta, wanted["delta"]) < 1e-6
    assert relative(site.matrix(site.weight.detach() - before), change) < 1e-6
