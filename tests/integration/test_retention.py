"""What earlier edits are worth while a sequential stream goes on, measured in Lightning's validation loop."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from rome_pl.callbacks import (
    EditCommit,
    ProbeEvaluation,
    RankOneWriter,
    RepresentationCheck,
    RetentionCheck,
    RunReport,
    probe_evaluation,
)
from rome_pl.cli.app import main
from rome_pl.data_modules import RequestDataModule
from rome_pl.metrics import Answer, probe_scores, summarise
from rome_pl.modules.rome_module import RomeModule
from rome_pl.utils.hashing import hash_seed
from tests.integration.helpers import FAST, changed, quiet_trainer, snapshot
from tests.tiny import tiny_language_model

SUBJECTS = ("Korrin", "Miss Vane", "The old harbour", "Tamsel", "Doctor Marrow", "Rim", "Ostrava Field")
RECORDS = [
    {
        "case_id": f"r{index}", "prompt": f"{subject} is found in", "subject": subject,
        "target_new": ("Oslo", "Rome")[index % 2], "target_true": "Lima", "neighbours": ["Tarn lies in"],
        "locality": [{"prompt": "The tide comes", "answer": "in"}],
    }
    for index, subject in enumerate(SUBJECTS)
]  # fmt: skip
TEXT = "The tide comes in twice a day, and twice a day it goes out again."


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(RECORDS), encoding="utf-8")
    return str(path)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def run(records, folder, sample, *, sequential=True, batch_size=1, callbacks=None, trainer=None, **options):
    """A run in a Trainer of one's own."""
    module = RomeModule.from_language_model(
        tiny_language_model(), **{**FAST, "sequential_edit": sequential, "v_num_grad_steps": 12, **options}
    )
    chosen = [
        RepresentationCheck(), RankOneWriter(), ProbeEvaluation(measure_perplexity=False), EditCommit(),
        *(callbacks or [RetentionCheck(measure_perplexity=False)]),
    ]  # fmt: skip
    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0} | (trainer or {})
    data = RequestDataModule(records, retention_sample=sample, batch_size=batch_size)
    quiet_trainer(chosen, folder, **settings).fit(module, datamodule=data)
    return module.session


def test_points_are_where_they_were_asked_for(records, tmp_path):
    session = run(records, tmp_path, 100)
    assert [point.edits for point in session.measured.retention] == [2, 4, 6]
    for point in session.measured.retention:
        assert list(point.scores) == [f"r{index}" for index in range(point.edits)]
        assert point.perplexity is None
        assert point.weight_change > 0
    changes = [point.weight_change for point in session.measured.retention]
    assert len(set(changes)) == 3


def said(scores):
    """Whether greedy decoding gives the new answer, which has one entry."""
    (answer,) = scores.answers["rewrite"]
    return answer.accuracy == 1.0


def with_answer(scores, good):
    return replace(scores, answers={**scores.answers, "rewrite": (Answer(-1.0, float(good), (3,)),)})


def test_a_point_is_what_the_weights_of_that_moment_give(records, tmp_path):
    session = run(records, tmp_path, 100)
    short = tmp_path / "short.json"
    short.write_text(json.dumps(RECORDS[:4]), encoding="utf-8")
    after_four = run(str(short), tmp_path / "short", 0)
    measured = probe_scores(after_four.language_model, after_four.requests)
    assert list(session.measured.retention[1].scores.values()) == measured
    assert session.measured.retention[1].weight_change == pytest.approx(after_four.layers.change, rel=1e-12)


def test_measuring_changes_nothing(records, tmp_path):
    with_it, without = run(records, tmp_path / "1", 100), run(records, tmp_path / "2", 0)
    assert without.measured.retention == []
    before = snapshot(without.language_model.model)
    assert changed(with_it.language_model.model, before) == []
    assert [edit.scores["final"] for edit in with_it.edits] == [edit.scores["final"] for edit in without.edits]
    state = torch.get_rng_state()
    run(records, tmp_path / "3", 100)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_sample_is_seeded_and_gives_way_to_later_edits(records, tmp_path):
    session, again = run(records, tmp_path / "1", 3), run(records, tmp_path / "2", 3)
    samples = [list(point.scores) for point in session.measured.retention]
    assert samples == [list(point.scores) for point in again.measured.retention]
    assert [len(sample) for sample in samples] == [2, 3, 3]
    for edits, sample in zip((2, 4, 6), samples, strict=True):
        begun = [f"r{index}" for index in range(edits)]
        chosen = sorted(begun, key=lambda name: hash_seed("retention", name))[:3]
        assert sample == [name for name in begun if name in chosen]
        assert set(sample) - set(samples[-1]) <= set(sample)
    gone = set(samples[1]) - set(samples[2])
    assert gone.isdisjoint(samples[2])


def test_batches_count_as_the_edits_they_hold(records, tmp_path):
    session = run(
        records, tmp_path, 100, batch_size=2, preset="r_rome", mom2_adjustment=False, trainer={"val_check_interval": 1}
    )
    assert [point.edits for point in session.measured.retention] == [2, 4, 6, 7]


def test_single_mode_has_nothing_to_retain(records, tmp_path):
    session = run(records, tmp_path, 100, sequential=False, batch_size=2)
    assert session.measured.retention == []
    assert len(session.edits) == 7


