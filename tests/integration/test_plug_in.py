"""The parts in Trainers, with loggers and callbacks, and on modules that are somebody else's."""

import csv
import json

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from rome_pl import RomeModule
from rome_pl.callbacks import RepresentationCheck, RetentionCheck, RunReport, StateCheck, TensorBoardReport
from rome_pl.cli.app import main
from rome_pl.data_modules.request_data import request_loader
from rome_pl.errors import OptionError
from rome_pl.ledger.status import EditStatus
from rome_pl.utils.distributed import check_strategy
from tests.integration.helpers import FAST, REQUESTS, changed, lenient_callbacks, lighthouses, quiet_trainer, snapshot
from tests.tiny import tiny_language_model


class OwnLogger(Logger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.rows, self.hparams = [], None

    @property
    def name(self):
        return "own"

    @property
    def version(self):
        return 0

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        self.hparams = params


class CountEdits(Callback):
    """Reads what a step gives back."""

    def __init__(self):
        self.statuses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.statuses += [edit.status for edit in outputs["edits"]]


class Training(LightningModule):
    """A module that knows nothing of this package: it fine-tunes a causal language model."""

    def __init__(self, language_model, lr=0.0):
        super().__init__()
        self.model, self.tokenizer, self.lr = language_model.model, language_model.tokenizer, lr

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Validating(Training):
    """One that also validates."""

    def validation_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The lighthouse of Korrin stands in Oslo. It rains.", encoding="utf-8")
    return str(path)


def train(module, folder, callbacks, **options):
    rows = torch.arange(3, 3 + 6 * 8).reshape(6, 8)
    trainer = quiet_trainer(callbacks, folder, **options)
    trainer.fit(module, DataLoader(rows, batch_size=1))
    return trainer


def test_loggers_and_callbacks_of_ones_own_work_beside_ours(language_model, tmp_path):
    counted, own = CountEdits(), OwnLogger()
    loggers = [CSVLogger(tmp_path, name="csv", version=""), own]
    trainer = quiet_trainer(
        [*lenient_callbacks(), TensorBoardReport(), RunReport(figures=False), counted], tmp_path, logger=loggers,
        log_every_n_steps=1,
    )  # fmt: skip
    module = RomeModule.from_language_model(language_model, **FAST, sequential_edit=True)
    trainer.fit(module, request_loader(list(REQUESTS)))
    assert counted.statuses == [EditStatus.APPLIED] * 3
    steps = [step for step, row in own.rows if "edit/loss" in row]
    assert steps == [0, 1, 2]
    assert own.hparams["sequential_edit"] is True
    with (tmp_path / "csv" / "metrics.csv").open(encoding="utf-8") as file:
        logged = [row["edit/loss"] for row in csv.DictReader(file) if row["edit/loss"]]
    assert [float(loss) for loss in logged] == pytest.approx([edit.steps[-1].loss for edit in module.session.edits])
    assert json.loads((tmp_path / "results.json").read_text())["n_applied"] == 3


def test_the_state_check_watches_a_module_that_trains(language_model, text, tmp_path, monkeypatch):
    before, own = snapshot(language_model.model), OwnLogger()
    check = StateCheck(every_n_edits=2, largest_perplexity_ratio=50.0, largest_divergence=20.0, perplexity_text=text)
    train(Training(language_model, lr=0.02), tmp_path, [check], logger=own, log_every_n_steps=1)
    assert [found["batches"] for found in check.checks] == [2, 4, 6]
    now = snapshot(language_model.model)
    names = [name for name, _ in language_model.model.named_parameters()]
    moved = sum(float((now[name] - before[name]).square().sum()) for name in names)
    original = sum(float(before[name].square().sum()) for name in names)
    assert check.checks[-1]["change"] == pytest.approx((moved / original) ** 0.5)
    # Divergence from the weights that the fit began with, and perplexity beside theirs, computed here once more.
    ids = torch.tensor([language_model.tokenizer("The lighthouse of Korrin stands in Oslo. It rains.")["input_ids"]])
    with torch.no_grad():
        models = (tiny_language_model().model, language_model.model)
        then, last = (model.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1) for model in models)
    divergence = float((then.exp() * (then - last)).sum(-1).mean())
    assert divergence > 1e-3
    assert check.checks[-1]["divergence"] == pytest.approx(divergence, rel=1e-5)
    losses = [-row.gather(1, ids[0, 1:, None]).mean() for row in (then, last)]
    assert check.checks[-1]["perplexity_ratio"] == pytest.approx(float((losses[1] - losses[0]).exp()), rel=1e-5)
    logged = [(step, row) for step, row in own.rows if "state/change" in row]
    assert [step for step, _ in logged] == [2, 4, 6]
    assert logged[-1][1]["state/divergence"] == check.checks[-1]["divergence"]


def test_looking_changes_nothing_of_the_training(text, tmp_path):
    models = tiny_language_model(), tiny_language_model()
    check = StateCheck(every_n_edits=1, largest_divergence=20.0, perplexity_text=text)
    for language_model, callbacks in zip(models, ([check], []), strict=True):
        language_model.model.train()
        train(Training(language_model, lr=0.02), tmp_path, callbacks)
        assert language_model.model.training
        assert all(parameter.requires_grad for parameter in language_model.model.parameters())
    assert changed(models[0].model, snapshot(models[1].model)) == []


