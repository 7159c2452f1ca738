"""Exports from the command line, and to the hub."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from rome_pl.cli.app import main
from rome_pl.export.delta import read_delta
from tests.integration.helpers import about, called, edited_by_command, nothing_left
from tests.recorded import rewrite_json

# What peft asks a model of transformers 5 for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A run of the command line."""
    return edited_by_command(tmp_path_factory.mktemp("work"), "gpt2")


def test_export_and_apply(work, tmp_path, capsys):
    edited = load_file(work / "edited" / "model.safetensors")
    assert called("export", "--ledger", work / "run", "--format", "hf", "--output", tmp_path / "hf") == 0
    assert "4 edits as hf in" in capsys.readouterr().out
    assert called("export", "--ledger", work / "run", "--format", "delta", "--output", tmp_path / "delta") == 0
    assert called("apply", "--delta", tmp_path / "delta", "--output", tmp_path / "applied") == 0
    assert "4 edits, bit for bit the weights of the run. Saved to" in capsys.readouterr().out
    for name in ("hf", "applied"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(found[key], edited[key]) for key in edited)
    assert "| preset | easyedit |" in (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    arguments = ("--ledger", work / "run" / "ledger", "--format", "peft", "--rank", 2, "--output", tmp_path / "peft")
    assert called("export", *arguments) == 0
    told = capsys.readouterr().out
    (part,) = about(tmp_path / "peft")["adapter"]
    assert f"transformer.h.1.mlp.c_proj.weight: rank 2 of 4, relative error {part['error']:.2e}" in told
    # A base model that has moved, and one that is another.
    shutil.copytree(work / "model", tmp_path / "moved")
    there = ("--delta", tmp_path / "delta", "--pretrained", tmp_path / "moved", "--output", tmp_path / "again")
    assert called("apply", *there) == 0
    assert called("apply", *there) == 2
    assert "is not empty" in capsys.readouterr().err
    other = ("--delta", tmp_path / "delta", "--pretrained", work / "edited", "--output", tmp_path / "other")
    assert called("apply", *other) == 2
    assert "a delta of another model" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_can_be_evaluated(work, tmp_path):
    assert called("export", "--ledger", work / "run", "--format", "hf", "--output", tmp_path / "hf") == 0
    scores = []
    common = (
        "--data.path", work / "records.json", "--trainer.accelerator", "cpu", "--model.measure_perplexity", "false",
        "--evaluation_report.figures", "false", "--trainer.default_root_dir",
    )  # fmt: skip
    ways = {
        "base": ("--model.pretrained", tmp_path / "hf"),
        "final": ("--model.pretrained", work / "model", "--model.ledger", work / "run"),
    }
    for moment, options in ways.items():
        assert called("evaluate", *options, *common, tmp_path / moment) == 0
        content = json.loads((tmp_path / moment / "results.json").read_text(encoding="utf-8"))
        scores.append([content[moment][name]["value"] for name in ("ES", "EM", "PM", "NM")])
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "peftt"], "format: expected one of hf, delta, peft, got 'peftt'; did you mean 'peft'?"),
        (["--format", "delta", "--rank", "2"], "rank: only an adapter (format peft) has one"),
        (["--format", "hf", "--cases", "77"], "the ledger has no record 77"),
        (["--format", "hf", "--push_to_hub", "not/a/name"], "push_to_hub: "),
        (["--format", "hf", "--ledger", "/nowhere"], "holds no ledger"),
        (["--format", "hf", "--output", "{work}/model"], "is not empty"),
        (["--format", "hf", "--output", "{work}/records.json/out"], "nothing was written"),
    ],
)
def test_mistakes_are_said_without_a_traceback(arguments, message, work, tmp_path, capsys):
    given = {"--ledger": str(work / "run"), "--output": str(tmp_path / "out")}
    given |= dict(zip(arguments[::2], (part.format(work=work) for part in arguments[1::2]), strict=True))
    assert main(["export", *(part for pair in given.items() for part in pair)]) == 2
    assert message in capsys.readouterr().err
    assert nothing_left(tmp_path)


def test_a_base_model_that_has_changed_since(work, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(work / "run", copy)
    edited = {"source": str(work / "edited"), "folder": str(work / "edited"), "from_run": str(work / "edited")}
    rewrite_json(copy / "manifest.json", lambda content: content | {"model": content["model"] | edited})
    assert called("export", "--ledger", copy, "--format", "delta", "--output", tmp_path / "out") == 2
    assert "a ledger of another model" in capsys.readouterr().err


# ---- the hub


class Hub:
    """Stands in for the hub's client; ``fails`` names a method and what it raises."""

    calls: ClassVar[list] = []
    fails: ClassVar[tuple] = ()

    def create_repo(self, repo_id, **options):
        from huggingface_hub.hf_api import RepoUrl

        self._do("create_repo", repo_id, options)
        return RepoUrl(f"https://huggingface.co/somebody/{repo_id}")

    def upload_folder(self, **options):
        files = sorted(file.name for file in Path(options["folder_path"]).iterdir())
        self._do("upload_folder", options["repo_id"], {"files": files})

    def _do(self, name, *call):
        if self.fails and self.fails[0] == name:
            raise self.fails[1]
        self.calls.append((name, *call))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(Hub, "fails", ())
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_made_up")
    return Hub


def pushed(work, tmp_path):
    return called(
        "export", "--ledger", work / "run", "--format", "delta", "--output", tmp_path / "out", "--push_to_hub", "facts"
    )


def test_an_export_goes_to_the_hub(work, tmp_path, hub, capsys):
    assert pushed(work, tmp_path) == 0
    assert hub.calls == [
        ("create_repo", "facts", {"private": True, "exist_ok": True}),
        ("upload_folder", "somebody/facts", {"files": ["README.md", "delta.safetensors", "rome_pl.json"]}),
    ]
    assert "Uploaded to https://huggingface.co/somebody/facts" in capsys.readouterr().out


def refused(status):
    """An answer of the hub, as its client raises it."""
    from huggingface_hub.errors import HfHubHTTPError

    module = __import__(HfHubHTTPError.__bases__[0].__module__)
    answer = module.Response(status, request=module.Request("POST", "https://huggingface.co/api/repos/create"))
    return HfHubHTTPError(f"{status} Forbidden: you may not create models\nRequest ID: x", response=answer)


def unreachable():
    from huggingface_hub.errors import HfHubHTTPError

    module = __import__(HfHubHTTPError.__bases__[0].__module__)
    return module.ConnectError("[Errno -2] Name or service not known")


@pytest.mark.parametrize("method", ["create_repo", "upload_folder"])
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (lambda: refused(403), "403 Forbidden: you may not create models. The export stays in"),
        (unreachable, "Name or service not known. The export stays in"),
        (lambda: OSError("offline"), "offline. The export stays in"),
    ],
)
def test_what_the_hub_refuses_stays_here(failure, message, method, work, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setattr(hub, "fails", (method, failure()))
    assert pushed(work, tmp_path) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert read_delta(tmp_path / "out").num_edits == 4


def test_without_a_token_the_export_stays_here(work, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert pushed(work, tmp_path) == 2
    assert "no token of the Hugging Face hub: hf auth login, or set HF_TOKEN" in capsys.readouterr().err
    assert hub.calls == []
    assert read_delta(tmp_path / "out").num_edits == 4
