"""What a run shows and leaves behind: files without a server, TensorBoard, other loggers."""

import csv
import html
import io
import json
import re

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from markupsafe import escape
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_END_INFO_TAG, SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from rome_pl.callbacks import ProbeEvaluation, RetentionCheck, RunReport, TensorBoardReport
from rome_pl.cli.app import main
from rome_pl.data_modules import RequestDataModule
from rome_pl.modules.rome_module import RomeModule
from rome_pl.reports.run_figures import CAPTIONS
from tests.integration.helpers import FAST, lenient_callbacks, quiet_trainer
from tests.made_run import NASTY
from tests.tiny import tiny_language_model

# Prompts of different lengths, before the subject and after it.
RECORDS = [
    {
        "prompt": f"{'A rather long opening: ' * (index % 3)}The lighthouse of Korrin{index} "
        f"stands{', as everybody in the village knows,' * (index % 2)} in",
        "subject": f"Korrin{index}", "target_new": "Oslo", "target_true": "Lima", "relation": f"P{index % 2}",
        "paraphrases": [f"Where is Korrin{index}? In"], "neighbours": ["The mill of Dunholt stands in"],
    }
    for index in range(12)
] + [
    {"prompt": f"{NASTY[0]}", "subject": "Korrin", "target_new": "Oslo", "target_true": "{Lima}"},
    {"prompt": "Nobody is here", "subject": "Korrin", "target_new": "x"},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "records.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    (folder / "held_out.txt").write_text(
        "The tide comes in twice a day, and twice a day it goes out.", encoding="utf-8"
    )
    return folder


