"""What a process shares with its edits is as it was afterwards, however they end."""

import logging
import os
import random
import signal
import sys
import warnings

import numpy as np
import pytest
import torch

from rome_pl import KnowledgeEditor
from rome_pl.editor import EditRejectedError
from rome_pl.errors import OptionError
from rome_pl.model.loading import load_language_model
from rome_pl.modules.rome_module import RomeModule
from tests.integration.helpers import FAST, REQUESTS, changed, quiet_trainer, snapshot
from tests.integration.test_editor import ASK

MODES = {
    "no_grad": torch.no_grad,
    "gradients off": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "plain": torch.enable_grad,
}


def state():
    loggers = {name: one for name, one in logging.root.manager.loggerDict.items() if isinstance(one, logging.Logger)}
    return {
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "warnings": list(warnings.filters),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "levels": {name: (one.level, one.disabled, one.propagate) for name, one in loggers.items()},
        "environment": dict(os.environ),
        "excepthook": sys.excepthook,
    }


def same(before):
    after = state()
    after["levels"] = {name: level for name, level in after["levels"].items() if name in before["levels"]}
    assert {name for name in before if before[name] != after[name]} == set()


@pytest.fixture
def editor(language_model):
    editor = KnowledgeEditor.from_pretrained((language_model.model, language_model.tokenizer), **FAST)
    editor.undo(editor.edit(**ASK, verify=False))  # what is imported on first use is
    return editor


@pytest.mark.parametrize("mode", MODES)
def test_edits_work_in_every_gradient_mode_and_leave_everything_as_it_was(editor, mode):
    plain = editor.edit(**ASK, verify=False)
    value = snapshot(editor.model)
    editor.undo(plain)
    with MODES[mode]():
        before = state()
        edited = editor.edit(**ASK, verify=False)
        same(before)
        assert changed(editor.model, value) == []  # bit for bit the edit that is made elsewhere
        editor.undo(edited)
        same(before)
        many = editor.edit_many(prompts=ASK["prompt"], target_new="Oslo", subject="Korrin", verify=False)
        same(before)
        many.undo()
        same(before)
        with pytest.raises(EditRejectedError):
            editor.edit(**ASK)
        same(before)
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_edit_that_is_broken_off_leaves_everything_as_it_was(editor, monkeypatch, error):
    weights = snapshot(editor.model)

    def fail(*_):
        random.random()
        torch.rand(1)
        np.random.rand()
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float64)
        raise error

    monkeypatch.setattr("rome_pl.search.value_search.ValueSearch.project", fail)
    with torch.no_grad():
        before = state()
        with pytest.raises(error):
            editor.edit(**ASK, verify=False)
        same(before)
    assert changed(editor.model, weights) == []
    assert all(parameter.requires_grad for parameter in editor.model.parameters())


def test_loading_leaves_everything_as_it_was(language_model, tmp_path):
    language_model.model.save_pretrained(tmp_path)
    language_model.tokenizer.save_pretrained(tmp_path)
    load_language_model(tmp_path)
    with torch.inference_mode():
        before = state()
        editor = KnowledgeEditor.from_pretrained(str(tmp_path), device="cpu", **FAST)
        same(before)
        assert editor.edit(**ASK, verify=False).after.target_new > 0  # what is loaded there can be optimised


def test_a_trainer_of_ones_own_inside_inference_mode_is_told_so(language_model, tmp_path):
    from rome_pl.data_modules.request_data import request_loader

    module = RomeModule.from_language_model(language_model, **FAST)
    with torch.inference_mode(), pytest.raises(OptionError, match=r"inside torch\.inference_mode\(\)"):
        quiet_trainer([], tmp_path).fit(module, request_loader(REQUESTS))
