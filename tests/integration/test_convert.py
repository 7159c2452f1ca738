"""Converted settings make a run: ``rome-pl convert``, then ``rome-pl edit``."""

import ast
import json
import re

import pytest
import torch
import yaml

from rome_pl.cli.app import main
from rome_pl.interop.easyedit_arguments import easyedit_requests
from tests.tiny import tiny_language_model
from tests.unit.interop.test_convert_settings import DOCS, FILES, PRESETS, write

RECORDS = [
    {"prompt": "The lighthouse of Korrin stands in", "subject": "Korrin", "target_new": "Oslo", "target_true": "Lima"},
    {"prompt": "Miss Vane plays the", "subject": "Miss Vane", "target_new": "violin", "target_true": "drums"},
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    language_model = tiny_language_model("llama", torch.float32)
    language_model.model.save_pretrained(folder)
    language_model.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_becomes_a_run(name, model_folder, tmp_path, capsys):
    values = {**FILES[name], "model_name": str(model_folder), "v_num_grad_steps": 3}
    path, output = write(tmp_path, name, values), tmp_path / "config.yaml"
    assert main(["convert", str(path), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "Wrote" in shown
    (tmp_path / "records.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    text = "\n".join(["The tide comes in twice a day, and twice a day it goes out again."] * 90)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    arguments = [
        "edit", "--config", output, "--data.path", tmp_path / "records.json", "--trainer.accelerator", "cpu",
        "--trainer.default_root_dir", tmp_path / "run", "--model.corpus", tmp_path / "text.txt",
        "--model.dtype", "float32", "--verification.least_probability", "0",
        "--probe_evaluation.held_out_text", tmp_path / "text.txt", "--run_report.figures", "false",
        "--model.mom2_n_samples", "300",
    ]  # fmt: skip
    assert main([str(argument) for argument in arguments]) in (0, 3)  # a tiny model's edits may be refused
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["n_requested"] == 2
    assert results["n_skipped"] == 0
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))["model"]
    expected = {
        "preset": PRESETS[name.split("/")[1]], "pretrained": str(model_folder), "layers": [2], "v_lr": 0.3,
        "fact_token": "subject_first", "clamp_norm_factor": 3.0, "kl_factor": 0.125, "v_weight_decay": 0.25,
        "stop_probability": 1.0, "contexts_per_step": None,  # their search, not the default one
    }  # fmt: skip
    assert resolved["optimizer"]["class_path"] == "torch.optim.Adam"
    assert {key: resolved[key] for key in expected} == expected
    moments = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))["second_moments"]
    assert bool(moments) is (resolved["mom2_adjustment"] is not False)


def test_the_table_has_every_key_and_what_differs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    path = write(tmp_path, "unified/EMMET/a.json", FILES["unified/EMMET/a.json"])
    assert main(["convert", "--file", str(path), "--output", str(tmp_path / "out.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("│")[1].strip(): line for line in lines if line.count("│") == 5}
    assert set(FILES["unified/EMMET/a.json"]) <= set(rows)
    assert "model.layers: [2]" in rows["layers"]
    assert "not needed" in rows["lm_head_module"]
    assert "differs: the preset emmet has 0.1" in rows["emmet_lambda"]
    assert "(not in the file)" in rows["model_name"]
    assert lines[-1].startswith(f"Wrote {tmp_path / 'out.yaml'}; ")


def test_errors_of_the_command(tmp_path, capsys):
    path = write(tmp_path, "ROME/a.yaml", {**FILES["easyedit/ROME/a.yaml"], "kl_facter": 1})
    output = tmp_path / "out.yaml"
    assert main(["convert", str(path), "--output", str(output)]) == 2
    assert "did you mean 'kl_factor'" in capsys.readouterr().err
    assert not output.exists()
    assert main(["convert", str(path), "--output", str(output), "--force"]) == 0
    written = output.read_bytes()
    assert main(["convert", str(path), "--output", str(output), "--force"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["convert", str(path), "--output", str(output), "--force", "--overwrite"]) == 0
    assert output.read_bytes() == written
    assert main(["convert", str(tmp_path / "nowhere.yaml"), "--output", str(tmp_path / "b.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_the_settings_in_the_docs_parse(tmp_path, capsys):
    text = DOCS.read_text(encoding="utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "config.yaml").write_text(example, encoding="utf-8")
    with pytest.raises(SystemExit) as exit_:
        main(["edit", "--config", str(tmp_path / "config.yaml"), "--print_config"])
    assert exit_.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    for section, values in yaml.safe_load(example).items():
        assert {name: resolved[section][name] for name in values} == values


def test_the_call_in_the_docs_is_one_that_is_accepted():
    text = DOCS.read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (call,) = (
        node
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "edit"
    )
    arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    first, second = easyedit_requests(**arguments)
    assert [probe.kind for probe in first.locality] == ["neighborhood"]
    assert (first.paraphrases, second.paraphrases) == (("On stage, Ray Charles plays the",), ())


def test_a_plain_verb_s_first_argument_needs_no_name(tmp_path, capsys):
    assert main(["show", str(tmp_path)]) == 2
    assert f"{tmp_path}: holds no ledger" in capsys.readouterr().err
