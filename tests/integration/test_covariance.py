"""Second moments as users compute them: the command line, a Trainer of one's own, several processes, killed runs."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import yaml
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file

from rome_pl import CovarianceModule
from rome_pl.callbacks import MomentReport
from rome_pl.cli.app import main
from rome_pl.data_modules import CorpusDataModule
from rome_pl.errors import OptionError
from rome_pl.model.architecture import find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.second_moments.corpus import Corpus
from rome_pl.second_moments.moment_store import kept_statistics, statistics_folder, unfinished_folder
from rome_pl.second_moments.second_moment import SecondMoment, StatisticsError
from tests.integration.covariance_process import Halt, run
from tests.integration.helpers import FAST, changed, quiet_trainer, snapshot
from tests.tiny import LAYERS, byte_level_tokenizer, tiny_language_model, tiny_model

BLOCK = 1024
"""Tokens of a block; of one row of the tiny model, 128."""

TIMEOUT = 90
"""Seconds until a process counts as hung."""

NEVER = 2
"""An agreement that no halves reach."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    language_model = tiny_language_model("llama", torch.float32)
    language_model.model.save_pretrained(folder)
    language_model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Lines of words drawn at random, each a document; 20 blocks or so."""
    draw = random.Random(0)
    words = (Path(__file__).parents[2] / "rome_pl" / "assets" / "held_out_text.txt").read_text(encoding="utf-8").split()
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n".join(" ".join(draw.choices(words, k=draw.randint(3, 80))) for _ in range(300)), "utf-8")
    return path


@pytest.fixture(scope="module")
def basics(model_folder, text):
    """Options of every run: all layers of the tiny model, four blocks of text."""
    return {
        "--model.pretrained": model_folder,
        "--model.layers": "all",
        "--model.tokens": 4 * BLOCK,
        "--model.stop_agreement": NEVER,
        "--data.path": text,
        "--trainer.accelerator": "cpu",
    }


@pytest.fixture
def command(basics, tmp_path):
    """The command line in this process; returns its exit code."""

    def call(*switches, **changes):
        options = basics | {"--trainer.default_root_dir": tmp_path / "run"}
        options |= {f"--{name.replace('__', '.')}": value for name, value in changes.items()}
        return main(["covariance", *(str(part) for pair in options.items() for part in pair), *switches])

    return call


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def artefacts():
    """What is in the cache, by layer."""
    return {info.layer: SecondMoment.load(path) for path, info in kept_statistics()}


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


# The command line.


def test_a_run_leaves_its_artefacts_and_its_report(command, tmp_path, text, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert command() == 0
    kept = artefacts()
    assert sorted(kept) == list(range(LAYERS))
    assert {moment.info.count for moment in kept.values()} == {4 * BLOCK}
    assert {moment.info.source for moment in kept.values()} == {str(text)}

    run_folder = tmp_path / "run"
    results, manifest = read(run_folder), read(run_folder, "manifest.json")
    assert (results["n_layers"], results["n_cached"]) == (LAYERS, 0)
    for entry in results["layers"]:
        moment = kept[entry["layer"]]
        assert entry["agreement"] == moment.info.agreement
        assert len(entry["eigenvalues"]) == len(moment.matrix)
        assert sum(entry["eigenvalues"]) == pytest.approx(float(moment.matrix.trace()), rel=1e-5)
        assert entry["condition"] > 1
    assert [check["blocks"] for check in results["meetings"][0]] == [1, 2, 4]
    assert results["meetings"][0][-1]["agreement"]["0"] > 0.9
    assert manifest["corpus"]["source"] == str(text)
    assert manifest["documents_apart"] is True
    config = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))
    assert config["model"]["tokens"] == 4 * BLOCK
    for name in ("spectrum.png", "agreement.png"):
        assert (run_folder / "figures" / name).read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert all(path.name in out for path, _ in kept_statistics())

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder / "tensorboard")).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {f"{name}/layer_2" for name in ("agreement", "condition", "ridge", "effective_rank")} <= scalars
    # The first of three meetings comes after one block: there is no second half to agree yet.
    assert [event.step for event in events.Scalars("agreement/layer_1")] == [2 * BLOCK, 4 * BLOCK]
    assert set(events.Tags()["images"]) == {"spectrum", "agreement"}


def test_what_is_there_is_not_computed_again(command, tmp_path, monkeypatch):
    assert command(model__layers="[1]") == 0
    first = {path: path.read_bytes() for path, _ in kept_statistics()}
    steps = []
    original = CovarianceModule.predict_step
    monkeypatch.setattr(CovarianceModule, "predict_step", lambda *args: steps.append(1) or original(*args))
    assert command("--overwrite") == 0  # the other two layers
    assert steps
    assert [entry["cached"] for entry in read(tmp_path / "run")["layers"]] == [False, True, False]
    assert len(artefacts()) == LAYERS

    steps.clear()
    assert command(trainer__default_root_dir=tmp_path / "again") == 0
    assert not steps
    assert read(tmp_path / "again")["n_cached"] == LAYERS
    assert all(path.read_bytes() == content for path, content in first.items())


def test_an_edit_finds_what_the_command_has_computed(command, model_folder, text, tmp_path, monkeypatch):
    assert command() == 0
    monkeypatch.setattr("rome_pl.second_moments.moment_store.compute", lambda *_, **__: pytest.fail("is in the cache"))
    records = tmp_path / "records.json"
    records.write_text(json.dumps([{"prompt": "Korrin stands in", "subject": "Korrin", "target_new": "Oslo"}]))
    options = {f"--model.{name}": value for name, value in FAST.items()} | {
        "--model.pretrained": model_folder,
        "--model.preset": "r_rome",
        "--data.path": records,
        "--trainer.default_root_dir": tmp_path / "edit",
        "--trainer.accelerator": "cpu",
        "--verification.least_probability": 0,
        "--probe_evaluation.measure_perplexity": "false",
    }
    assert main(["edit", *(str(part) for pair in options.items() for part in pair)]) == 0
    (found,) = read(tmp_path / "edit", "manifest.json")["second_moments"]
    assert (found["layer"], found["count"], found["source"]) == (1, 4 * BLOCK, str(text))
    assert found["corpus"] == artefacts()[1].info.corpus


def test_list_shows_what_is_kept_without_a_model(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "250")
    assert command() == 0
    (statistics_folder() / "broken.safetensors").write_text("nothing")
    (unfinished_folder(statistics_folder()) / "job").mkdir()
    (unfinished_folder(statistics_folder()) / "job" / "process-0-of-1.safetensors").touch()
    capsys.readouterr()
    monkeypatch.setattr(
        "rome_pl.modules.language_model_module.load_language_model", lambda *_: pytest.fail("needs no model")
    )
    assert main(["covariance", "--list", "--trainer.default_root_dir", str(tmp_path / "list")]) == 0
    out = capsys.readouterr().out
    for path, info in kept_statistics():
        assert path.name in out
        assert info is None or f"{info.agreement:.3f}" in out
    assert "broken.safetensors (damaged: delete it)" in out
    assert "1 unfinished" in out
    assert not (tmp_path / "list").exists()


def test_published_statistics_go_out_and_come_in(command, tmp_path, monkeypatch):
    assert command(export_npz=tmp_path / "npz") == 0
    ours = artefacts()[1]
    path = tmp_path / "npz" / "model.layers.1.mlp.down_proj_float32_mom2_4096.npz"
    assert len(list(path.parent.iterdir())) == LAYERS
    with numpy.load(path) as content:
        assert int(content["mom2.count"]) == 4 * BLOCK
        torch.testing.assert_close(
            torch.from_numpy(content["mom2.mom2"]).double() / (4 * BLOCK), ours.matrix, rtol=1e-6, atol=1e-9
        )
    monkeypatch.setenv("ROME_PL_CACHE", str(tmp_path / "other"))
    assert command("--overwrite", import_npz=path, model__layers="[1]") == 0
    (theirs,) = artefacts().values()
    assert (theirs.info.layer, theirs.info.count, theirs.info.weights) == (1, 4 * BLOCK, ours.info.weights)
    assert relative(theirs.matrix, ours.matrix) < 2e-7


def test_the_shipped_config_computes_all_layers(model_folder, text, tmp_path):
    options = {
        "--config": "covariance/smollm2",
        "--model.pretrained": model_folder,
        "--data.path": text,
        "--trainer.default_root_dir": tmp_path / "run",
        "--trainer.accelerator": "cpu",
    }
    assert main(["covariance", *(str(part) for pair in options.items() for part in pair)]) == 0
    results = read(tmp_path / "run")
    # 30 keys for each of 48 dimensions.
    assert [entry["count"] for entry in results["layers"]] == [2 * BLOCK] * LAYERS


def test_layers_in_several_passes_give_what_one_pass_gives(command, tmp_path, monkeypatch):
    options = {"model__block_length": 100, "model__split_half": "false"}
    assert command(**options) == 0
    together = artefacts()
    monkeypatch.setenv("ROME_PL_CACHE", str(tmp_path / "other"))
    assert command("--overwrite", model__layers_per_pass=2, model__accumulate_on="host", **options) == 0
    for layer, moment in artefacts().items():
        assert moment.info.agreement is None
        assert torch.equal(moment.matrix, together[layer].matrix)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__layers": "[0,7]"}, "layers: 7 does not exist; the model has 3 layers"),
        ({"model__layers": "2-9"}, "layers: 3 does not exist"),
        ({"model__layers": "7-9"}, "layers: 7 does not exist"),
        ({"model__layers": "deepest"}, "layers: expected 'all', a list, or a range such as 4-8, got 'deepest'"),
        ({"model__layers": "[]"}, "names no layer"),
        ({"model__tokens": 0}, "tokens: expected a number from 1 on"),
        ({"model__block_length": 0}, "block_length"),
        ({"data__path": "empty.txt"}, "empty.txt: is empty; give a file with text in it"),
        ({"data__path": "blank.txt"}, "blank.txt: is empty"),
        ({"data__path": "latin.txt"}, "latin.txt: not UTF-8 (byte 0xe9)"),
        ({"data__path": "latin.txt", "data__num_workers": 2}, "latin.txt: not UTF-8 (byte 0xe9)"),
        ({"data__path": "late.txt", "data__num_workers": 1}, "late.txt: not UTF-8 (byte 0xe9)"),
        ({"data__path": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"data__path": "other.jsonl"}, "other.jsonl, record 0: column 'text' holds no text; columns: ['body']"),
        ({"data__num_workers": -1}, "num_workers"),
        ({"trainer__precision": "bf16-mixed"}, "use '32-true'"),
        ({"trainer__limit_predict_batches": 1}, "limit_predict_batches"),
        ({"trainer__fast_dev_run": "true"}, "limit_predict_batches"),
        ({"import_npz": "nowhere.npz", "model__layers": "1"}, "nowhere.npz: no statistics in the published form"),
        ({"import_npz": "cut.npz", "model__layers": "1"}, "cut.npz: no statistics in the published form"),
        ({"import_npz": "plain.npy", "model__layers": "1"}, "plain.npy: no statistics in the published form"),
        ({"import_npz": "other.npz", "model__layers": "1"}, "it is of another model"),
        ({"import_npz": "other.npz"}, "give model.layers one layer, not 3"),
    ],
    ids=lambda value: "-".join(f"{name}={given}" for name, given in value.items()) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_in_one_line_and_replaces_no_report(
    changes, message, command, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("blank.txt").write_text(" \n\n\t\n")
    Path("latin.txt").write_bytes("caf\xe9 on the quay\n\nand more".encode("latin-1"))
    Path("late.txt").write_bytes(b"plain words\n" * 3000 + b"caf\xe9")
    Path("other.jsonl").write_text('{"body": "a text"}\n')
    numpy.savez("other.npz", **{"mom2.mom2": numpy.eye(5), "mom2.count": numpy.array(9)})
    Path("cut.npz").write_bytes(Path("other.npz").read_bytes()[:-40])
    numpy.save("plain.npy", numpy.eye(3))
    Path("run").mkdir()
    Path("run/results.json").write_text("of an earlier run")
    assert command("--overwrite", **changes) == 2
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("rome-pl:")]
    assert message in line
    assert "Traceback" not in err
    assert not list(kept_statistics())
    if changes.get("data__path") != "late.txt":
        assert Path("run/results.json").read_text() == "of an earlier run"


def test_a_run_folder_is_not_overwritten_by_accident(command, tmp_path, capsys):
    assert command() == 0
    before = (tmp_path / "run" / "results.json").read_bytes()
    assert command() == 2
    err = capsys.readouterr().err
    assert "is not empty (results.json)" in err
    assert "--overwrite" in err
    assert (tmp_path / "run" / "results.json").read_bytes() == before


def test_little_text_is_said(command, tmp_path, caplog):
    (tmp_path / "little.txt").write_text("The tide comes in twice a day.")
    assert command(data__path=tmp_path / "little.txt", model__layers="[1]") == 0
    count = artefacts()[1].info.count
    assert f"At least {48 - count} more are needed, better 1440 in all" in caplog.text


def test_ctrl_c_leaves_what_the_next_run_goes_on_with(command, tmp_path, monkeypatch, caplog):
    original = CovarianceModule.predict_step

    def interrupted(self, batch, batch_idx):
        if batch_idx == 2:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(CovarianceModule, "predict_step", interrupted)
        assert command(model__save_every_n_tokens=1) == 130
    assert not artefacts()
    with caplog.at_level("INFO"):
        assert command(model__save_every_n_tokens=1) == 0
    assert "Resuming with 2 blocks" in caplog.text
    assert artefacts()[1].info.count == 4 * BLOCK


def test_a_tokenizer_whose_openings_fill_a_row_is_refused(tmp_path):
    language_model = LanguageModel(tiny_model("llama"), byte_level_tokenizer(bos=True), "with BOS")
    module = CovarianceModule.from_language_model(language_model, layers=[1], block_length=1)
    trainer = quiet_trainer([], tmp_path)
    with pytest.raises(OptionError, match="block_length"):
        trainer.predict(module, datamodule=CorpusDataModule(str(Path(__file__))), return_predictions=False)


# A Trainer of one's own.


def predict(language_model, folder, text, num_workers=0, callbacks=(), module=None, **options):
    options = {"layers": [0, 2], "tokens": 5 * BLOCK, "stop_agreement": NEVER, "folder": str(folder), **options}
    module = module or CovarianceModule.from_language_model(language_model, **options)
    trainer = quiet_trainer(list(callbacks), folder / "run")
    data = CorpusDataModule(str(text), num_workers=num_workers)
    trainer.predict(module, datamodule=data, return_predictions=False)
    return {done.layer: SecondMoment.load(done.path) for done in module.finished}


class Meetings(Callback):
    """A user's callback: where halves were compared."""

    def __init__(self):
        self.found = []

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if outputs:
            self.found.append(outputs)


