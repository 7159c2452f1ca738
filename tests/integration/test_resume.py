"""Runs that were killed and go on: weights and ledger become bit for bit those of a run that was not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rome_pl.callbacks import EditCommit, StateCheck, Verification, default_callbacks
from rome_pl.cli.app import main
from rome_pl.editing.batch_writer import BatchWriter
from rome_pl.editing.retries import Retries
from rome_pl.ledger.edit_log import Ledger, LedgerError, read_lines
from rome_pl.requests.edit_request import EditRequest
from tests.integration.helpers import FACTS, FAST, OTHERWISE, SURE, lighthouses, run_edits, snapshot, sure_model
from tests.tiny import tiny_language_model
from tests.variants import slow

pytestmark = pytest.mark.usefixtures("no_perplexity")

RECORDS = lighthouses(6)
REQUESTS = [EditRequest(**record, case_id=index) for index, record in enumerate(RECORDS)]
JOINT = {"preset": "r_rome", "mom2_adjustment": False}


def callbacks_for(resume=False, **state_check):
    made = default_callbacks()
    for place, callback in enumerate(made):
        if hasattr(callback, "least_probability"):
            callback.least_probability = 0.0
        if isinstance(callback, EditCommit):
            callback.ledger, callback.resume = True, resume
        if isinstance(callback, StateCheck) and state_check:
            made[place] = StateCheck(**state_check)
    return made


def run(folder, resume=False, requests=REQUESTS, batch_size=1, state_check=None, model=None, without=(), **options):
    language_model = model or tiny_language_model("llama")
    callbacks = [one for one in callbacks_for(resume, **(state_check or {})) if not isinstance(one, without)]
    session = run_edits(language_model, folder, requests, callbacks, batch_size, **{"sequential_edit": True, **options})
    return session, snapshot(language_model.model)


def ledger_of(folder):
    return folder / "ledger" / "edits.jsonl"


def assert_same_ledger(folder, expected):
    assert ledger_of(folder).read_bytes() == ledger_of(expected).read_bytes()
    shards = {path.name: load_file(path) for path in (expected / "ledger" / "shards").iterdir()}
    for name, tensors in shards.items():
        found = load_file(folder / "ledger" / "shards" / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items()), name


def killed_copy(source, folder, size):
    """What a run leaves that is killed when its ledger holds so many bytes."""
    shutil.copytree(source, folder)
    content = ledger_of(folder).read_bytes()[:size]
    ledger_of(folder).write_bytes(content)
    return folder


MODES = {
    "sequential": {},
    "joint": {"batch_size": 2, **JOINT},
    "single": {"sequential_edit": False},
    "single, in batches": {"sequential_edit": False, "batch_size": 4},
    "several layers": {"layers": [0, 1, 2], **JOINT},
    "several layers, joint": {"layers": [0, 2], "batch_size": 2, **JOINT},
    "several layers, single": {"layers": [0, 1], "sequential_edit": False, "batch_size": 4, **JOINT},
}


@pytest.mark.parametrize("mode", MODES)
def test_wherever_it_is_killed_a_run_ends_as_if_it_had_not_been(mode, tmp_path):
    whole, weights = run(tmp_path / "whole", **MODES[mode])
    size = ledger_of(tmp_path / "whole").stat().st_size
    chance = random.Random(mode)
    for place, cut in enumerate([0, 1, size - 1, size, *(chance.randrange(size) for _ in range(2))]):
        folder = killed_copy(tmp_path / "whole", tmp_path / f"killed{place}", cut)
        resumed, again = run(folder, resume=True, **MODES[mode])
        assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
        assert_same_ledger(folder, tmp_path / "whole")
        assert [edit.status for edit in resumed.edits] == [edit.status for edit in whole.edits]
        assert [edit.scores for edit in resumed.edits] == [edit.scores for edit in whole.edits]
        for edit, expected in zip(resumed.edits, whole.edits, strict=True):
            assert edit.record() == expected.record()
        kept = ledger_of(tmp_path / "whole").read_bytes()[:cut].count(b"\n")
        taken = sum(edit.resumed for edit in resumed.edits)
        assert taken == kept - kept % MODES[mode].get("batch_size", 1) or kept == 6 == taken


def test_nothing_is_optimised_twice(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    searched = []
    original = Retries.first
    monkeypatch.setattr(
        Retries,
        "first",
        lambda self, objective, edits: searched.extend(e.name for e in edits) or original(self, objective, edits),
    )
    lines = ledger_of(tmp_path / "whole").read_bytes().splitlines(keepends=True)
    folder = killed_copy(tmp_path / "whole", tmp_path / "killed", sum(map(len, lines[:4])) + 10)
    run(folder, resume=True)
    assert searched == ["4", "5"]


@pytest.mark.parametrize("on_failure", ["rollback", slow("stop")])
def test_what_was_rolled_back_is_rolled_back_again(on_failure, tmp_path):
    check = {"every_n_edits": 2, "on_failure": on_failure}
    probe, _ = run(tmp_path / "probe", state_check={"every_n_edits": 2})
    check["largest_change"] = probe.measured.state_checks[0]["change"]  # the first check passes, the second does not
    whole, weights = run(tmp_path / "whole", state_check=check)
    assert any(edit.status == "rolled_back" for edit in whole.edits)
    content = ledger_of(tmp_path / "whole").read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for place, cut in enumerate([*ends, *(end - 5 for end in ends)]):
        folder = killed_copy(tmp_path / "whole", tmp_path / f"killed{place}", cut)
        resumed, again = run(folder, resume=True, state_check=check)
        assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
        assert ledger_of(folder).read_bytes() == content
        assert [edit.status for edit in resumed.edits] == [edit.status for edit in whole.edits]


@pytest.mark.parametrize(("batch_size", "without"), [slow(1, ()), (2, ()), slow(1, (Verification,))])
def test_edits_after_which_others_were_lost_are_dropped_again(batch_size, without, tmp_path):
    check = {"every_n_edits": 4, "on_failure": "recover", "least_retained": 1.0, "least_canary_agreement": 0.0}
    check["largest_change"] = 1e9  # lost edits alone decide
    stream = [FACTS[3], FACTS[0], OTHERWISE[3], FACTS[1], OTHERWISE[0], FACTS[2]]

    def go(folder, resume=False):
        options = {"requests": stream, "batch_size": batch_size, "state_check": check, "without": without, **SURE}
        return run(folder, resume, model=sure_model(), **options)

    whole, weights = go(tmp_path / "whole")
    assert [str(edit.status) for edit in whole.edits] == [
        "applied", "applied", "rolled_back", "applied", "rolled_back", "applied",
    ]  # fmt: skip
    assert all("are retained" in edit.reason for edit in whole.edits if edit.status == "rolled_back")
    content = ledger_of(tmp_path / "whole").read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) >= 10  # six edits, and twice one that was dropped and one or more that were written anew
    # Between edits, before and after what was amended, and in its midst.
    for place, cut in enumerate([*ends[1::2], ends[4], ends[5] - 5]):
        folder = killed_copy(tmp_path / "whole", tmp_path / f"killed{place}", cut)
        resumed, again = go(folder, resume=True)
        assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
        assert_same_ledger(folder, tmp_path / "whole")
        assert resumed.measured.state_checks == whole.measured.state_checks
        assert [edit.record() for edit in resumed.edits] == [edit.record() for edit in whole.edits]


def test_a_run_that_decides_otherwise_is_refused(tmp_path):
    run(tmp_path / "whole", state_check={"every_n_edits": 2, "largest_change": 1e-9, "on_failure": "rollback"})
    before = ledger_of(tmp_path / "whole").read_bytes()
    with pytest.raises(LedgerError, match=r"the ledger is 0 \(rolled_back\), but the next of the stream is 2"):
        run(tmp_path / "whole", resume=True, state_check={"every_n_edits": 3, "largest_change": 1e-9,
                                                          "on_failure": "rollback"})  # fmt: skip
    assert ledger_of(tmp_path / "whole").read_bytes() == before


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([REQUESTS[0], REQUESTS[2], REQUESTS[1]], "same records, order"),
        ([EditRequest(**(RECORDS[0] | {"target_new": "Bern"}), case_id=0)], "another target_new .'Oslo', now 'Bern'."),
        ([EditRequest(**(RECORDS[0] | {"paraphrases": []}), case_id=0)], "another paraphrases"),
    ],
)
def test_another_stream_is_refused_with_the_record(requests, message, tmp_path):
    run(tmp_path, requests=REQUESTS[:3])
    before = ledger_of(tmp_path).read_bytes()
    with pytest.raises(LedgerError, match=message):
        run(tmp_path, resume=True, requests=requests)
    assert ledger_of(tmp_path).read_bytes() == before


def test_more_records_go_on_where_the_others_ended(tmp_path):
    run(tmp_path / "three", requests=REQUESTS[:3])
    _, weights = run(tmp_path / "three", resume=True)
    _, expected = run(tmp_path / "whole")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert_same_ledger(tmp_path / "three", tmp_path / "whole")


def test_two_runs_do_not_write_one_ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    with pytest.raises(LedgerError, match="another run writes"):
        run(tmp_path)
    ledger.close()
    session, _ = run(tmp_path)
    run(tmp_path, resume=True)  # the first has let go of it
    assert len(session.edits) == 6


def test_a_run_that_fails_lets_go_of_its_ledger_and_can_be_resumed(tmp_path, monkeypatch):
    calls = []

    def fail(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the lights went out")
        return original(self, *arguments)

    original = BatchWriter.write
    monkeypatch.setattr(BatchWriter, "write", fail)
    with pytest.raises(RuntimeError, match="lights"):
        run(tmp_path / "failed")
    monkeypatch.undo()
    monkeypatch.setattr("rome_pl.callbacks.probe_evaluation.perplexity", lambda *_: 1.0)
    _, weights = run(tmp_path / "failed", resume=True)
    _, expected = run(tmp_path / "whole")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert_same_ledger(tmp_path / "failed", tmp_path / "whole")


# ---- from the command line


@pytest.fixture
def command(tmp_path):
    language_model = tiny_language_model("llama", torch.float32)
    language_model.model.save_pretrained(tmp_path / "model")
    language_model.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "records.json").write_text(json.dumps(RECORDS), encoding="utf-8")

    def made(folder, *more, **options):
        values = (
            {f"model.{name}": value for name, value in FAST.items()}
            | {
                "model.pretrained": tmp_path / "model", "model.sequential_edit": True,
                "data.path": tmp_path / "records.json", "trainer.default_root_dir": folder,
                "trainer.accelerator": "cpu", "verification.least_probability": 0,
                "probe_evaluation.measure_perplexity": False, "run_report.figures": False,
            }
            | {name.replace("__", "."): value for name, value in options.items()}
        )  # fmt: skip
        return ["edit", *(str(part) for name, value in values.items() for part in (f"--{name}", value)), *more]

    return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROME_PL_CACHE", str(tmp_path / "cache"))


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def killed(source, folder, lines):
    content = ledger_of(source).read_bytes().splitlines(keepends=True)
    killed_copy(source, folder, sum(map(len, content[:lines])) + 7)
    for name in ("results.json", "records.jsonl", "table.md", "table.csv"):
        (folder / name).unlink()
    return folder


def test_auto_begins_a_run_goes_on_with_it_and_leaves_a_finished_one_alone(command, tmp_path, caplog):
    folder = tmp_path / "whole"
    assert main(command(folder, "--resume", "auto", "--save_model", str(tmp_path / "saved"))) == 0
    assert read(folder)["n_resumed"] == 0
    stopped = killed(folder, tmp_path / "stopped", 3)
    assert main(command(stopped, "--resume", "auto", "--save_model", str(tmp_path / "saved again"))) == 0
    assert_same_ledger(stopped, folder)
    assert read(stopped)["n_resumed"] == 3
    for name in ("base", "immediate", "final"):
        assert read(stopped)[name] == read(folder)[name]
    weights, again = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "saved again"))
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in stopped.rglob("*") if path.is_file()}
    assert main(command(stopped, "--resume", "auto")) == 0
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in stopped.rglob("*") if path.is_file()}
    assert after == before
    assert "finished" in caplog.text


def test_a_path_is_gone_on_with_in_its_own_folder(command, tmp_path):
    assert main(command(tmp_path / "whole")) == 0
    stopped = killed(tmp_path / "whole", tmp_path / "stopped", 2)
    assert main(command(tmp_path / "elsewhere", "--resume", str(stopped))) == 0
    assert not (tmp_path / "elsewhere").exists()
    assert_same_ledger(stopped, tmp_path / "whole")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume", "{empty}"], "holds no run"),
        (["--resume", "auto", "--overwrite"], "give one of the two"),
        (["--resume", "auto", "--trainer.devices", "2"], "on one device only"),
        (["--resume", "auto", "--model.v_lr", "0.3"], "- model.v_lr: 0.1\n  + model.v_lr: 0.3"),
        (["--resume", "auto", "--data.batch_size", "2"], "+ data.batch_size: 2"),
        (["--resume", "auto", "--verification.least_probability", "0.5"], "verification.least_probability"),
    ],
)
def test_what_cannot_be_resumed_is_refused_and_stays(more, message, command, tmp_path, capsys):
    assert main(command(tmp_path / "whole")) == 0
    stopped = killed(tmp_path / "whole", tmp_path / "stopped", 2)
    (tmp_path / "empty").mkdir()
    before = ledger_of(stopped).read_bytes()
    capsys.readouterr()
    assert main(command(stopped, *(part.format(empty=tmp_path / "empty") for part in more))) == 2
    assert message in capsys.readouterr().err
    assert ledger_of(stopped).read_bytes() == before


def test_other_settings_can_be_forced(command, tmp_path):
    assert main(command(tmp_path / "whole")) == 0
    stopped = killed(tmp_path / "whole", tmp_path / "stopped", 2)
    assert main(command(stopped, "--resume", "auto", "--force", "--model.v_num_grad_steps", "4")) == 0
    steps = [json.loads(line)["num_steps"] for line in ledger_of(stopped).read_text(encoding="utf-8").splitlines()]
    assert steps[2:] == [4] * 4
    assert read(stopped)["n_resumed"] == 2


def test_a_run_of_another_model_is_refused(command, tmp_path, capsys):
    assert main(command(tmp_path / "whole")) == 0
    stopped = killed(tmp_path / "whole", tmp_path / "stopped", 2)
    other = tiny_language_model("llama", torch.float32, seed=3)
    other.model.save_pretrained(tmp_path / "model")
    assert main(command(stopped, "--resume", "auto")) == 2
    assert "another model" in capsys.readouterr().err


def test_a_finished_run_goes_on_with_more_records_and_no_others(command, tmp_path, capsys):
    def records(*some):
        (tmp_path / "records.json").write_text(json.dumps(some), encoding="utf-8")

    records(*RECORDS[:3])
    assert main(command(tmp_path / "whole")) == 0
    records(*RECORDS[:2])
    assert main(command(tmp_path / "run")) == 0
    records(RECORDS[0], RECORDS[1] | {"target_new": "Rome"})
    before = ledger_of(tmp_path / "run").read_bytes()
    assert main(command(tmp_path / "run", "--resume", "auto")) == 2
    assert "record 1 had another target_new" in capsys.readouterr().err
    assert ledger_of(tmp_path / "run").read_bytes() == before
    records(*RECORDS[:3])
    assert main(command(tmp_path / "run", "--resume", "auto")) == 0
    assert_same_ledger(tmp_path / "run", tmp_path / "whole")
    assert read(tmp_path / "run")["n_applied"] == 3
    records(*RECORDS[:3], {"prompt": "There is no subject in", "subject": "Korrin", "target_new": "Oslo"})
    assert main(command(tmp_path / "run", "--resume", "auto")) == 3


def test_a_model_may_lie_elsewhere_when_a_run_is_resumed(command, tmp_path):
    assert main(command(tmp_path / "whole")) == 0
    stopped = killed(tmp_path / "whole", tmp_path / "stopped", 2)
    (tmp_path / "model").rename(tmp_path / "moved")
    assert main(command(stopped, "--resume", "auto", **{"model.pretrained": tmp_path / "moved"})) == 0
    assert_same_ledger(stopped, tmp_path / "whole")
    unknown = killed(tmp_path / "whole", tmp_path / "unknown", 2)
    (unknown / "manifest.json").unlink()
    assert main(command(unknown, "--resume", "auto", **{"model.pretrained": tmp_path / "moved"})) == 2


def test_reports_and_measurements_may_change(command, tmp_path):
    assert main(command(tmp_path / "whole")) == 0
    stopped = killed(tmp_path / "whole", tmp_path / "stopped", 2)
    assert (
        main(command(stopped, "--resume", "auto", "--run_report.figures", "true", "--trainer.log_every_n_steps", "5"))
        == 0
    )
    assert (stopped / "report.html").exists()


def test_a_damaged_line_in_the_middle_is_named(command, tmp_path, capsys):
    assert main(command(tmp_path / "whole")) == 0
    stopped = killed(tmp_path / "whole", tmp_path / "stopped", 4)
    lines = ledger_of(stopped).read_bytes().split(b"\n")
    lines[1] = lines[1][:30]
    ledger_of(stopped).write_bytes(b"\n".join(lines))
    capsys.readouterr()
    assert main(command(stopped, "--resume", "auto")) == 2
    assert "line 2: damaged" in capsys.readouterr().err


def test_a_missing_shard_is_named(command, tmp_path, capsys):
    assert main(command(tmp_path / "whole")) == 0
    stopped = killed(tmp_path / "whole", tmp_path / "stopped", 4)
    (stopped / "ledger" / "shards" / "000001.safetensors").unlink()
    capsys.readouterr()
    assert main(command(stopped, "--resume", "auto")) == 2
    assert "000001.safetensors: missing or damaged" in capsys.readouterr().err


def test_a_folder_that_another_run_writes_to_is_not_replaced(command, tmp_path, capsys):
    assert main(command(tmp_path / "whole")) == 0
    ledger = Ledger(tmp_path / "whole" / "ledger", resume=True)
    assert main(command(tmp_path / "whole", "--overwrite")) == 2
    assert "another run is writing" in capsys.readouterr().err
    ledger.close()
    assert main(command(tmp_path / "whole", "--overwrite")) == 0


ONE_BY_ONE = {}
"""One rewrite layer, its edits one after the other."""

LIFELONG = {
    "model__preset": "lifelong", "model__layers": [0, 1, 2], "data__batch_size": 5,
    "state_check__every_n_edits": 10, "state_check__least_retained": 0.5,
    "model__retries": '[{"layers": [1]}]', "model__retry_below": 0.00184,
}  # fmt: skip
"""What ``configs/stream.yaml`` does: several rewrite layers, a second moment, edits solved jointly, some elsewhere."""


@pytest.mark.slow
@pytest.mark.parametrize(("options", "kills"), [(ONE_BY_ONE, 20), (LIFELONG, 10)], ids=["one by one", "lifelong"])
def test_killed_at_random_moments_every_run_ends_with_the_same_bits(options, kills, command, tmp_path):
    records = lighthouses(60)
    (tmp_path / "records.json").write_text(json.dumps(records), encoding="utf-8")

    def begin(folder):
        arguments = command(folder, "--resume", "auto", "--save_model", f"{folder} model", **options)
        code = "import sys; from rome_pl.cli.app import main; sys.exit(main(sys.argv[1:]))"
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def wait_for(lines, process, folder):
        while not ledger_of(folder).exists() or ledger_of(folder).read_bytes().count(b"\n") < lines:
            time.sleep(0.005)
            assert process.poll() is None
        return time.monotonic()

    whole = tmp_path / "whole"
    process = begin(whole)
    span = -wait_for(1, process, whole) + wait_for(60, process, whole)
    assert process.wait() == 0
    layers = {tuple(line.record["layers"]) for line in read_lines(ledger_of(whole)) if "layers" in line.record}
    assert len(layers) == (2 if "model__retries" in options else 1)
    expected = load_file(tmp_path / "whole model" / "model.safetensors")
    chance, inside = random.Random(0), 0
    for place in range(kills):
        folder = tmp_path / f"killed{place}"
        process = begin(folder)
        # By lines first: how long an edit takes changes with what else the machine does.
        wait_for(chance.randint(1, 60), process, folder)
        time.sleep(chance.uniform(0, span / 12))
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = ledger_of(folder).read_bytes().count(b"\n")
        inside += 0 < done < 60
        assert begin(folder).wait() == 0
        found = load_file(tmp_path / f"killed{place} model" / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert_same_ledger(folder, whole)
    assert inside >= kills / 2
