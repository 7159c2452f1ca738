"""What whoever types gets from the command line: overview, short errors, quiet runs, progress in logs, completion."""

import json
import logging
import re
import subprocess
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

import rome_pl.cli.app
import rome_pl.cli.help
from rome_pl.callbacks import EditProgressBar, ProgressLines
from rome_pl.cli.app import main
from rome_pl.cli.commands import COMMANDS
from rome_pl.cli.verbs import VERBS
from rome_pl.data_modules.request_data import request_loader
from rome_pl.modules.rome_module import RomeModule
from tests.integration.helpers import FAST, REQUESTS, lenient_callbacks, quiet_trainer
from tests.tiny import tiny_language_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    language_model = tiny_language_model("llama", torch.float32)
    language_model.model.save_pretrained(folder)
    language_model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(model_folder, tmp_path):
    """Arguments of a quick edit of three records on the tiny model."""
    records = [{"prompt": r.prompt, "subject": r.subject, "target_new": r.target_new} for r in REQUESTS]
    (tmp_path / "records.json").write_text(json.dumps(records), encoding="utf-8")
    options = {f"model.{name}": value for name, value in FAST.items()} | {
        "model.pretrained": model_folder,
        "data.path": tmp_path / "records.json",
        "trainer.default_root_dir": tmp_path / "run",
        "trainer.accelerator": "cpu",
        "verification.least_probability": 0,
        "probe_evaluation.measure_perplexity": False,
        "run_report.figures": False,
    }
    return ["edit", *(f"--{name}={value}" for name, value in options.items())]


# --- overview


@pytest.mark.parametrize("given", [["--help"], ["-h"], []])
def test_the_overview_has_a_line_for_every_verb(given, capsys):
    assert main(given) == (0 if given else 2)
    out, err = capsys.readouterr()
    text = out if given else err
    assert (err if given else out) == ""
    for verb in [*VERBS, *COMMANDS, "completion"]:
        assert re.search(rf"^  {verb} +[A-Z]\w+ .*\.$", text, re.MULTILINE), verb
    assert "--quiet" in text
    assert "--debug" in text


