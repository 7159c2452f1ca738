import json
import shutil

import pytest
import torch

from rome_pl.callbacks import (
    EditCommit,
    ProbeEvaluation,
    RankOneWriter,
    RepresentationCheck,
    RunReport,
    StateCheck,
    Verification,
)
from rome_pl.editing.session_watch import SessionWatch
from rome_pl.ledger.replay import LedgerError, read_edits, replay
from rome_pl.requests.edit_request import EditRequest
from tests.integration.helpers import REQUESTS, run_edits
from tests.tiny import tiny_language_model

WEIGHT = "model.layers.1.mlp.down_proj.weight"
# One key that both shapes and asserts, as a joint write needs it, and no statistics.
JOINT = {"preset": "r_rome", "mom2_adjustment": False}
MORE = [
    *REQUESTS,
    EditRequest(prompt="Tarn lies in", subject="Tarn", target_new="the", target_true="a", case_id=7),
    EditRequest(prompt="Ostrava\u2028Field is", subject="Ostrava\u2028Field", target_new="old\u0085er",
    case_id="ü\u2029"),
]  # fmt: skip


def callbacks(least=0.0, **state):
    return [
        RepresentationCheck(),
        RankOneWriter(),
        Verification(least, greedy=False),
        ProbeEvaluation(measure_perplexity=False),
        EditCommit(ledger=True),
        *([StateCheck(**state)] if state else []),
        RunReport(),
    ]


def run(folder, model=None, requests=MORE, batch_size=1, least=0.0, state=None, **options):
    options = {"sequential_edit": True} | (JOINT if batch_size > 1 else {}) | options
    return run_edits(
        model or tiny_language_model(), folder, requests, callbacks(least, **state or {}), batch_size, **options
    )


def weight_of(language_model):
    return language_model.model.state_dict()[WEIGHT]


def check_replay(folder, session, dtype=torch.float64):
    fresh = tiny_language_model(dtype=dtype)
    original = weight_of(fresh).clone()
    weight = replay(fresh, folder)
    assert torch.equal(weight_of(fresh), weight_of(session.language_model))
    assert weight.names == session.layers.names
    assert weight.change == session.layers.change
    with weight.unedited():
        assert torch.equal(weight_of(fresh), original)
    base = tiny_language_model(dtype=dtype).model.state_dict()
    now = fresh.model.state_dict()
    assert {name for name in base if not torch.equal(base[name], now[name])} <= {WEIGHT}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_model_and_a_ledger_give_the_weights_of_the_run(batch_size, dtype, tmp_path):
    session = run(tmp_path, tiny_language_model(dtype=dtype), batch_size=batch_size)
    assert len(session.layers.names) == 5
    check_replay(tmp_path, session, dtype)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_rejected_edits_are_not_replayed(batch_size, tmp_path):
    probabilities = sorted(edit.after for edit in run(tmp_path / "all", batch_size=batch_size).edits)
    session = run(tmp_path / "run", batch_size=batch_size, least=(probabilities[1] + probabilities[2]) / 2)
    statuses = {str(edit.status) for edit in session.edits}
    assert statuses == {"applied", "rejected"}
    check_replay(tmp_path / "run", session)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_edits_rolled_back_are_not_replayed(batch_size, tmp_path, monkeypatch):
    original, calls = SessionWatch.look, []

    def second_fails(self):
        calls.append(len(self.session.edits))
        found = original(self)
        return found | {"failures": [*found["failures"], *(["injected"] if len(calls) == 2 else [])]}

    monkeypatch.setattr(SessionWatch, "look", second_fails)
    state = {"every_n_edits": 2, "on_failure": "rollback", "largest_change": 1e9, "least_canary_agreement": 0.0}
    session = run(tmp_path, batch_size=batch_size, state=state)
    assert calls == [2, 4, 5]
    assert [str(edit.status) for edit in session.edits] == [
        "applied", "applied", "rolled_back", "rolled_back", "applied",
    ]  # fmt: skip
    check_replay(tmp_path, session)
    edits = read_edits(tmp_path)
    assert [edit["status"] for edit in edits] == [str(edit.status) for edit in session.edits]
    assert "injected" in edits[2]["reason"]
    assert edits[2]["request"]["target_new"] == "rye"  # the first line's, which the later one does not repeat


def test_a_run_without_one_applied_edit_gives_the_unedited_model(tmp_path):
    session = run(tmp_path, least=0.9999)
    assert session.layers.names == []
    check_replay(tmp_path, session)


def test_edits_are_read_with_what_was_asked_for(tmp_path):
    run(tmp_path)
    edits = read_edits(tmp_path)
    assert [edit["case_id"] for edit in edits] == [request.case_id for request in MORE]
    assert edits[4]["request"]["subject"] == "Ostrava\u2028Field"
    assert all(edit["status"] == "applied" for edit in edits)


def test_an_edit_cannot_be_taken_out_of_a_replayed_weight(tmp_path):
    run(tmp_path, requests=REQUESTS)
    weight = replay(tiny_language_model(), tmp_path)
    with pytest.raises(LedgerError, match="second moment"):
        weight.remove(["a"])


