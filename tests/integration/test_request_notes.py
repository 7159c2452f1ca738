"""Requests with white space at their edges, through a run: the edits are those of the clean ones, and notes say so."""

import json

import pytest
import torch
from safetensors.torch import load_file

from rome_pl import KnowledgeEditor
from rome_pl.cli.app import main
from tests.integration.helpers import FAST, saved_model
from tests.tiny import byte_level_tokenizer, tiny_language_model

CLEAN = [
    {"prompt": "The lighthouse of Korrin stands in", "subject": "Korrin", "target_new": "Oslo", "case_id": 0},
    {"prompt": "Miss Vane plays the", "subject": "Miss Vane", "target_new": "violin", "case_id": 1},
]
TYPED = [
    {"prompt": "The lighthouse of Korrin stands in\n", "subject": "Korrin ", "target_new": "Oslo\n", "case_id": 0},
    {"prompt": "Miss\u00a0Vane plays the", "subject": "Miss Vane", "target_new": "violin", "case_id": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    saved_model(folder)
    return folder


def run(folder, tmp_path, name, records, *more):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    options = {f"--model.{option}": value for option, value in FAST.items()} | {
        "--config": "smollm2", "--model.pretrained": folder / "model", "--data.path": path, "--model.retries": "[]",
        "--model.sequential_edit": "true", "--verification.least_probability": 0, "--trainer.accelerator": "cpu",
        "--trainer.default_root_dir": tmp_path / name, "--probe_evaluation.measure_perplexity": "false",
        "--run_report.figures": "false",
    }  # fmt: skip
    first = ["edit", f"--config={options.pop('--config')}"]
    return main([*first, *(f"{key}={value}" for key, value in options.items()), *more])


def test_the_edits_are_those_of_the_clean_records_and_notes_say_what_was_cut_off(folder, tmp_path):
    assert run(folder, tmp_path, "clean", CLEAN[:1], f"--save_model={tmp_path / 'a'}") == 0
    assert run(folder, tmp_path, "typed", TYPED, f"--save_model={tmp_path / 'b'}", "--data.limit=1") == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = {
        name: json.loads((tmp_path / name / "ledger" / "edits.jsonl").read_text(encoding="utf-8").splitlines()[0])
        for name in ("clean", "typed")
    }
    assert lines["typed"]["request"] == lines["clean"]["request"]
    assert "notes" not in lines["typed"]["request"]
    cut = [note for note in lines["typed"]["notes"] if note not in lines["clean"]["notes"]]
    assert cut == [
        "prompt: cut off U+000A LINE FEED at the end",
        "subject: cut off U+0020 SPACE at the end",
        "target_new: cut off U+000A LINE FEED at the end",
    ]
    (record,) = json.loads((tmp_path / "typed" / "results.json").read_text(encoding="utf-8"))["records"]
    assert record["notes"] == lines["typed"]["notes"]


def test_a_dry_run_shows_notes(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert run(folder, tmp_path, "clean", CLEAN, "--dry_run") == 0
    assert "notes" not in capsys.readouterr().out
    assert run(folder, tmp_path, "typed", TYPED, "--dry_run") == 0
    out = capsys.readouterr().out
    assert "subject: cut off U+0020 SPACE at the end" in out
    assert "found by what looks alike" in out
    assert "2 requests are valid, 0 are not" in out


def test_the_python_api_cuts_edges_off_too():
    weights = []
    for facts in (CLEAN[0], TYPED[0]):
        language_model = tiny_language_model()
        editor = KnowledgeEditor(language_model, **FAST)
        outcome = editor.edit(**facts, verify=False)
        weights.append(language_model.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "subject: cut off U+0020 SPACE at the end" in outcome.edit.notes


def test_a_token_beyond_the_embedding_costs_its_record_alone():
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<new>"])
    editor = KnowledgeEditor.from_pretrained((tiny_language_model().model, tokenizer), **FAST)
    with pytest.raises(ValueError, match="field 'target_new': the token '<new>' has number 400"):
        editor.edit("Korrin speaks", subject="Korrin", target_new="<new>", verify=False)
    assert editor.edit("Korrin speaks", subject="Korrin", target_new="Oslo", verify=False).edit.status == "applied"