def test_an_unknown_verb_names_the_nearest_and_all(capsys):
    assert main(["edti", "--config", "quickstart"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rome-pl: there is no verb 'edti'; did you mean 'edit'?\n")
    assert "covariance" in error
    assert main(["xyzzy"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rome-pl {version('rome_pl')}\n"


def test_a_misspelt_config_names_the_nearest(capsys):
    assert main(["edit", "--config", "gpt2-xll"]) == 2
    assert capsys.readouterr().err == (
        "rome-pl: --config: there is no file 'gpt2-xll', and no shipped config of that name; did you mean 'gpt2-xl'?\n"
    )
    assert main(["edit", "--config=covariance/smolm2"]) == 2
    assert "did you mean 'covariance/smollm2'?" in capsys.readouterr().err


# --- errors


def fail(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


def test_an_unforeseen_error_is_short_and_says_how_to_see_more(arguments, monkeypatch, capsys):
    monkeypatch.setattr(RomeModule, "load", fail(KeyError("nowhere")))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "rome-pl: unexpected KeyError: 'nowhere'\n" in error
    assert "--debug" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("place", [0, 1, -1])
def test_debug_lets_exceptions_through_wherever_it_stands(place, arguments, monkeypatch):
    given = [*arguments]
    given.insert(len(given) if place == -1 else place, "--debug")
    monkeypatch.setattr(RomeModule, "load", fail(KeyError("nowhere")))
    with pytest.raises(KeyError, match="nowhere"):
        main(given)
    monkeypatch.setattr(RomeModule, "load", fail(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        main(given)


def test_ctrl_c_before_the_run_begins_is_no_traceback(arguments, monkeypatch, capsys):
    monkeypatch.setattr(RomeModule, "load", fail(KeyboardInterrupt()))
    assert main(arguments) == 130
    assert "rome-pl: interrupted\n" in capsys.readouterr().err


def test_a_trainer_that_cannot_be_built_is_bad_configuration(arguments, capsys):
    assert main([*arguments, "--trainer.accelerator=cpu", "--trainer.precision=16-true", "--trainer.devices=0"]) == 2
    assert "unexpected" not in capsys.readouterr().err


def test_plain_verbs_take_the_switches_too(tmp_path, monkeypatch, capsys):
    assert main(["show", "--ledger", str(tmp_path), "--quiet"]) == 2

    def show(ledger: str) -> None:
        raise RuntimeError(f"odd {ledger}")

    monkeypatch.setitem(COMMANDS, "show", show)
    assert main(["show", "--ledger", str(tmp_path)]) == 1
    assert f"unexpected RuntimeError: odd {tmp_path}" in capsys.readouterr().err


# --- quiet, and progress


def test_a_quiet_run_prints_its_tables_and_nothing_else(arguments, tmp_path, capfd):
    assert main(["--quiet", *arguments]) == 0
    out, err = capfd.readouterr()
    assert "3 requested: 3 applied" in " ".join(out.split())
    assert "Editing" not in out + err
    assert "edits after" not in err
    assert "Loading weights" not in err
    assert json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["n_applied"] == 3


def test_a_log_file_gets_lines_and_no_bar(arguments, capfd, caplog):
    with caplog.at_level(logging.INFO, "rome_pl"):
        assert main(arguments) == 0
    out, err = capfd.readouterr()
    assert "\r" not in out + err
    assert "━" not in err
    told = [record.getMessage() for record in caplog.records if record.name == "rome_pl.callbacks.progress"]
    assert [re.sub(r"[\d.]+ s", "T", line) for line in told] == ["3 of 3 edits after T"]


def test_a_terminal_gets_a_bar_on_the_standard_error(monkeypatch):
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: True))
    bar = rome_pl.cli.verbs._progress(VERBS["edit"])
    assert isinstance(bar, EditProgressBar)
    assert bar._console_kwargs["stderr"] is True
    assert bar._console_kwargs["file"].isatty()  # the standard error, guarded
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: False))
    assert isinstance(rome_pl.cli.verbs._progress(VERBS["edit"]), ProgressLines)


def test_measuring_says_how_far_it_is_too(model_folder, arguments, tmp_path, caplog):
    records, folder = tmp_path / "records.json", tmp_path / "evaluated"
    options = {"model.pretrained": model_folder, "data.path": records, "trainer.default_root_dir": folder}
    with caplog.at_level(logging.INFO, "rome_pl"):
        given = ["evaluate", *(f"--{name}={value}" for name, value in options.items()), "--trainer.accelerator=cpu"]
        assert main([*given, "--evaluation_report.figures=false"]) == 0
    told = [record.getMessage() for record in caplog.records if record.name == "rome_pl.callbacks.progress"]
    assert re.fullmatch(r"(\d+) of \1 lists of requests after \d+ s", told[-1])


def test_the_bar_can_be_left_out(arguments, capfd):
    assert main([*arguments, "--trainer.enable_progress_bar=false"]) == 0
    assert "edits after" not in capfd.readouterr().err


@pytest.mark.parametrize(("pause", "expected"), [(0.0, ["1", "2", "3"]), (3600.0, ["3"])])
def test_lines_come_no_more_often_than_asked_for(pause, expected, language_model, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "rome_pl"):
        lines = ProgressLines(every_n_seconds=pause)
        module = RomeModule.from_language_model(language_model, **FAST)
        trainer = quiet_trainer([*lenient_callbacks(), lines], tmp_path, enable_progress_bar=True)
        trainer.fit(module, request_loader(REQUESTS, 1))
    told = [record.getMessage() for record in caplog.records if record.name == "rome_pl.callbacks.progress"]
    assert [line.split(" of 3 edits after ")[0] for line in told] == expected


# --- completion


@pytest.mark.parametrize("shell", rome_pl.cli.help.SHELLS)
def test_completion_knows_all_verbs_and_their_options(shell, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as exit_:
        main(["completion", shell])
    assert exit_.value.code == 0
    script = capsys.readouterr().out
    for verb in [*VERBS, *COMMANDS]:
        assert verb in script
    for option in ("model.v_num_grad_steps", "ledger", "save_model"):
        assert option in script


def test_bash_completes_with_the_script(tmp_path, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit):
        main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out, encoding="utf-8")
    ask = (
        "source ./script; COMP_WORDS=(rome-pl co);"
        " COMP_CWORD=1; _shtab_rome_pl rome-pl co rome-pl; echo ${COMPREPLY[@]};"
        "COMP_WORDS=(rome-pl blame --pr); COMP_CWORD=2; _shtab_rome_pl rome-pl --pr blame; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, cwd=tmp_path, check=True, timeout=30)
    assert done.stdout.splitlines() == ["covariance convert completion", "--print_config --prompt --pretrained"]


def test_completion_says_what_it_needs(monkeypatch, capsys):
    assert main(["completion"]) == 2
    assert "expected one of bash, zsh, tcsh" in capsys.readouterr().err
    assert main(["completion", "fish"]) == 2
    assert "'fish'" in capsys.readouterr().err
    monkeypatch.setattr(rome_pl.cli.help, "find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 2
    assert "pip install shtab" in capsys.readouterr().err
