import os
from pathlib import Path

import pytest
import torch

from rome_pl.metrics import text
from tests.tiny import byte_level_tokenizer, tiny_language_model
from tests.variants import leave_to_the_slow_set

# Lightning 2.6 calls jsonargparse in a way that it deprecates.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

# The models here are tiny: threads only get in each other's way.
torch.set_num_threads(1)


WHOLE_TEXT = text._shipped_text
SHORT = 800
"""Characters of the held-out text that tiny models read: they take longer for all of it than for a stream of edits."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    leave_to_the_slow_set(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    whole = item.get_closest_marker("slow") or "whole_text" in getattr(item, "fixturenames", ())
    text._shipped_text = WHOLE_TEXT if whole else lambda: WHOLE_TEXT()[:SHORT]


@pytest.fixture
def whole_text():
    """Ask for this to read the shipped held-out text to its end."""


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache, and none reaches for a hub."""
    monkeypatch.setenv("ROME_PL_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The hub's client read the environment when it was imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder with the public data sets, where a checkout has them."""
    folder = os.environ.get("ROME_PL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set ROME_PL_DATA to a folder with counterfact.json, zsre.json, … to run this test")
    return Path(folder)


@pytest.fixture
def no_perplexity(monkeypatch):
    """Runs leave perplexity out: five thousand tokens take a tiny model longer than the edits."""
    monkeypatch.setattr("rome_pl.callbacks.probe_evaluation.perplexity", lambda *_: 1.0)


@pytest.fixture(scope="session")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture
def language_model():
    """A tiny Llama in float64."""
    return tiny_language_model("llama")