def test_nothing_is_measured_before_the_first_edit(records, tmp_path):
    """Lightning's own sanity check runs before the stream."""
    session = run(records, tmp_path, 100, trainer={"num_sanity_val_steps": -1})
    assert [point.edits for point in session.measured.retention] == [2, 4, 6]


def test_a_trainer_with_lightnings_own_defaults_measures_at_the_end(records, tmp_path):
    defaults = {"val_check_interval": None, "check_val_every_n_epoch": 1, "num_sanity_val_steps": None}
    session = run(records, tmp_path, 100, trainer=defaults)
    assert [point.edits for point in session.measured.retention] == [7]
    final = {edit.name: edit.scores["final"] for edit in session.edits}
    assert session.measured.retention[0].scores == final


def test_results_have_ages_and_the_edits_that_were_lost(records, tmp_path, text):
    logger = CSVLogger(tmp_path / "logs", name="", version="")
    callbacks = [RetentionCheck(text=text), RunReport()]
    session = run(
        records, tmp_path / "run", 100, callbacks=callbacks, trainer={"logger": logger, "log_every_n_steps": 1}
    )
    content = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert [point["edits"] for point in content["retention"]] == [2, 4, 6]
    taken = {edit.name for edit in session.edits if said(edit.scores["immediate"])}
    for found, point in zip(content["retention"], session.measured.retention, strict=True):
        assert [one["age"] for one in found["held"]] == list(range(point.edits, 0, -1))  # the last one's is 1
        assert [one["case_id"] for one in found["held"]] == list(point.scores)
        held = {name: said(scores) for name, scores in point.scores.items()}
        assert {one["case_id"]: one["held"] for one in found["held"]} == held
        assert found["lost"] == [name for name in point.scores if name in taken and not held[name]]
        expected = summarise(point.scores, session.measured.base_scores)
        assert {name: entry["value"] for name, entry in found["scores"].items()} == pytest.approx(
            {name: entry["value"] for name, entry in expected.items()}
        )
        assert found["scores"]["locality"]["n"] == point.edits
        assert found["perplexity"] == point.perplexity > 1
        assert found["weight_change"] == point.weight_change
    logger.save()
    lines = (tmp_path / "logs" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    names, rows = lines[0].split(","), [line.split(",") for line in lines[1:]]
    curve = [row for row in rows if row[names.index("retention/ES")]]
    assert [int(row[names.index("step")]) for row in curve] == [2, 4, 6]
    for row, found in zip(curve, content["retention"], strict=True):
        assert float(row[names.index("retention/ES")]) == pytest.approx(found["scores"]["ES"]["value"])
        assert float(row[names.index("retention/perplexity")]) == pytest.approx(found["perplexity"])


def test_edits_that_are_lost_are_listed_by_when(records, tmp_path, monkeypatch):
    original = RomeModule.validation_step

    def forgets(self, batch, batch_idx):
        """From the fourth edit on none is said any more, though the new answer stays the likelier one."""
        good = len(self.session.edits) < 4
        measured = original(self, batch, batch_idx)
        return {name: with_answer(replace(found, rewrite=(-1.0, -9.0)), good) for name, found in measured.items()}

    def takes(session, edits):
        """All but the second edit are said right after it."""
        return [with_answer(found, edits[0].name != "r1") for found in measure(session, edits)]

    measure = probe_evaluation.measure_probes
    monkeypatch.setattr(RomeModule, "validation_step", forgets)
    monkeypatch.setattr(probe_evaluation, "measure_probes", takes)
    session = run(records, tmp_path, 100, callbacks=[RetentionCheck(measure_perplexity=False), RunReport()])
    taken = [edit.name for edit in session.edits if said(edit.scores["immediate"])]
    assert taken == ["r0", "r2", "r3", "r4", "r5", "r6"]
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    lost = {point["edits"]: point["lost"] for point in content["retention"]}
    # An edit that never took cannot be lost.
    assert lost == {edits: [n for n in taken if n in {f"r{i}" for i in range(edits)}] if edits > 2 else []
                    for edits in (2, 4, 6)}  # fmt: skip
    assert all(one["held"] == (point["edits"] == 2) for point in content["retention"] for one in point["held"])


def test_the_command_line_measures_every_n_edits(records, text, tmp_path):
    language_model = tiny_language_model("llama", torch.float32)
    language_model.model.save_pretrained(tmp_path / "model")
    language_model.tokenizer.save_pretrained(tmp_path / "model")
    options = {f"model.{name}": value for name, value in FAST.items()} | {
        "model.pretrained": tmp_path / "model", "model.sequential_edit": True, "data.path": records,
        "data.retention_sample": 2, "trainer.val_check_interval": 3, "trainer.accelerator": "cpu",
        "trainer.default_root_dir": tmp_path / "run", "verification.least_probability": 0,
        "probe_evaluation.held_out_text": text, "retention_check.text": text,
    }  # fmt: skip
    command = ["edit", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    assert main(command) == 0
    content = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert [point["edits"] for point in content["retention"]] == [3, 6]
    assert [len(point["held"]) for point in content["retention"]] == [2, 2]
    assert all(point["perplexity"] > 1 for point in content["retention"])
    with pytest.raises(ValueError, match="retention_sample"):
        RequestDataModule(records, retention_sample=-1)