def run(folder, name, loggers=(), sequential=True, report=None, language_model=None, **options):
    """Edit the records in a Trainer; returns the run's folder and the module."""
    target = folder / name
    callbacks = lenient_callbacks()
    for callback in callbacks:
        if isinstance(callback, ProbeEvaluation):
            callback.held_out_text = str(folder / "held_out.txt")
        if isinstance(callback, RetentionCheck):
            callback.text = str(folder / "held_out.txt")
    callbacks += [TensorBoardReport(), report or RunReport(formats=["easyedit", "kmeng01"])]
    module = RomeModule.from_language_model(
        language_model or tiny_language_model(), **{**FAST, "sequential_edit": sequential, **options}
    )
    data = RequestDataModule(str(folder / "records.json"), retention_sample=4 if sequential else 0)
    trainer = quiet_trainer(
        callbacks, target, logger=[make(target) for make in loggers] or False, val_check_interval=4,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return target, module


def tensorboard(target):
    return TensorBoardLogger(target, name="tensorboard", version="")


@pytest.fixture(scope="module")
def sequential(folder):
    return run(folder, "sequential", [tensorboard, lambda target: CSVLogger(target, name="csv", version="")])[0]


def events(target):
    kept = dict.fromkeys(("scalars", "images", "tensors"), 0)
    return EventAccumulator(str(target / "tensorboard"), size_guidance=kept).Reload()


@pytest.fixture(scope="module")
def logged(sequential):
    return events(sequential)


def table(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def read(target, name="results.json"):
    return json.loads((target / name).read_text(encoding="utf-8"))


def test_a_run_leaves_all_its_files(sequential):
    names = {path.name for path in sequential.iterdir()}
    assert names >= {
        "manifest.json", "results.json", "records.jsonl", "table.md", "table.csv", "report.html", "figures",
        "easyedit.json", "kmeng01.json",
    }  # fmt: skip
    assert {path.stem for path in (sequential / "figures").iterdir()} == set(CAPTIONS)
    for path in (sequential / "figures").iterdir():
        assert imread(path).shape[1] > 900


def test_the_files_agree(sequential):
    content = read(sequential)
    records = [json.loads(line) for line in (sequential / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == content["n_requested"] == 14
    for moment in ("base", "immediate", "final"):
        values = [record["values"][moment]["ES"] for record in records if "values" in record]
        assert sum(values) / len(values) == pytest.approx(content[moment]["ES"]["value"])
    rows = table(sequential / "table.csv")
    shown = {(row["score"], row["stage"]): row["value"] for row in rows}
    assert float(shown["ES", "final"]) == content["final"]["ES"]["value"]
    assert float(shown["perplexity", "final"]) == content["perplexity"]["final"]
    cases = read(sequential, "kmeng01.json")
    new = -records[3]["scores"]["final"]["rewrite"][0]
    assert cases[3]["post"]["rewrite_prompts_probs"][0]["target_new"] == pytest.approx(new)
    assert len(read(sequential, "easyedit.json")) == len(cases) == 13


def test_the_page_holds_the_run(sequential):
    page = (sequential / "report.html").read_text(encoding="utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [row["prompt"] for row in data["records"][:13]] == [record["prompt"] for record in RECORDS[:13]]
    assert [row["status"] for row in data["records"]] == ["applied"] * 13 + ["skipped"]
    assert page.count("<img ") == len(CAPTIONS)
    assert html.escape("v_num_grad_steps: 6") in page  # no config.yaml here: the module's own settings


def test_a_page_of_the_command_line_shows_the_settings_as_resolved(folder, tmp_path):
    language_model = tiny_language_model("llama", torch.float32)
    language_model.model.save_pretrained(tmp_path / "model")
    language_model.tokenizer.save_pretrained(tmp_path / "model")
    options = {f"--model.{name}": value for name, value in FAST.items()} | {
        "--model.pretrained": tmp_path / "model", "--data.path": folder / "records.json", "--data.limit": 2,
        "--trainer.default_root_dir": tmp_path / "run", "--trainer.accelerator": "cpu",
        "--probe_evaluation.measure_perplexity": "false", "--run_report.formats": "[easyedit]",
        "--verification.least_probability": 0,
    }  # fmt: skip
    arguments = ["edit", "--config", "smollm2", *(str(part) for pair in options.items() for part in pair)]
    assert main(arguments) == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert html.escape((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")) in page
    assert (tmp_path / "run" / "easyedit.json").exists()
    # A run without other shapes and without pictures leaves none of the earlier run's.
    again = [*arguments, "--overwrite", "--run_report.formats", "null", "--run_report.figures", "false"]
    assert main([*again, "--tensorboard_report.figures", "false"]) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"records.jsonl", "table.md"}
    assert not names & {"easyedit.json", "report.html", "figures"}
    with pytest.raises(SystemExit):
        main([*arguments, "--overwrite", "--run_report.formats", "[yours]"])


def test_tensorboard_has_the_scalars_with_the_edit_s_index_as_the_step(sequential, logged):
    content = read(sequential)
    tags = logged.Tags()["scalars"]
    for tag in ("edit/loss", "edit/probability_before", "edit/probability_after", "edit/update_norm", "running/ES",
                "stream/weight_change"):  # fmt: skip
        assert [event.step for event in logged.Scalars(tag)] == list(range(13)), tag
    assert logged.Scalars("running/ES")[-1].value == pytest.approx(content["immediate"]["ES"]["value"])
    assert logged.Scalars("stream/weight_change")[-1].value == pytest.approx(content["weight_change"])
    assert [event.step for event in logged.Scalars("retention/ES")] == [4, 8, 12]
    (final,) = logged.Scalars("final/ES")
    assert (final.step, final.value) == (13, pytest.approx(content["final"]["ES"]["value"]))
    assert logged.Scalars("perplexity/final")[0].value == pytest.approx(content["perplexity"]["final"])
    assert logged.Scalars("final/divergence")[0].value == pytest.approx(content["divergence"], rel=1e-3)
    assert "hp_metric" not in tags


def test_tensorboard_has_the_pictures(logged):
    tags = logged.Tags()["images"]
    assert set(tags) == {f"figures/{name}" for name in CAPTIONS} | {"loss curves"}
    assert [event.step for event in logged.Images("loss curves")] == [9, 12]
    for tag in tags:
        assert imread(io.BytesIO(logged.Images(tag)[-1].encoded_image_string)).shape[1] > 900


def test_tensorboard_has_a_layout_in_which_no_chart_is_empty(logged):
    layout = Layout.FromString(logged.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    assert len(charts) >= 8
    for chart in charts:
        for pattern in chart.multiline.tag:
            assert [tag for tag in logged.Tags()["scalars"] if re.match(pattern, tag)], chart.title


def test_tensorboard_has_the_settings_with_the_final_scores_once(sequential, logged):
    content = logged.PluginTagToContent("hparams")
    assert set(content) == {EXPERIMENT_TAG, SESSION_START_INFO_TAG, SESSION_END_INFO_TAG}
    experiment = HParamsPluginData.FromString(content[EXPERIMENT_TAG]).experiment
    metrics = [info.name.tag for info in experiment.metric_infos]
    assert metrics[:4] == ["final/ES", "final/PS", "final/NS", "final/S"]
    assert "perplexity/final" in metrics
    settings = HParamsPluginData.FromString(content[SESSION_START_INFO_TAG]).session_start_info.hparams
    assert settings["v_num_grad_steps"].number_value == 6
    assert settings["requests"].number_value == 13
    assert settings["preset"].string_value == "easyedit"
    assert "corpus" not in settings  # not set


def continue_plainly(language_model, prompt, tokens):
    ids = language_model.tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + tokens and ids[-1] != language_model.tokenizer.eos_token_id:
        with torch.no_grad():
            ids.append(int(language_model.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return language_model.tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_tensorboard_has_continuations_before_and_after(family, folder):
    language_model = tiny_language_model(family)
    target, _ = run(folder, f"generations_{family}", [tensorboard], language_model=language_model, v_num_grad_steps=2)
    (event,) = events(target).Tensors("generations/text_summary")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    assert len(lines) == 2 + 5
    for line, record in zip(lines[2:], RECORDS, strict=False):
        cells = [html.unescape(cell) for cell in line.removeprefix("| ").removesuffix(" |").split(" | ")]
        assert cells[:2] == [record["prompt"], record["target_new"]]
        page = (target / "report.html").read_text(encoding="utf-8")
        for model, cell in ((tiny_language_model(family), cells[2]), (language_model, cells[3])):
            text = continue_plainly(model, record["prompt"], 20)
            plain = " ".join(text.split())
            assert cell == "".join(char if char.isprintable() else "\ufffd" for char in plain)
            assert f"<td>{escape(text)}</td>" in page


def test_edits_out_of_order_are_logged_in_order(folder):
    """Single edits of similar length share batches."""
    target, module = run(folder, "single", [tensorboard], sequential=False)
    assert [edit.index for edit in module.session.edits] != list(range(13))
    found = events(target)
    for tag in ("edit/loss", "running/ES"):
        assert [event.step for event in found.Scalars(tag)] == list(range(13))
    tags = found.Tags()
    assert found.Scalars("immediate/ES")[0].value == pytest.approx(read(target)["immediate"]["ES"]["value"])
    assert not any(tag.startswith("final/") for tag in tags["scalars"])
    assert "generations/text_summary" not in tags["tensors"]  # nothing was ever written
    assert "figures/accuracy" in tags["images"]
    layout = Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    for chart in [chart for category in layout.category for chart in category.chart]:
        assert [tag for tag in tags["scalars"] if re.match(chart.multiline.tag[0], tag)], chart.title


def test_a_logger_without_pictures_gets_the_scalars(sequential, folder):
    target, _ = run(folder, "csv_alone", [lambda target: CSVLogger(target, name="csv", version="")])
    for where in (sequential, target):
        rows = table(where / "csv" / "metrics.csv")
        running = [row for row in rows if row["running/ES"]]
        assert [int(row["step"]) for row in running] == list(range(13))
        (final,) = [row for row in rows if row["final/ES"]]
        assert float(final["final/ES"]) == pytest.approx(read(where)["final"]["ES"]["value"])
        assert any(row["retention/ES"] for row in rows)


def test_a_run_without_a_logger_has_its_page(folder):
    target, _ = run(folder, "no_logger")
    assert (target / "report.html").exists()
    assert {path.stem for path in (target / "figures").iterdir()} == set(CAPTIONS)


@pytest.mark.parametrize("place", ["callbacks.run_report", "callbacks.tensorboard_report"])
def test_a_picture_that_cannot_be_drawn_costs_nothing_else(place, folder, monkeypatch, caplog):
    def fails(*_):
        raise ValueError("no such font")

    monkeypatch.setattr(f"rome_pl.{place}.draw_figures", fails)
    target, module = run(folder, place, [tensorboard])
    assert len(module.session.edits) == 13
    assert read(target)["interrupted"] is False
    assert "no such font" in caplog.text
    assert (target / "report.html").exists() == (place != "callbacks.run_report")


def test_an_interrupted_run_shows_what_was_done(folder, monkeypatch):
    original = RomeModule.training_step

    def interrupted(self, batch, batch_idx):
        if batch_idx == 3:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    monkeypatch.setattr(RomeModule, "training_step", interrupted)
    with pytest.raises(SystemExit):
        run(folder, "interrupted", [tensorboard])
    target = folder / "interrupted"
    lines = (target / "records.jsonl").read_text(encoding="utf-8").splitlines()
    statuses = [json.loads(line)["status"] for line in lines]
    assert statuses == ["applied"] * 3 + ["skipped"] * 2 + ["pending"] * 9
    assert "The run ended before its last edit" in (target / "report.html").read_text(encoding="utf-8")
    assert [event.step for event in events(target).Scalars("edit/loss")] == [0, 1, 2]