def test_a_trainer_of_ones_own_with_ones_own_callback_and_logger(language_model, text, tmp_path):
    meetings = Meetings()
    module = CovarianceModule.from_language_model(language_model, layers="0,2", tokens=5 * BLOCK, stop_agreement=NEVER)
    trainer = Trainer(
        accelerator="cpu",
        logger=CSVLogger(tmp_path, name="csv", version=""),
        callbacks=[meetings, MomentReport()],
        default_root_dir=tmp_path / "run",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    outputs = trainer.predict(module, datamodule=CorpusDataModule(str(text)))
    assert [done.layer for done in module.finished] == [0, 2]
    assert not any(done.cached for done in module.finished)
    assert [check.blocks for check in module.history[0]] == [1, 2, 5]
    assert meetings.found == module.history[0] == [output for output in outputs if output]
    rows = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert {"agreement/layer_0", "agreement/layer_2", "condition/layer_2", "keys_per_second"} <= set(rows[0].split(","))
    assert read(tmp_path / "run")["n_layers"] == 2


def test_the_matrix_is_that_of_plain_forwards(language_model, tmp_path):
    """Documents that share a row are summed as if each had been read alone."""
    path = tmp_path / "short.txt"
    path.write_text("The tide comes in.\nNobody had seen the keeper since the storm.\nBread needs time.", "utf-8")
    documents = list(Corpus(str(path)).texts())
    assert len(documents) == 3
    moments = predict(language_model, tmp_path, path, tokens=10**6, block_length=10**6)
    for layer, moment in moments.items():
        site = find_site(language_model.model, layer)
        kept = []
        handle = site.projection.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0][0]))
        with torch.no_grad():
            for document in documents:
                language_model.model(torch.tensor([language_model.tokenizer(document)["input_ids"]]))
        handle.remove()
        keys = torch.cat(kept)
        assert moment.info.count == len(keys)
        assert relative(moment.matrix, keys.T @ keys / len(keys)) < 1e-6


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_other_verbs_of_a_trainer_are_refused(verb, language_model, text, tmp_path):
    module = CovarianceModule.from_language_model(language_model, layers=[1])
    with pytest.raises((MisconfigurationException, OptionError), match=r"_step\(\)|Trainer.predict"):
        getattr(quiet_trainer([], tmp_path), verb)(module, datamodule=CorpusDataModule(str(text)))


