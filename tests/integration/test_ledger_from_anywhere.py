"""The model of a ledger is found from any folder, and where it was moved to."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rome_pl.files.checksums import SEAL
from tests.integration.helpers import FAST, called, lighthouses, saved_model
from tests.recorded import rewrite_json

LENIENT = {
    "model.sequential_edit": True, "trainer.accelerator": "cpu", "verification.least_probability": 0,
    "probe_evaluation.measure_perplexity": False, "run_report.figures": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tree with a model, and a run that names it by a relative path."""
    tree = tmp_path_factory.mktemp("made") / "tree"
    tree.mkdir()
    saved_model(tree)
    (tree / "records.json").write_text(json.dumps(lighthouses(2)), encoding="utf-8")
    options = {f"model.{name}": value for name, value in FAST.items()} | LENIENT
    options |= {"model.pretrained": "model", "data.path": "records.json", "trainer.default_root_dir": "runs/one"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tree)
        assert called("edit", *(part for name, value in options.items() for part in (f"--{name}", value))) == 0
    return tree


@pytest.fixture
def tree(made, tmp_path, monkeypatch):
    """A copy of it, and another working folder in which the model's name means nothing."""
    shutil.copytree(made, tmp_path / "tree")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return tmp_path / "tree"


def exported(run, folder, *more):
    code = called("export", "--ledger", run, "--format", "hf", "--output", folder, *more)
    return code, load_file(folder / "model.safetensors") if code == 0 else None


def test_every_verb_finds_the_model_of_a_moved_tree(tree, tmp_path, capsys):
    run = tree / "runs" / "one"
    about = json.loads((run / "manifest.json").read_text())["model"]
    assert about["source"] == "model"
    assert about["from_run"] == "../../model"
    about["folder"] = "/nowhere"  # the tree was moved, and what it was moved from is gone
    content = json.loads((run / "manifest.json").read_text()) | {"model": about}
    rewrite_json(run / "manifest.json", lambda _: {name: part for name, part in content.items() if name != SEAL})
    code, whole = exported(run, tmp_path / "hf")
    assert code == 0
    assert called("blame", "--ledger", run, "--prompt", "The lighthouse of Korrin0 stands in") == 0
    assert called("pick", "--ledger", run, "--cases", "0,1", "--save_model", tmp_path / "picked") == 0
    picked = load_file(tmp_path / "picked" / "model.safetensors")
    assert all(torch.equal(picked[name], weight) for name, weight in whole.items())
    assert called("undo", "--ledger", run, "--cases", "all", "--save_model", tmp_path / "undone") == 0
    original, undone = load_file(tree / "model" / "model.safetensors"), load_file(tmp_path / "undone/model.safetensors")
    assert all(torch.equal(undone[name], weight) for name, weight in original.items())


def test_an_older_run_without_places_is_found_above_it(tree, tmp_path):
    run = tree / "runs" / "one"
    content = json.loads((run / "manifest.json").read_text())
    del content["model"]["folder"], content["model"]["from_run"]
    rewrite_json(run / "manifest.json", lambda _: {name: part for name, part in content.items() if name != SEAL})
    assert exported(run, tmp_path / "hf")[0] == 0


def test_a_model_that_is_elsewhere_is_named_and_one_that_is_another_is_refused(tree, tmp_path, made, capsys):
    run = tree / "runs" / "one"
    content = json.loads((run / "manifest.json").read_text())
    del content["model"]["folder"]
    rewrite_json(run / "manifest.json", lambda _: {name: part for name, part in content.items() if name != SEAL})
    (tree / "model").rename(tmp_path / "moved")
    code, _ = exported(run, tmp_path / "hf")
    assert code == 2
    said = capsys.readouterr().err
    assert "the model of this ledger was not found" in said
    assert "--pretrained" in said
    assert "Tried model: cannot load 'model'" in said
    _, whole = exported(run, tmp_path / "hf", "--pretrained", tmp_path / "moved")
    _, expected = exported(made / "runs" / "one", tmp_path / "expected")
    assert all(torch.equal(whole[name], weight) for name, weight in expected.items())
    # The edited model is none that the run began with.
    for verb, more in {
        "undo": ("--cases", "all"), "blame": ("--prompt", "Korrin"),
        "pick": ("--cases", "1", "--save_model", tmp_path / "picked"),
    }.items():  # fmt: skip
        before = (run / "ledger" / "edits.jsonl").read_bytes()
        assert called(verb, "--ledger", run, *more, "--pretrained", tmp_path / "hf") == 2
        assert "a ledger of another model than the one loaded" in capsys.readouterr().err
        assert (run / "ledger" / "edits.jsonl").read_bytes() == before


def test_another_model_under_the_same_name_here_is_passed_over(tree, tmp_path):
    run = tree / "runs" / "one"
    shutil.copytree(tree / "model", "model")
    weights = load_file(tree / "model" / "model.safetensors")
    from safetensors.torch import save_file

    save_file({name: weight + 1 for name, weight in weights.items()}, "model/model.safetensors", {"format": "pt"})
    content = json.loads((run / "manifest.json").read_text())
    del content["model"]["folder"], content["model"]["from_run"]
    rewrite_json(run / "manifest.json", lambda _: {name: part for name, part in content.items() if name != SEAL})
    assert exported(run, tmp_path / "hf")[0] == 0  # that of the folders above the run
