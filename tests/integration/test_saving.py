"""Runs whose saving, printing or folder goes wrong: nothing is lost, and nothing outside is touched."""

import io
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rome_pl.cli.app import main
from rome_pl.cli.rome_trainer import RomeTrainer
from rome_pl.ledger.edit_log import Ledger, lock_of
from tests.integration.helpers import FAST, called, lighthouses, saved_model
from tests.tiny import tiny_language_model

BAD = {"prompt": "Nobody is here", "subject": "Korrin", "target_new": "x"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    saved_model(folder)
    (folder / "records.json").write_text(json.dumps(lighthouses(3)), encoding="utf-8")
    (folder / "mixed.json").write_text(json.dumps([*lighthouses(2), BAD]), encoding="utf-8")
    return folder


@pytest.fixture
def edit(base, tmp_path):
    def arguments(*more, **options):
        values = {f"model.{name}": value for name, value in FAST.items()} | {
            "model.pretrained": base / "model", "model.sequential_edit": True, "data.path": base / "records.json",
            "trainer.default_root_dir": tmp_path / "run", "trainer.accelerator": "cpu", "trainer.logger": False,
            "verification.least_probability": 0, "probe_evaluation.measure_perplexity": False,
            "run_report.figures": False, "save_model": tmp_path / "saved",
        } | {name.replace("__", "."): value for name, value in options.items()}  # fmt: skip
        values = {name: value for name, value in values.items() if value is not None}
        return ["edit", *(str(part) for name, value in values.items() for part in (f"--{name}", value)), *more]

    return arguments


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- finished runs


def test_a_finished_run_whose_save_failed_saves(edit, tmp_path, monkeypatch, capsys):
    assert main(edit(save_model=tmp_path / "whole", trainer__default_root_dir=tmp_path / "run0")) == 0
    original = type(tiny_language_model("llama").model).save_pretrained
    monkeypatch.setattr(
        type(tiny_language_model("llama").model), "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError(5))
    )
    assert main(edit("--resume", "auto")) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert read(tmp_path / "run")["finished"] is False
    assert read(tmp_path / "run")["interrupted"] is False
    monkeypatch.setattr(type(tiny_language_model("llama").model), "save_pretrained", original)
    assert main(edit("--resume", "auto")) == 0
    assert contents(tmp_path / "saved") == contents(tmp_path / "whole")
    assert read(tmp_path / "run")["finished"] is True
    assert names(tmp_path) == ["run", "run0", "saved", "whole"]


def test_a_finished_run_saves_where_it_is_told_and_computes_nothing(edit, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    assert main(edit(save_model=None)) == 0
    before = contents(tmp_path / "run")
    fit = RomeTrainer.fit
    monkeypatch.setattr(RomeTrainer, "fit", lambda *_, **__: pytest.fail("all is known"))
    assert main(edit("--resume", "auto", save_model=tmp_path / "one")) == 0
    assert contents(tmp_path / "run") == before
    assert "Saved its model with 3 edits" in caplog.text
    stamp = (tmp_path / "one" / "model.safetensors").stat().st_ino
    assert main(edit("--resume", "auto", save_model=tmp_path / "one")) == 0
    assert (tmp_path / "one" / "model.safetensors").stat().st_ino == stamp  # it holds the model: nothing to do
    weights = load_file(tmp_path / "one" / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, tmp_path / "one" / "model.safetensors", {"format": "pt"})
    assert main(edit("--resume", "auto", save_model=tmp_path / "one")) == 0  # it does not
    monkeypatch.setattr(RomeTrainer, "fit", fit)
    assert main(edit(trainer__default_root_dir=tmp_path / "other", save_model=tmp_path / "two")) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_finished_run_gives_its_exit_code_again(edit, base, tmp_path):
    mixed = {"data__path": base / "mixed.json"}
    assert main(edit(**mixed)) == 3
    assert main(edit("--resume", "auto", **mixed)) == 3
    assert main(edit("--resume", "auto", **{**mixed, "save_model": None})) == 3
    shutil.rmtree(tmp_path / "saved")
    assert main(edit("--resume", "auto", **mixed)) == 3
    assert (tmp_path / "saved" / "config.json").is_file()


@pytest.mark.parametrize("lost", ["records.jsonl", "table.md", "table.csv", "easyedit.json", "report.html", "figures"])
def test_a_product_that_is_missing_is_made_again(lost, edit, tmp_path):
    options = {"run_report__formats": "[easyedit]", "run_report__figures": "true", "run_report__generations": 0}
    assert main(edit(**options)) == 0
    path = tmp_path / "run" / lost
    kept = contents(path) if path.is_dir() else path.read_bytes()
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(edit("--resume", "auto", **options)) == 0
    assert names(path) == sorted(kept) if path.is_dir() else path.exists()


def test_the_results_come_last_and_say_when_all_is_there(edit, tmp_path, monkeypatch):
    seen = []
    from rome_pl.callbacks import run_report

    original = run_report.write_json

    def noted(path, content):
        seen.append((path.name, content.get("finished") if isinstance(content, dict) else None, names(path.parent)))
        original(path, content)

    monkeypatch.setattr(run_report, "write_json", noted)
    assert main(edit(run_report__figures="true", run_report__generations=0)) == 0
    name, finished, there = seen[-1]
    assert (name, finished) == ("results.json", False)  # the model is still to be saved
    assert {"records.jsonl", "table.md", "table.csv", "report.html", "figures"} <= set(there)
    assert read(tmp_path / "run")["finished"] is True


# ---- the folder to save to


@pytest.mark.parametrize("where", ["/proc/edited", "{run}", "{model}", "{run}/ledger", "{above}", "{file}/x"])
def test_a_place_that_will_not_do_is_refused_before_the_first_edit(where, edit, base, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(RomeTrainer, "fit", lambda *_, **__: pytest.fail("not before the first edit"))
    places = {"run": tmp_path / "run", "model": base / "model", "above": tmp_path, "file": tmp_path / "file"}
    model = contents(base / "model")
    assert main(edit("--overwrite", save_model=where.format(**places))) == 2
    assert "save_model: " in capsys.readouterr().err
    assert names(tmp_path) == ["file"]
    assert contents(base / "model") == model


def test_no_room_is_refused_before_the_first_edit(edit, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rome_pl.files.whole_files.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert main(edit()) == 2
    assert "0.0 MB free" in capsys.readouterr().err
    assert names(tmp_path) == []


# ---- printing


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "broken", "full"])
def test_an_output_that_cannot_print_costs_nothing(encoding, edit, tmp_path, monkeypatch):
    if encoding == "broken":
        reading, writing = os.pipe()
        os.close(reading)
        stream = io.TextIOWrapper(io.FileIO(writing, "w"), encoding="utf-8", write_through=True)
    elif encoding == "full":
        stream = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
    else:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(edit()) == 0
    assert called("show", tmp_path / "run") == 0
    if encoding in ("ascii", "latin-1", "cp1252"):
        stream.flush()
        text = stream.buffer.getvalue().decode(encoding)
        assert "->" in text
        assert "3 edits: 3 applied" in text
    monkeypatch.undo()
    with suppress(OSError):
        stream.close()
    assert read(tmp_path / "run")["finished"] is True
    assert (tmp_path / "saved" / "config.json").is_file()


def test_the_tables_come_after_everything_is_saved(edit, tmp_path, monkeypatch):
    from rome_pl.callbacks import RunReport

    def look(self):
        assert read(tmp_path / "run")["finished"] is True
        assert (tmp_path / "saved" / "config.json").is_file()
        told.append(1)

    told = []
    monkeypatch.setattr(RunReport, "tell", look)
    assert main(edit()) == 0
    assert told == [1]


EVIL = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m"
STEERING = set("\x1b\x07\u202e\x9b\r")


def test_no_text_of_a_fact_steers_the_terminal_in_any_verb(edit, tmp_path, capsys):
    facts = [{"prompt": f"The mill of Dunholt{EVIL} lies in", "subject": f"Dunholt{EVIL}", "case_id": f"one{EVIL}",
              "target_new": f"Oslo{EVIL}", "target_true": f"Lima{EVIL}"},
             {"prompt": f"Tarn {EVIL}", "subject": "nobody", "target_new": "x", "case_id": f"two{EVIL}"}]  # fmt: skip
    (tmp_path / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    here = {"data__path": tmp_path / "facts.json", "save_model": None}
    run = tmp_path / "run"
    assert main(edit("--dry_run", **here)) == 3
    assert main(edit(**here)) == 3
    assert main(edit(**{**here, "model__on_error": "stop", "trainer__default_root_dir": tmp_path / "no"})) == 2
    assert called("show", run) == 0
    assert called("show", run, "--cases", f"one{EVIL}") == 0
    assert called("show", run, "--cases", f"none{EVIL}") == 2
    assert called("blame", run, "--prompt", f"The mill {EVIL}") == 0
    assert called("diff", run, run) == 0
    assert called("show", f"{run}{EVIL}") == 2
    assert called(f"verb{EVIL}") == 2
    for given in (("--config", f"none{EVIL}"), (f"--model.v_lr={EVIL}",), (f"--no{EVIL}", "1")):
        with pytest.raises(SystemExit):
            called("edit", *given)
    told = capsys.readouterr()
    assert not STEERING & set(told.out + told.err)
    assert r"\x1b]0;owned\x07" in told.out
    assert r"\x1b]0;owned\x07" in told.err


# ---- links, pipes, and the lock


def outside(path, kind, folder):
    """Put a link or a pipe where a run has a file; what the link names."""
    target = folder / "outside"
    if path.exists():
        path.rename(target)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    return target


NAMES = ["config.yaml", "manifest.json", "results.json", "records.jsonl", "ledger", "ledger/edits.jsonl",
         "ledger/shards", "ledger/shards/000000.safetensors", "ledger/.lock", "tensorboard", "figures"]  # fmt: skip


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("more", [("--resume", "auto"), ("--resume", "auto", "--force"), ("--overwrite",)])
def test_a_link_or_pipe_in_a_run_folder_is_refused_before_anything_is_touched(kind, more, edit, tmp_path, capsys):
    assert main(edit(save_model=None)) == 0
    whole = contents(tmp_path / "run")
    for name in NAMES:
        folder = tmp_path / name.replace("/", " ")
        shutil.copytree(tmp_path / "run", folder / "run")
        target = outside(folder / "run" / name, kind, folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        options = {"trainer__default_root_dir": folder / "run", "save_model": None, "model__v_lr": 0.2}
        assert main(edit(*more, **options)) == 2, name
        told = capsys.readouterr().err
        assert f"run/{name}: a {kind}" in told, told
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert kind == "pipe" or os.path.lexists(folder / "run" / name)
        del target
    assert contents(tmp_path / "run") == whole


@pytest.mark.parametrize("name", ["manifest.json", "ledger/edits.jsonl", "ledger/shards/000001.safetensors"])
def test_verbs_that_read_wait_for_no_pipe(name, edit, tmp_path, capsys):
    assert main(edit(save_model=None)) == 0
    (tmp_path / "run" / name).unlink()
    os.mkfifo(tmp_path / "run" / name)
    for given in (["show"], ["undo", "--cases", "0"], ["pick", "--cases", "0", "--save_model", tmp_path / "x"],
                  ["blame", "--prompt", "x"], ["export", "--format", "hf", "--output", tmp_path / "y"]):  # fmt: skip
        assert called(given[0], "--ledger", tmp_path / "run", *given[1:]) == 2
        assert "a pipe (FIFO), where a run has a file" in capsys.readouterr().err
    assert names(tmp_path) == ["run"]


def test_undo_follows_no_link_when_it_writes(edit, tmp_path, capsys):
    assert main(edit(save_model=None)) == 0
    target = outside(tmp_path / "run" / "ledger" / "edits.jsonl", "link", tmp_path)
    before = target.read_bytes()
    assert called("undo", tmp_path / "run", "--cases", "0") == 2
    assert "a link" in capsys.readouterr().err
    assert target.read_bytes() == before


@pytest.mark.parametrize("more", [("--overwrite",), ("--resume", "auto", "--force"), ()])
def test_nothing_is_touched_while_another_run_holds_the_folder(more, edit, tmp_path, capsys):
    assert main(edit(save_model=None)) == 0
    if more and more[0] == "--resume":
        (tmp_path / "run" / "results.json").unlink()
    before = contents(tmp_path / "run")
    ledger = Ledger(tmp_path / "run" / "ledger", resume=True)
    assert main(edit(*more, save_model=None, model__v_lr=0.3)) == 2
    ledger.close()
    assert contents(tmp_path / "run") == before
    assert "another run" in capsys.readouterr().err or not more


def test_the_lock_is_held_from_before_the_configuration_until_the_model_is_saved(edit, tmp_path, monkeypatch):
    seen = []

    def look(*_, **__):
        lock = lock_of(tmp_path / "run" / "ledger")
        with pytest.raises(Exception, match=r"\.lock"):
            lock.acquire(timeout=0)
        seen.append((tmp_path / "run" / "config.yaml").exists())

    from rome_pl.cli import rome_trainer as trainer
    from rome_pl.cli.verbs import RunConfig

    save_config, save = RunConfig.save_config, trainer.save_model
    monkeypatch.setattr(RunConfig, "save_config", lambda *given: (look(), save_config(*given)))
    monkeypatch.setattr(trainer, "save_model", lambda *given, **options: (look(), save(*given, **options)))
    assert main(edit()) == 0
    assert seen == [False, True]
    lock_of(tmp_path / "run" / "ledger").acquire(timeout=0)


@pytest.mark.parametrize("content", ["just text", "- a\n- list\n", "model: text\n", "model: [1]\n", "{", "1"])
def test_a_configuration_of_another_kind_is_named(content, edit, tmp_path, capsys):
    assert main(edit(save_model=None)) == 0
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "config.yaml").write_text(content, encoding="utf-8")
    assert main(edit("--resume", "auto", save_model=None)) == 2
    assert "config.yaml" in capsys.readouterr().err
    assert main(edit("--resume", "auto", "--force", save_model=None)) == 0


# ---- home


def test_home_is_found_in_every_path_of_an_edit(edit, base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base / "model", tmp_path / "home model")
    shutil.copy(base / "records.json", tmp_path / "facts.json")
    (tmp_path / "text.txt").write_text("Some text for perplexity, and a little more of it.\n" * 3, encoding="utf-8")
    (tmp_path / "own.yaml").write_text("save_model: ~/saved\n", encoding="utf-8")
    options = {
        "model__pretrained": "~/home model", "data__path": "~/facts.json", "trainer__default_root_dir": "~/run",
        "probe_evaluation__measure_perplexity": "true", "probe_evaluation__held_out_text": "~/text.txt",
        "state_check__perplexity_text": "~/text.txt", "state_check__largest_perplexity_ratio": 1e9, "save_model": None,
    }  # fmt: skip
    assert main(edit("--config=~/own.yaml", **options)) == 0
    assert main(edit("--resume=~/run", **{**options, "save_model": "~/again"})) == 0
    assert torch.equal(*(load_file(tmp_path / name / "model.safetensors")["lm_head.weight"] for name in
                         ("saved", "again")))  # fmt: skip
    assert called("show", "~/run") == 0
    assert called("diff", "~/run", "--other=~/run") == 0
    assert called("blame", "--ledger=~/run", "--prompt=x") == 0
    assert called("pick", "--ledger=~/run", "--cases=0", "--save_model=~/picked") == 0
    assert called("export", "--ledger=~/run", "--format=delta", "--output=~/delta") == 0
    assert called("apply", "--delta=~/delta", "--output=~/applied", "--pretrained=~/home model") == 0
    assert called("undo", "--ledger=~/run", "--cases=1", "--save_model=~/undone") == 0
    evaluate = ["--model.measure_perplexity=false", "--trainer.default_root_dir=~/evaluated"]
    assert called("evaluate", "--model.pretrained=~/home model", "--data.path=~/facts.json", "--model.ledger=~/run",
                  *evaluate, "--trainer.accelerator=cpu") == 0  # fmt: skip
    (tmp_path / "hparams.yaml").write_text("alg_name: ROME\nmodel_name: gpt2-xl\nlayers: [17]\n", encoding="utf-8")
    called("convert", "--file=~/hparams.yaml", "--output=~/converted.yaml")
    assert {"saved", "again", "picked", "delta", "applied", "undone", "evaluated", "run"} <= set(names(tmp_path))
    assert not (tmp_path / "~").exists()


def test_home_is_found_in_every_path_of_second_moments(base, tmp_path, monkeypatch, edit):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROME_PL_CACHE", "~/kept")
    shutil.copytree(base / "model", tmp_path / "m")
    (tmp_path / "text.txt").write_text("A sentence about a mill, and one about a lake in the hills.\n" * 80, "utf-8")
    common = ["--model.pretrained=~/m", "--model.layers=[1]", "--trainer.accelerator=cpu", "--data.path=~/text.txt",
              "--model.tokens=200", "--model.folder=~/moments"]  # fmt: skip
    assert called("covariance", *common, "--trainer.default_root_dir=~/cov", "--export_npz=~/npz") == 0
    (moment,) = (tmp_path / "moments").glob("*.safetensors")
    (npz,) = (tmp_path / "npz").glob("*.npz")
    assert called("covariance", *common, "--trainer.default_root_dir=~/cov2", f"--import_npz=~/npz/{npz.name}") == 0
    options = {"model__pretrained": "~/m", "model__preset": "r_rome", "save_model": None}
    assert main(edit(model__statistics=f"~/moments/{moment.name}", **options)) == 0
    assert main(edit(model__corpus="~/text.txt", model__mom2_n_samples=200, trainer__default_root_dir="~/two",
                     **options)) == 0  # fmt: skip
    assert (tmp_path / "kept").is_dir()
    assert not (tmp_path / "~").exists()