def test_workers_change_nothing(language_model, text, tmp_path):
    plain = predict(language_model, tmp_path / "0", text)
    for num_workers in (1, 2):
        moments = predict(language_model, tmp_path / str(num_workers), text, num_workers)
        for layer, moment in moments.items():
            assert moment.info.count == plain[layer].info.count == 5 * BLOCK
            assert torch.equal(moment.matrix, plain[layer].matrix)


@pytest.mark.parametrize("fails", [False, True])
def test_a_pass_leaves_the_model_as_it_was(fails, language_model, text, tmp_path):
    model = language_model.model
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before, state = snapshot(model), torch.get_rng_state()

    class Stumbles(Callback):
        def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 2 and fails:
                raise RuntimeError("stumbled")

    with pytest.raises(RuntimeError, match="stumbled") if fails else nullcontext():
        predict(language_model, tmp_path, text, callbacks=[Stumbles()])
    if not fails:
        assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not changed(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_failed_pass_does_not_block_the_next_one_in_the_same_session(language_model, text, tmp_path):
    class Stumbles(CovarianceModule):
        def predict_step(self, batch, batch_idx):
            raise RuntimeError("stumbled")

    options = {"layers": [0, 2], "tokens": 5 * BLOCK, "stop_agreement": NEVER, "folder": str(tmp_path)}
    failed = Stumbles.from_language_model(language_model, **options)  # a notebook keeps it
    with pytest.raises(RuntimeError, match="stumbled"):
        predict(language_model, tmp_path, text, module=failed)
    assert len(predict(language_model, tmp_path, text)) == 2


def test_a_key_that_is_not_finite_is_named(language_model, text, tmp_path):
    with torch.no_grad():
        language_model.model.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(StatisticsError, match=r"layer 1, block 0 of .*text.txt: a key is not finite"):
        predict(language_model, tmp_path, text, layers=[0, 1, 2])


# Processes that share the job, and processes that are killed.


class Started:
    """Processes that share one run of the command line, each in the state that tests leave it in."""

    def __init__(self, folder, processes, halts):
        self.folder, self.processes, self.halts = folder, processes, halts

    @property
    def said(self):
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log-*")))

    def ended(self):
        """The matrices before they were rounded, by layer, and the results of a run that has to end well."""
        for process in self.processes:
            process.join(TIMEOUT)
            assert process.exitcode == 0, self.said
        exact = {int(path.stem): load_file(path)["matrix"] for path in (self.folder / "exact").iterdir()}
        return exact, read(self.folder / "run")

    def killed(self):
        """SIGKILL all processes once those that are to halt have halted."""
        deadline = time.monotonic() + TIMEOUT
        for rank, halt in enumerate(self.halts):
            while halt is not None and not (self.folder / f"halted-{rank}").exists():
                assert time.monotonic() < deadline, f"process {rank} never came to {halt}:\n{self.said}"
                assert all(process.is_alive() for process in self.processes), self.said
                time.sleep(0.01)
        self.kill()

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


class Job:
    """Runs of the command line that share a cache, in processes that can be killed.

    Processes come from a server that has imported everything, so that a start takes little.
    """

    def __init__(self, folder, basics):
        self.folder, self.basics, self.runs = folder, basics, []
        self.server = multiprocessing.get_context("forkserver")
        self.server.set_forkserver_preload(
            ["rome_pl.cli.app", "transformers.models.llama.modeling_llama", "torch.utils.tensorboard"]
        )

    def start(self, devices=1, halts=(None, None), waits=(None, None), cache="cache", **changes):
        folder = self.folder / f"run-{len(self.runs)}"
        folder.mkdir(parents=True)
        options = self.basics | {"--trainer.default_root_dir": folder / "run", "--model.save_every_n_tokens": 1}
        environment = {"ROME_PL_CACHE": str(self.folder / cache)}
        if devices > 1:
            options |= {"--trainer.devices": devices, "--trainer.strategy": "ddp"}
            environment |= {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
        options |= {f"--{name.replace('__', '.')}": value for name, value in changes.items()}
        arguments = ["covariance", *(str(part) for pair in options.items() for part in pair)]
        processes = []
        for rank in range(devices):
            own = environment | ({"LOCAL_RANK": str(rank)} if devices > 1 else {})
            process = self.server.Process(target=run, args=(arguments, folder, own, rank, halts[rank], waits[rank]))
            process.start()
            processes.append(process)
        self.runs.append(Started(folder, processes, halts[:devices]))
        return self.runs[-1]

    def stored(self, cache="cache"):
        return {
            info.layer: SecondMoment.load(path) for path, info in kept_statistics(self.folder / cache / "statistics")
        }


@pytest.fixture
def job(basics, tmp_path):
    job = Job(tmp_path, basics)
    yield job
    for started in job.runs:
        started.kill()


@pytest.fixture(scope="module")
def uninterrupted(basics, tmp_path_factory):
    """One process that nothing happens to, over 20 blocks: processes meet after 5, 10 and 20."""
    job = Job(tmp_path_factory.mktemp("uninterrupted"), basics)
    return SimpleNamespace(outcome=job.start(model__tokens=20 * BLOCK).ended(), stored=job.stored())


def assert_same(ours, theirs):
    """The same matrices, up to rounding in float64, and the same counts."""
    (matrices, results), (expected, reference) = ours, theirs
    assert sorted(matrices) == sorted(expected)
    for layer, matrix in matrices.items():
        assert matrix.dtype == torch.float64
        assert relative(matrix, expected[layer]) <= 1e-12
    for entry, other in zip(results["layers"], reference["layers"], strict=True):
        assert entry["count"] == other["count"]
        assert entry["agreement"] == pytest.approx(other["agreement"], abs=1e-9)
    for checks, others in zip(results["meetings"], reference["meetings"], strict=True):
        assert [(check["blocks"], check["keys"]) for check in checks] == [(c["blocks"], c["keys"]) for c in others]


def test_two_processes_give_what_one_gives_for_an_even_number_of_blocks(job, uninterrupted):
    two = job.start(2, model__tokens=20 * BLOCK).ended()
    assert_same(two, uninterrupted.outcome)
    assert two[1]["layers"][0]["count"] == 20 * BLOCK


def test_two_processes_give_what_one_gives_for_an_odd_number_of_blocks_to_the_end_of_the_text(job, text, tmp_path):
    lines = text.read_text(encoding="utf-8").splitlines()
    (tmp_path / "short.txt").write_text("\n".join(lines[:60]), "utf-8")
    options = {"data__path": tmp_path / "short.txt", "model__tokens": 10**6}
    one, two = (job.start(devices, cache=f"cache-{devices}", **options).ended() for devices in (1, 2))
    assert_same(two, one)
    blocks = two[1]["meetings"][0][-1]["blocks"]
    assert blocks % 2 == 1
    assert (blocks - 1) * BLOCK < two[1]["layers"][0]["count"] < blocks * BLOCK  # the last one is not full


def test_processes_that_lightning_starts_end_early_together(basics, job, tmp_path, model_folder):
    """With workers of data loaders, of which each reads its process's share."""
    options = {"model__tokens": 20 * BLOCK, "model__stop_agreement": 0.9}
    one = job.start(cache="one", **options).ended()
    changes = {
        "--model.tokens": 20 * BLOCK,
        "--model.stop_agreement": 0.9,
        "--trainer.default_root_dir": tmp_path / "run",
        "--trainer.devices": 2,
        "--data.num_workers": 1,
    }
    command = [str(Path(sys.executable).parent / "rome-pl"), "covariance"]
    command += [str(part) for pair in (basics | changes).items() for part in pair]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ROME_PL_CACHE": str(tmp_path / "two")}
    two = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("Second moments of keys") == 1
    results = read(tmp_path / "run")
    last = results["meetings"][0][-1]
    assert last["enough"]
    assert last["blocks"] == one[1]["meetings"][0][-1]["blocks"] < 20
    ours, theirs = job.stored("two"), job.stored("one")
    for layer, moment in ours.items():
        assert moment.info.count == theirs[layer].info.count == last["blocks"] * BLOCK
        assert relative(moment.matrix, theirs[layer].matrix) < 1e-7  # stored in float32


def test_one_of_two_processes_that_fails_takes_the_other_with_it(job, text, tmp_path):
    model = tiny_language_model("gpt_neox", torch.float32)
    snow = model.tokenizer("☃")["input_ids"][-1]
    lines = text.read_text(encoding="utf-8").splitlines()
    assert snow not in model.tokenizer("\n".join(lines))["input_ids"]
    lengths = accumulate(len(ids) for ids in model.tokenizer([f"{line}\n" for line in lines])["input_ids"])
    number = next(number for number, length in enumerate(lengths) if length > 3.5 * BLOCK)  # of block 3
    lines[number] += " ☃"
    (tmp_path / "snow.txt").write_text("\n".join(lines), "utf-8")
    with torch.no_grad():
        weight = model.model.get_input_embeddings().weight
        weight[snow] = 3.3e38  # finite, so that the model loads; its layer norm is not
        weight[snow, ::2] *= -1
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    options = {"model__pretrained": tmp_path / "model", "data__path": tmp_path / "snow.txt"}
    started = job.start(2, model__tokens=20 * BLOCK, **options)
    for process in started.processes:
        process.join(TIMEOUT)
        assert process.exitcode == 2, started.said
    first, second = ((started.folder / f"log-{rank}").read_text() for rank in range(2))
    assert "rome-pl: layer 0, block 3 of" in second
    assert "rome-pl: another process of this job has ended" in first
    assert "Traceback" not in started.said
    assert not job.stored()


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(job, uninterrupted):
    options = {"model__tokens": 20 * BLOCK, "model__save_every_n_tokens": 3 * BLOCK}
    moments = (
        Halt("name", 2),  # the second save is written, but does not have its name yet
        Halt("step", 6),  # with a block that is not saved
        Halt("name", 1, "*.layer1.*"),  # the pass is over, two of three artefacts are written
    )
    for halt in moments:
        job.start(halts=(halt,), **options).killed()
    assert not job.stored()
    job.start(**options).ended()
    assert "Resuming with 3 blocks" in job.runs[1].said
    assert "Resuming with 6 blocks" in job.runs[2].said
    assert "Resuming with 18 blocks" in job.runs[3].said
    ours = job.stored()
    assert sorted(ours) == sorted(uninterrupted.stored)
    for layer, moment in ours.items():
        assert torch.equal(moment.matrix, uninterrupted.stored[layer].matrix)
        assert replace(moment.info, date="") == replace(uninterrupted.stored[layer].info, date="")
        for path in job.folder.glob(f"run-*/exact/{layer}.safetensors"):
            assert torch.equal(load_file(path)["matrix"], uninterrupted.outcome[0][layer])
    assert not list(job.folder.glob("cache/statistics/unfinished/*/*"))


@pytest.mark.slow
def test_sigkill_at_ten_random_moments_changes_no_bit(job, uninterrupted):
    draw = random.Random(1)
    options = {"model__tokens": 20 * BLOCK, "model__save_every_n_tokens": BLOCK}
    for _ in range(10):
        started = job.start(**options)
        time.sleep(draw.uniform(0, 2))
        started.kill()
    job.start(**options).ended()
    for layer, moment in job.stored().items():
        assert torch.equal(moment.matrix, uninterrupted.stored[layer].matrix)


def test_two_processes_killed_go_on_as_two_and_then_as_one(job, uninterrupted):
    tokens = {"model__tokens": 20 * BLOCK}
    # The second process has saved a block, the first nothing.
    job.start(2, halts=(Halt("step", 1), Halt("step", 2)), **tokens).killed()
    # The first takes over that block, but only after the second has saved another one.
    job.start(2, halts=(Halt("step", 5), Halt("step", 5)), waits=("process-1-*", None), **tokens).killed()
    # One process takes over the sums of both, and is killed before it can delete their files (what it deletes first is
    # the name of what the first process took over).
    job.start(halts=(Halt("delete", 2),), **tokens).killed()
    ours = job.start(**tokens).ended()
    assert_same(ours, uninterrupted.outcome)
    for started, blocks in zip(job.runs[1:], (1, 9, 10), strict=True):
        assert f"Resuming with {blocks} blocks" in started.said


def test_one_process_killed_goes_on_as_two(job, uninterrupted):
    tokens = {"model__tokens": 20 * BLOCK}
    job.start(halts=(Halt("step", 8),), **tokens).killed()
    # The first process has taken over seven blocks and has saved them with one more; the second has saved two.
    job.start(2, halts=(Halt("name", 2), Halt("step", 3)), **tokens).killed()
    assert_same(job.start(2, **tokens).ended(), uninterrupted.outcome)
    assert "Resuming with 7 blocks" in job.runs[1].said


def test_two_runs_of_one_job_exclude_each_other(job, command, capsys, monkeypatch):
    first = job.start(halts=(Halt("step", 2),))
    while not (first.folder / "halted-0").exists():
        assert first.processes[0].is_alive(), first.said
        time.sleep(0.01)
    monkeypatch.setenv("ROME_PL_CACHE", str(job.folder / "cache"))
    assert command() == 2
    err = capsys.readouterr().err
    assert "rome-pl: another run is computing the same second moments" in err
    assert str(job.folder / "cache") in err
    assert "Traceback" not in err
    first.kill()
    assert command() == 0
    assert len(artefacts()) == LAYERS
