"""Devices that are not there, before anything is loaded."""

import pytest
import torch

from rome_pl import KnowledgeEditor
from rome_pl.errors import OptionError
from rome_pl.model.devices import check_device, check_trainer_devices
from tests.integration.helpers import called


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    "device", ["cuda", "cuda:0", "cuda:7", "mps", "xpu", "meta", "gpu", "nonsense", "", 0, "cpu:3"]
)
def test_the_editor_refuses_a_device_before_it_looks_for_the_model(device):
    with pytest.raises(OptionError, match=r"device: .*there is no GPU here: use the CPU"):
        KnowledgeEditor.from_pretrained("no-such-model", device=device)


@pytest.mark.usefixtures("no_gpu")
def test_the_cpu_is_taken():
    for device in (None, "cpu", torch.device("cpu")):
        assert check_device(device) == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
def test_gpus_that_are_there_are_taken():
    assert check_device(None) == torch.device("cuda")
    assert check_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(OptionError, match=r"'cuda:2' is not here; here are the CPU and 2 GPUs"):
        check_device("cuda:2")
    for accelerator, devices in (("auto", [0]), ("auto", -1), ("gpu", "0,1"), ("cpu", 2)):
        check_trainer_devices(accelerator, devices)
    with pytest.raises(OptionError, match=r"trainer\.devices"):
        check_trainer_devices("cpu", [0])


@pytest.mark.usefixtures("no_gpu")
def test_the_trainer_takes_numbers_of_processes_on_the_cpu():
    for accelerator in ("auto", "cpu"):
        for devices in (1, 2, "1", "auto"):
            check_trainer_devices(accelerator, devices)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("verb", ["edit", "evaluate"])
@pytest.mark.parametrize(
    ("option", "value"),
    [("devices", "[0]"), ("devices", -1), ("devices", 0), ("devices", "cuda:0"), ("accelerator", "gpu"),
     ("accelerator", "cuda")],
)  # fmt: skip
def test_the_command_line_refuses_devices_in_one_line(verb, option, value, tmp_path, capsys):
    arguments = ("--model.pretrained", "no-such-model", "--data.path", "sample")
    folder = ("--trainer.default_root_dir", tmp_path / "run")
    assert called(verb, *arguments, *folder, f"--trainer.{option}", value) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rome-pl:")]
    assert said.startswith(f"rome-pl: trainer.{option}: ")
    assert "there is no GPU here" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value"), [("max_time", "00:00:00:00"), ("max_steps", 0), ("limit_train_batches", 0)]
)
def test_limits_that_end_a_stream_at_once_are_refused(option, value, tmp_path, capsys):
    arguments = ("--model.pretrained", "no-such-model", "--data.path", "sample")
    folder = ("--trainer.default_root_dir", tmp_path / "run")
    assert called("edit", *arguments, *folder, f"--trainer.{option}", value) == 2
    assert f"trainer.{option}: 0 ends the stream before its first edit" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["evaluate", "locate", "covariance"])
def test_limits_under_which_nothing_is_measured_are_refused(verb, tmp_path, capsys):
    arguments = ("--model.pretrained", "no-such-model", "--data.path", "sample")
    folder = ("--trainer.default_root_dir", tmp_path / "run")
    assert called(verb, *arguments, *folder, "--trainer.limit_predict_batches", 0) == 2
    assert "trainer.limit_predict_batches: 0 ends the run before anything is done" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", [["model", "tokenizer"], None, 7, torch.nn.Linear(1, 1)], ids=type)
def test_the_editor_says_what_a_source_is(source):
    with pytest.raises(OptionError, match=rf"a pair \(model, tokenizer\), got {type(source).__name__}"):
        KnowledgeEditor.from_pretrained(source)