def test_a_training_that_breaks_the_model_is_reported_or_ended(tmp_path, caplog):
    for on_failure, batches in (("warn", 6), ("stop", 2)):
        check = StateCheck(every_n_edits=2, least_canary_agreement=1.0, largest_change=1e-9, on_failure=on_failure)
        trainer = train(Training(tiny_language_model(), lr=0.5), tmp_path, [check])
        assert trainer.global_step == batches
        assert "largest_change" in check.checks[0]["failures"][0]
        assert "after 2 batches" in caplog.text


def test_weights_that_are_not_finite_are_noticed(language_model, tmp_path):
    check = StateCheck(every_n_edits=1, on_failure="stop")
    with torch.no_grad():
        language_model.model.lm_head.weight[0, 0] = float("nan")
    train(Training(language_model), tmp_path, [check])
    assert not check.checks[0]["finite"]
    assert "a weight is not finite" in check.checks[0]["failures"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_failure": "recover"}, "use warn or stop"),
        ({"largest_spectral_change": 1.0}, "rewrite layers"),
        ({"least_retained": 0.5}, "least_retained is of edits"),
    ],
)
def test_what_needs_edits_is_refused_elsewhere(options, message, language_model, tmp_path):
    with pytest.raises(OptionError, match=message):
        train(Training(language_model), tmp_path, [StateCheck(**options)])


def test_a_module_without_a_language_model_is_told_what_is_missing(language_model, tmp_path):
    module = Training(language_model)
    module.tokenizer = None
    with pytest.raises(TypeError, match=r"Training has no language model.*'tokenizer'"):
        train(module, tmp_path, [StateCheck()])


@pytest.mark.parametrize("callback", [RepresentationCheck, TensorBoardReport, RetentionCheck])
def test_callbacks_that_need_edits_say_so(callback, language_model, tmp_path):
    trainer = quiet_trainer([callback()], tmp_path, num_sanity_val_steps=0, log_every_n_steps=1)
    rows = DataLoader(torch.arange(3, 19).reshape(2, 8), batch_size=1)
    with pytest.raises(TypeError, match="works with RomeModule during fit, not with Validating"):
        trainer.fit(Validating(language_model), rows, rows)


def test_a_config_is_made_of_several_files(language_model, tmp_path):
    language_model.model.save_pretrained(tmp_path / "model")
    language_model.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "facts.json").write_text(json.dumps(lighthouses(2)))
    base = {
        "model": FAST | {"pretrained": str(tmp_path / "model"), "v_num_grad_steps": 2, "seed": 5},
        "verification": {"least_probability": 0.0},
        "probe_evaluation": {"measure_perplexity": False},
        "retention_check": {"measure_perplexity": False},
        "run_report": {"figures": False},
        "trainer": {"default_root_dir": str(tmp_path / "base"), "accelerator": "cpu"},
    }
    mine = {
        "model": {"v_num_grad_steps": 3},
        "data": {"path": str(tmp_path / "facts.json")},
        "trainer": {"default_root_dir": str(tmp_path / "mine")},
    }
    for name, content in (("base", base), ("mine", mine)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    files = ["--config", str(tmp_path / "base.yaml"), "--config", str(tmp_path / "mine.yaml")]
    assert main(["edit", *files, "--model.v_lr", "0.2"]) == 0
    assert not (tmp_path / "base").exists()
    config = yaml.safe_load((tmp_path / "mine" / "config.yaml").read_text())
    model = config["model"]
    assert (model["v_num_grad_steps"], model["seed"], model["v_lr"]) == (3, 5, 0.2)
    assert config["verification"]["least_probability"] == 0.0
    records = json.loads((tmp_path / "mine" / "results.json").read_text())["records"]
    assert [record["num_steps"] for record in records] == [3, 3]


@pytest.mark.parametrize("name", ["fsdp", "fsdp_cpu_offload", "deepspeed_stage_2"])
def test_strategies_that_split_weights_are_refused_by_name(name, tmp_path, capsys):
    arguments = ["--data.path", "sample", "--trainer.default_root_dir", str(tmp_path / "run")]
    for verb in ("edit", "evaluate"):
        assert main([verb, *arguments, "--trainer.strategy", name, "--trainer.devices", "2"]) == 2
        assert f"strategy {name} splits the model's weights among devices" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_such_a_strategy_is_refused_as_an_object(strategy):
    with pytest.raises(OptionError, match=f"{strategy.__name__} splits"):
        check_strategy(strategy())
    check_strategy(Trainer(accelerator="cpu", strategy="ddp", logger=False, enable_checkpointing=False).strategy)


def test_a_trainer_of_ones_own_that_splits_weights_is_refused(language_model, tmp_path):
    trainer = quiet_trainer([], tmp_path, strategy=ModelParallelStrategy(), devices=2)
    module = RomeModule.from_language_model(language_model, **FAST)
    module.trainer = trainer
    with pytest.raises(OptionError, match="Use strategy 'ddp'"):
        module.setup("fit")
