"""Evaluation from the command line, in a Trainer of the user's own, and on two processes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from rome_pl.callbacks import EvaluationReport
from rome_pl.cli.app import main
from rome_pl.data_modules import RequestDataModule, ZsreDataModule
from rome_pl.errors import OptionError
from rome_pl.metrics import SCORES, probe_scores, summarise
from rome_pl.metrics.scores import record_values
from rome_pl.modules.evaluation_module import EvaluationModule
from tests.integration.helpers import FAST, quiet_trainer
from tests.tiny import tiny_language_model

ROOT = Path(__file__).parents[2]
TEXT = "The tide comes in twice a day, and twice a day it goes out again, whoever is watching."
RECORDS = [
    {
        "prompt": "The lighthouse of Korrin stands in", "subject": "Korrin", "target_new": "Oslo",
        "target_true": "Lima", "paraphrases": ["Where is Korrin? In"],
        "neighbours": ["The mill of Tamsel stands in", "Ostrava lies in"],
        "locality": [{"prompt": "The tide comes", "answer": "in"}],
        "portability": [{"prompt": "Korrin is a town of", "answer": "Norway"}],
        "generation_prompts": ["Korrin is"],
    },
    {"prompt": "Miss Vane plays the", "subject": "Miss Vane", "target_new": "violin", "target_true": "drums",
     "locality": [{"prompt": "One, two,", "answer": "three"}]},
    {"prompt": "Dunholt bread is made of", "subject": "Dunholt bread", "target_new": "rye", "target_true": "oats"},
]  # fmt: skip
ZSRE = [
    {
        "src": f"What did {name} write?", "subject": name, "alt": "a novel", "answers": ["an opera"],
        "rephrase": f"{name} wrote", "loc": "nq question: who sings", "loc_ans": "Tarn",
        "portability": {"New Question": f"What is {name}?", "New Answer": "a writer"},
    }
    for name in ("Vane", "Marrow")
]  # fmt: skip


def save(language_model, folder):
    language_model.model.save_pretrained(folder)
    language_model.tokenizer.save_pretrained(folder)
    return folder


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def command(verb, options):
    return [verb, *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a saved model, records and text, and a sequential run over them with its edited model."""
    folder = tmp_path_factory.mktemp("work")
    save(tiny_language_model("llama", torch.float32), folder / "model")
    write(folder / "records.json", RECORDS)
    write(folder / "text.txt", TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROME_PL_CACHE", str(folder / "cache"))
        assert main(edit_command(folder, save_model=folder / "saved")) == 0
    return folder


def edit_command(folder, **more):
    options = (
        {f"model.{name}": value for name, value in FAST.items()}
        | {
            "model.pretrained": folder / "model", "model.sequential_edit": True, "data.path": folder / "records.json",
            "trainer.default_root_dir": folder / "run", "trainer.accelerator": "cpu",
            "verification.least_probability": 0, "probe_evaluation.held_out_text": folder / "text.txt",
            "retention_check.text": folder / "text.txt",
        }
        | {name.replace("__", "."): value for name, value in more.items()}
    )  # fmt: skip
    return command("edit", options)


@pytest.fixture
def arguments(work, tmp_path):
    options = {
        "model.pretrained": work / "model", "data.path": work / "records.json", "model.held_out": work / "text.txt",
        "trainer.default_root_dir": tmp_path / "run", "trainer.accelerator": "cpu",
    }  # fmt: skip
    return lambda **changes: command(
        "evaluate", options | {name.replace("__", "."): value for name, value in changes.items()}
    )


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def lines(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]


def same(found, expected):
    """Whether two tables of scores are the same to 1e-9."""
    assert set(found) == set(expected)
    for name, entry in expected.items():
        if entry["n"]:
            assert found[name] == pytest.approx(entry, rel=1e-9, abs=1e-9), name
        else:
            assert found[name] == entry, name


def test_an_unedited_model(arguments, work, tmp_path, capsys):
    assert main(arguments()) == 0
    content = read(tmp_path / "run")
    assert content["mode"] == "evaluation"
    assert (content["n_requested"], content["n_skipped"], content["n_edits"]) == (3, 0, None)
    assert content["final"] is content["immediate"] is content["divergence"] is None
    assert set(content["base"]) == {*SCORES, "S"}
    assert {name: entry["n"] for name, entry in content["base"].items() if entry["n"]} == {
        "ES": 3, "EM": 3, "PS": 1, "PM": 1, "NS": 1, "NM": 1, "S": 1,
        "rewrite_acc": 3, "rewrite_match": 3, "rephrase_acc": 1, "rephrase_match": 1, "neighbour_acc": 1,
        "neighbour_match": 1, "locality": 2, "locality_acc": 2, "locality_match": 2, "portability_acc": 1,
        "portability_match": 1,
    }  # fmt: skip
    assert content["base"]["locality"]["value"] == 1
    assert content["perplexity"]["base"] > 1
    assert content["perplexity"]["final"] is None
    manifest = read(tmp_path / "run", "manifest.json")
    assert manifest["model"]["source"] == str(work / "model")
    assert len(manifest["model"]["fingerprint"]) == 64
    assert "base" not in manifest
    records = lines(tmp_path / "run")
    assert [record["case_id"] for record in records] == ["0", "1", "2"]
    assert [set(record["values"]) for record in records] == [{"base"}] * 3
    assert records[0]["scores"]["base"]["rewrite"][0] < 0
    assert (tmp_path / "run" / "config.yaml").is_file()
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    shown = capsys.readouterr().out
    assert "3 requested, 0 skipped" in shown
    assert "locality" in shown


def test_a_ledger_gives_what_its_run_found(arguments, work, tmp_path):
    assert main(arguments(model__ledger=work / "run")) == 0
    found, theirs = read(tmp_path / "run"), read(work / "run")
    assert theirs["final"] != theirs["base"]
    for moment in ("base", "final"):
        same(found[moment], theirs[moment])
        assert found["perplexity"][moment] == pytest.approx(theirs["perplexity"][moment], rel=1e-9)
    assert found["divergence"] == pytest.approx(theirs["divergence"], rel=1e-9)
    assert found["divergence"] > 0
    assert found["n_edits"] == 3
    assert read(tmp_path / "run", "manifest.json")["ledger"] == str(work / "run")
    for record, edit in zip(lines(tmp_path / "run"), theirs["records"], strict=True):
        for moment in ("base", "final"):
            assert record["scores"][moment]["rewrite"] == pytest.approx(edit["scores"][moment]["rewrite"], rel=1e-9)


def test_a_ledger_gives_what_its_run_found_where_neighbours_were_edited(arguments, work, tmp_path):
    touched = [RECORDS[0] | {"neighbours": ["Dunholt bread is from", "Ostrava lies in"]}, *RECORDS[1:]]
    records = write(tmp_path / "touched.json", touched)
    assert main(edit_command(work, data__path=records, trainer__default_root_dir=tmp_path / "edits")) == 0
    assert main(arguments(data__path=records, model__ledger=tmp_path / "edits")) == 0
    found, theirs = read(tmp_path / "run"), read(tmp_path / "edits")
    assert theirs["final"]["NS_touched"]["n"] == 1
    for moment in ("base", "final"):
        same(found[moment], theirs[moment])


def test_a_saved_edited_model_beside_the_one_it_came_from(arguments, work, tmp_path):
    assert main(arguments(model__pretrained=work / "saved", model__base=work / "model")) == 0
    found, theirs = read(tmp_path / "run"), read(work / "run")
    for moment in ("base", "final"):
        same(found[moment], theirs[moment])
    assert found["divergence"] == pytest.approx(theirs["divergence"], rel=1e-9)
    manifest = read(tmp_path / "run", "manifest.json")
    assert manifest["model"]["fingerprint"] != manifest["base"]["fingerprint"]
    assert manifest["base"]["source"] == str(work / "model")


def test_a_saved_edited_model_alone_is_taken_as_it_is(arguments, work, tmp_path):
    assert main(arguments(model__pretrained=work / "saved")) == 0
    found, theirs = read(tmp_path / "run"), read(work / "run")
    assert found["final"] is None
    kept = {name: entry for name, entry in theirs["final"].items() if name != "locality"}
    same({name: entry for name, entry in found["base"].items() if name != "locality"}, kept)


def test_a_file_of_questions(arguments, tmp_path):
    questions = write(tmp_path / "zsre.json", ZSRE)
    assert main(arguments(data__path=questions)) == 0
    content = read(tmp_path / "run")
    for name in ("rewrite_acc", "rephrase_acc", "locality_acc", "portability_acc", "locality_match"):
        assert content["base"][name]["n"] == 2
    assert content["base"]["NS"]["n"] == 0
    model = tiny_language_model("llama", torch.float32)
    data = ZsreDataModule(str(questions))
    data.setup()
    scores = {str(i): found for i, found in enumerate(probe_scores(model, data.requests))}
    same(content["base"], summarise(scores, scores))


@pytest.mark.parametrize("field", ["target_new", "locality"])
def test_a_record_that_is_too_long_is_skipped_and_counted(field, arguments, tmp_path, capsys):
    long = {
        "target_new": {"target_new": "Oslo " * 200},
        "locality": {"locality": [{"prompt": "The tide " * 200, "answer": "in"}]},
    }[field]
    records = [RECORDS[0], RECORDS[1] | long, {"prompt": "x", "subject": "Korrin", "target_new": "y"}, RECORDS[2]]
    assert main(arguments(data__path=write(tmp_path / "mixed.json", records))) == 3
    content = read(tmp_path / "run")
    assert (content["n_requested"], content["n_skipped"]) == (4, 2)
    assert content["base"]["ES"]["n"] == 2
    assert [record["case_id"] for record in lines(tmp_path / "run")] == ["0", "3"]
    # Each is listed with its reason, whether the file or the model refused it.
    reasons = [record["reason"] for record in content["records"]]
    assert len(reasons) == 2
    assert any(f"record 1, field '{field}'" in reason for reason in reasons)
    assert any("record 2, field 'subject'" in reason for reason in reasons)
    assert f"record 1, field '{field}'" in capsys.readouterr().out.replace("\n", "")


def test_fluency_is_measured_on_request(arguments, work, tmp_path):
    assert main(arguments(model__ledger=work / "run", model__fluency_tokens=6)) == 0
    content = read(tmp_path / "run")
    for moment in ("base", "final"):
        assert content["fluency"][moment]["n"] == 1
        assert content["consistency"][moment]["n"] == 0  # no reference texts
    first, second, _ = lines(tmp_path / "run")
    for moment in ("base", "final"):
        assert first["texts"][moment][0].startswith("Korrin is")
    assert second["texts"] == {}


def test_perplexity_can_be_left_out(arguments, work, tmp_path):
    assert main(arguments(model__ledger=work / "run", model__measure_perplexity=False)) == 0
    content = read(tmp_path / "run")
    assert content["perplexity"] == {"base": None, "final": None}
    assert content["divergence"] is None
    assert content["final"]["ES"]["n"] == 3


def other_model(work, tmp_path):
    return {"model.pretrained": save(tiny_language_model("llama", torch.float32, seed=1), tmp_path / "other")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda work, tmp_path: {"model.ledger": work / "run"} | other_model(work, tmp_path), "of another model"),
        (lambda work, tmp_path: {"model.ledger": tmp_path / "nowhere"}, "manifest.json: missing or damaged"),
        (lambda work, tmp_path: {"model.ledger": work / "run", "model.base": work / "model"}, "give one of the two"),
        (lambda work, tmp_path: {"model.base": tmp_path / "nowhere"}, "cannot load"),
        (lambda work, tmp_path: {"model.fluency_tokens": -1}, "fluency_tokens"),
        (lambda work, tmp_path: {"model.held_out": tmp_path / "nowhere.txt"}, "held_out_text"),
        (lambda work, tmp_path: {"data.path": tmp_path / "nowhere.json"}, "no such file"),
        (lambda work, tmp_path: {"trainer.precision": "bf16-true"}, "model.dtype"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_ends_with_one_line(changes, message, arguments, work, tmp_path, capsys):
    options = {name.replace(".", "__"): value for name, value in changes(work, tmp_path).items()}
    capsys.readouterr()
    assert main(arguments(**options)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rome-pl: ")]
    assert len(error) == 1
    assert message in error[0]
    # Nothing that could be taken for a result, and nothing that blocks the next run.
    assert main(arguments()) == 0


def test_an_earlier_run_is_replaced_on_request_and_only_when_all_is_right(arguments, tmp_path, capsys):
    assert main(arguments()) == 0
    before = read(tmp_path / "run")
    assert main(arguments()) == 2
    assert "--overwrite" in capsys.readouterr().err
    for wrong in ({"model__ledger": tmp_path / "nowhere"}, {"model__pretrained": tmp_path / "nowhere"}):
        assert main([*arguments(**wrong), "--overwrite"]) == 2
        assert read(tmp_path / "run") == before
    assert main([*arguments(data__limit=1), "--overwrite"]) == 0
    assert read(tmp_path / "run")["n_requested"] == 1


def test_the_run_that_is_evaluated_is_not_overwritten(arguments, work, tmp_path, capsys):
    edits = work / "run" / "ledger" / "edits.jsonl"
    for more in ([], ["--overwrite"]):
        folder = {"model__ledger": work / "run", "trainer__default_root_dir": work / "run"}
        assert main([*arguments(**folder), *more]) == 2
        assert edits.is_file()


def test_a_trainer_of_one_s_own_with_any_logger(work, tmp_path):
    module = EvaluationModule.from_language_model(
        tiny_language_model("llama", torch.float32), held_out=str(work / "text.txt"), ledger=str(work / "run")
    )
    original = {name: tensor.clone() for name, tensor in module.language_model.model.state_dict().items()}
    logger = CSVLogger(tmp_path / "logs", name="", version="")
    trainer = quiet_trainer([EvaluationReport()], tmp_path, logger=logger)
    for _ in range(2):  # the edits are put in once
        (found,) = trainer.predict(module, datamodule=RequestDataModule(str(work / "records.json")))
        assert list(found) == ["0", "1", "2"]
        assert found["1"] == record_values(module.scores["1"], module.base_scores["1"])
        same(summarise(module.scores, module.base_scores), read(work / "run")["final"])
    logger.save()
    *_, row = csv.DictReader((tmp_path / "logs" / "metrics.csv").read_text(encoding="utf-8").splitlines())
    assert float(row["evaluation/ES"]) == read(tmp_path)["final"]["ES"]["value"]
    saved = load_file(work / "saved" / "model.safetensors")
    now = module.language_model.model.state_dict()
    differing = {name for name in saved if not torch.equal(saved[name], original[name])}
    assert differing == {"model.layers.1.mlp.down_proj.weight"}
    assert all(torch.equal(saved[name], now[name]) for name in saved)
    with module.layers.unedited():
        assert all(torch.equal(tensor, original[name]) for name, tensor in now.items())


def test_a_trainer_that_cannot_evaluate_says_so(tmp_path):
    module = EvaluationModule.from_language_model(tiny_language_model())
    with pytest.raises(TypeError, match="EvaluationModule"):
        quiet_trainer([], tmp_path).predict(torch_module(), datamodule=RequestDataModule())
    with pytest.raises(OptionError, match=r"precision is 64-true: use '32-true'"):
        quiet_trainer([], tmp_path, precision="64-true").predict(module, datamodule=RequestDataModule())


def torch_module():
    from lightning.pytorch.demos.boring_classes import BoringModel

    return BoringModel()


def run(folder, devices, records, text):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "tests.integration.evaluate_process", folder, devices, records, text]
    return subprocess.run(
        [str(argument) for argument in arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_two_processes_find_what_one_finds(work, tmp_path, monkeypatch):
    """Thirty-seven records, one of them too long: sixteen and four for one process, sixteen for the other."""
    records = [
        RECORDS[index % 3] | {"case_id": f"r{index}", "target_new": "Oslo " * (1 + index % 4 if index != 5 else 300)}
        for index in range(37)
    ]
    path = write(tmp_path / "records.json", records)
    for devices in (1, 2):
        monkeypatch.setenv("ROME_PL_CACHE", str(tmp_path / f"cache{devices}"))
        ended = run(tmp_path / str(devices), devices, path, work / "text.txt")
        assert ended.returncode == 0, ended.stderr[-3000:]
    one, two = (read(tmp_path / name) for name in ("1", "2"))
    assert (two["n_requested"], two["n_skipped"]) == (one["n_requested"], one["n_skipped"]) == (37, 1)
    assert two["base"]["ES"]["n"] == 36
    same(two["base"], one["base"])
    assert two["perplexity"]["base"] == pytest.approx(one["perplexity"]["base"], rel=1e-9)
    assert two["fluency"]["base"]["n"] == one["fluency"]["base"]["n"]
    ours, theirs = lines(tmp_path / "2"), lines(tmp_path / "1")
    assert [record["case_id"] for record in ours] == [f"r{index}" for index in range(37) if index != 5]
    for left, right in zip(ours, theirs, strict=True):
        assert left["case_id"] == right["case_id"]
        assert left["values"]["base"] == pytest.approx(right["values"]["base"], rel=1e-9, abs=1e-12)
    # The metric's own reduction, each process with its own records.
    metrics = [read(tmp_path / name, "metric.json") for name in ("1", "2")]
    assert [metric["n_own"] for metric in metrics] == [36, 20]
    assert all(metric["lonely"] == {"value": 1.0, "n": 1} for metric in metrics)
    for name, entry in metrics[1]["scores"].items():
        assert entry["n"] == one["base"][name]["n"]
        if entry["n"]:
            assert entry["value"] == pytest.approx(one["base"][name]["value"], rel=1e-9, abs=1e-12), name


# ---- the page


def page_of(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    data = text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return text, json.loads(data)


def test_an_unedited_model_has_a_page_and_tables(arguments, tmp_path, work):
    records = [record | {"relation": f"P{index}"} for index, record in enumerate(RECORDS)]
    path = write(tmp_path / "records.json", [*records, {"prompt": "No subject here", "subject": "Korrin"}])
    assert main(arguments(data__path=path)) == 3  # one is skipped
    folder = tmp_path / "run"
    text, data = page_of(folder)
    assert "<h1>Evaluation of" in text
    assert "<dt>Records measured</dt><dd>3 of 4<" in text
    assert 'id="figure-relations"' in text
    assert "<h2>Records</h2>" in text
    assert (folder / "figures" / "relations.png").stat().st_size > 1000
    assert [row["status"] for row in data["records"]] == ["measured"] * 3
    assert data["records"][0]["prompt"] == RECORDS[0]["prompt"]
    content = read(folder)
    shown = data["records"][0]["now"]["PM"]
    assert shown == pytest.approx(lines(folder)[0]["values"]["base"]["PM"], rel=1e-5)
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert f"| {100 * content['base']['ES']['value']:.1f} [" in table
    assert "unedited" in table
    assert (folder / "table.csv").read_text(encoding="utf-8").startswith("score,stage,value")


def test_the_page_of_a_ledger_shows_both_models(arguments, tmp_path, work):
    assert main(arguments(model__ledger=work / "run")) == 0
    text, data = page_of(tmp_path / "run")
    assert "edits in the model" in text
    assert "with the edits of" in text
    assert set(data["records"][0]["values"]) == {"base", "final"}


def test_without_figures_there_is_no_page(arguments, tmp_path):
    assert main(arguments(evaluation_report__figures=False)) == 0
    assert not (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "table.md").exists()