def test_a_ledger_of_another_model_is_refused(tmp_path):
    run(tmp_path, requests=REQUESTS[:1])
    other = tiny_language_model(seed=1)
    before = weight_of(other).clone()
    with pytest.raises(LedgerError, match=r"a ledger of another model \(tiny llama, .*\) than the one loaded") as error:
        replay(other, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert torch.equal(weight_of(other), before)


def test_a_ledger_of_single_edits_is_refused(tmp_path):
    run(tmp_path, requests=REQUESTS[:1], sequential_edit=False)
    with pytest.raises(LedgerError, match="single edits"):
        replay(tiny_language_model(), tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four edits, solved two by two."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, requests=MORE[:4], batch_size=2)
    return folder


def edit_lines(folder, change):
    path = folder / "ledger" / "edits.jsonl"
    lines = change(path.read_text(encoding="utf-8").split("\n"))
    path.write_text("\n".join(lines), encoding="utf-8")


def without(name):
    def change(lines):
        record = json.loads(lines[1])
        del record[name]
        return [lines[0], json.dumps(record), *lines[2:]]

    return change


def remove_manifest_model(folder):
    content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del content["model"]
    (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")


DAMAGES = {
    "no folder": (shutil.rmtree, r"manifest\.json: missing or damaged"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json: missing or damaged"),
    "manifest of something else": (remove_manifest_model, r"manifest\.json: missing or damaged"),
    "manifest that is no mapping": (
        lambda folder: (folder / "manifest.json").write_text("[]"),
        r"manifest\.json: missing or damaged",
    ),
    "no ledger": (lambda folder: shutil.rmtree(folder / "ledger"), r"holds no ledger \(ledger/edits\.jsonl\)"),
    "half a line": (
        lambda folder: edit_lines(folder, lambda lines: [lines[0], lines[1][:40], *lines[2:]]),
        r"edits\.jsonl, line 2: damaged",
    ),
    "no mapping": (
        lambda folder: edit_lines(folder, lambda lines: [*lines[:2], "5", *lines[2:]]),
        r"edits\.jsonl, line 3: damaged",
    ),
    "no name": (lambda folder: edit_lines(folder, without("case_id")), r"edits\.jsonl, line 2: damaged"),
    "no status": (lambda folder: edit_lines(folder, without("status")), r"edits\.jsonl, line 2: damaged"),
    "not UTF-8": (
        lambda folder: (path := folder / "ledger" / "edits.jsonl").write_bytes(b"\xff\xfe\n" + path.read_bytes()),
        r"edits\.jsonl, line 1: damaged .*utf-8",
    ),
    "no shard": (
        lambda folder: (folder / "ledger" / "shards" / "000001.safetensors").unlink(),
        r"000001\.safetensors: missing or damaged .*; edit b cannot be rebuilt",
    ),
    "half a shard": (
        lambda folder: (folder / "ledger" / "shards" / "000002.safetensors").write_bytes(b"abc"),
        r"000002\.safetensors: missing or damaged .*; edit c cannot be rebuilt",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_missing_or_damaged_is_named(name, whole, tmp_path):
    damage, message = DAMAGES[name]
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    damage(folder)
    with pytest.raises(LedgerError, match=message):
        replay(tiny_language_model(), folder)


@pytest.mark.parametrize("end", ["half", "one byte", "garbage"])
def test_what_a_killed_run_has_not_written_whole_is_left_out_and_said(end, whole, tmp_path, caplog):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    (folder / "ledger" / "end.json").unlink()  # a killed run does not write it
    path = folder / "ledger" / "edits.jsonl"
    complete = read_edits(folder)
    lines = path.read_bytes().splitlines(keepends=True)
    together = json.loads(lines[-1]).get("together", [1, 1])[1]
    kept = lines[: len(lines) - together]
    cut = {"half": len(lines[-1]) // 2, "one byte": 1}
    path.write_bytes(b"".join(lines) + b"\x00" * 50 if end == "garbage" else b"".join(lines)[: -cut[end]])
    expected = complete if end == "garbage" else complete[: len(kept)]
    assert read_edits(folder) == expected
    assert "are no complete record" in caplog.text
    assert replay(tiny_language_model(), folder).names == [
        str(edit["case_id"]) for edit in expected if edit["status"] == "applied"
    ]


@pytest.mark.parametrize("lost", ["half a line", "one byte", "the last lines", "all lines"])
def test_a_run_that_came_to_its_end_and_misses_it_is_refused(lost, whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    path = folder / "ledger" / "edits.jsonl"
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    left = {"half a line": content[:-200], "one byte": content[:-1], "the last lines": b"".join(lines[:2])}
    path.write_bytes(left.get(lost, b""))
    with pytest.raises(LedgerError, match=r"edits\.jsonl: holds [02] complete lines, but was closed with 4"):
        replay(tiny_language_model(), folder)


def test_a_damaged_ledger_leaves_the_model_as_it_was(whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    (folder / "ledger" / "shards" / "000003.safetensors").unlink()
    language_model = tiny_language_model()
    before = weight_of(language_model).clone()
    with pytest.raises(LedgerError):
        replay(language_model, folder)
    assert torch.equal(weight_of(language_model), before)
