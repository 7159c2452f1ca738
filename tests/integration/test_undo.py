"""Edits taken out of a finished run by its ledger."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rome_pl.callbacks import EditCommit, default_callbacks
from rome_pl.cli.app import main
from rome_pl.forward.hooks import capture_columns
from rome_pl.ledger.compare import differences
from rome_pl.ledger.edit_log import LedgerError
from rome_pl.ledger.influence import blame
from rome_pl.ledger.replay import read_edits, replay
from rome_pl.ledger.undo import undo
from rome_pl.metrics import probe_scores
from rome_pl.requests.edit_request import EditRequest
from tests.disk import no_room_on_disk
from tests.integration.helpers import edited_by_command, lighthouses, run_edits, snapshot
from tests.tiny import tiny_language_model

pytestmark = pytest.mark.usefixtures("no_perplexity")

RECORDS = lighthouses(8)
REQUESTS = [EditRequest(**record, case_id=index) for index, record in enumerate(RECORDS)]
JOINT = {"preset": "r_rome", "mom2_adjustment": False}
SITE = "model.layers.1.mlp.down_proj.weight"
STREAMS = {
    "one by one": {},
    "r_rome": JOINT,
    "joint": {"batch_size": 3, **JOINT},
    "several layers": {"layers": [0, 1], "batch_size": 3, **JOINT},
}


def run(folder, requests=REQUESTS, batch_size=1, dtype=torch.float64, **options):
    callbacks = default_callbacks()
    for callback in callbacks:
        if hasattr(callback, "least_probability"):
            callback.least_probability = 0.0
        if isinstance(callback, EditCommit):
            callback.ledger = True
    language_model = tiny_language_model("llama", dtype)
    # The manifest that RunReport writes in a run of the command line.
    from rome_pl.callbacks import RunReport

    session = run_edits(
        language_model, folder, requests, [*callbacks, RunReport(figures=False)], batch_size,
        **{"sequential_edit": True, **options},
    )  # fmt: skip
    return session, language_model


@pytest.fixture(scope="module", params=STREAMS)
def stream(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rome_pl.callbacks.probe_evaluation.perplexity", lambda *_: 1.0)
        folder = tmp_path_factory.mktemp("stream") / "run"
        return folder, run(folder, **STREAMS[request.param])[0]


def copied(stream, tmp_path):
    shutil.copytree(stream[0], tmp_path / "run")
    return tmp_path / "run"


def written_by_hand(weight, writes, without):
    """The closed form for the others, in order, on the original weight."""
    for written in writes:
        kept = [row for row, name in enumerate(written.names) if name not in without]
        if kept:
            assertion = written.assertion.rows(kept)
            residual = assertion.value - assertion.at @ weight.T
            inner = assertion.shape @ assertion.at.T
            weight = (
                weight + torch.linalg.solve(inner, residual.clone()).T @ assertion.shape
                if len(kept) > 1
                else (weight + residual.T @ assertion.shape / inner)
            )
            for row in range(len(kept)):  # right after its own write every value holds
                error = weight @ assertion.at[row] - assertion.value[row]
                assert float(error.norm()) <= 1e-5 * float(assertion.value[row].norm())
    return weight


@pytest.mark.parametrize("seed", range(8))
def test_what_remains_is_what_a_run_would_have_solved_without_the_others(seed, stream, tmp_path):
    folder, session = copied(stream, tmp_path), stream[1]
    chance = random.Random(seed)
    names = [str(name) for name in chance.sample(range(8), chance.randint(1, 7))]
    language_model = tiny_language_model("llama")
    original = snapshot(language_model.model)
    undone = undo(language_model, folder, names)
    for edited in session.layers.weights:
        expected = written_by_hand(original[edited.site.name], edited.written, names)
        found = language_model.model.state_dict()[edited.site.name]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert undone.layers.names == [str(name) for name in range(8) if str(name) not in names]
    # Whoever reads the ledger from now on gets the same bits, without any statistics.
    again = tiny_language_model("llama")
    replay(again, folder)
    assert torch.equal(again.model.state_dict()[SITE], language_model.model.state_dict()[SITE])
    statuses = {str(edit["case_id"]): edit["status"] for edit in read_edits(folder)}
    assert {name for name, status in statuses.items() if status == "undone"} == set(names)


def test_undone_facts_get_the_answer_of_the_original_model_back(tmp_path):
    options = {"v_num_grad_steps": 20, "v_lr": 0.5}
    edited = run(tmp_path / "run", **options)[1]
    language_model = tiny_language_model("llama")
    undo(language_model, tmp_path / "run", [str(name) for name in range(1, 8)])
    alone = run(tmp_path / "alone", REQUESTS[:1], **options)[1]
    for request in REQUESTS:
        (now,), (expected,), (before,) = (probe_scores(model, [request]) for model in (language_model, alone, edited))
        assert now.rewrite == pytest.approx(expected.rewrite, rel=1e-6)
        assert now.rewrite != pytest.approx(before.rewrite, rel=1e-3)


def test_with_all_undone_the_weights_are_the_original_bit_for_bit(stream, tmp_path):
    folder = copied(stream, tmp_path)
    language_model = tiny_language_model("llama")
    before = snapshot(language_model.model)
    undo(language_model, folder, [str(name) for name in range(8)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in language_model.model.state_dict().items())
    again = tiny_language_model("llama")
    assert replay(again, folder).names == []
    assert torch.equal(again.model.state_dict()[SITE], before[SITE])


def test_later_edits_about_the_subject_of_one_that_is_undone_are_told(tmp_path):
    first, second, third = REQUESTS[:3]
    later = EditRequest(prompt=f"{first.subject} is", subject=first.subject, target_new="rye", case_id="later")
    run(tmp_path / "run", requests=[second, first, third, later])
    found = undo(tiny_language_model("llama"), tmp_path / "run", [str(second.case_id)])
    assert found.holding == ()
    found = undo(tiny_language_model("llama"), tmp_path / "run", [str(first.case_id), str(third.case_id)])
    assert found.holding == ("later",)
    assert undo(tiny_language_model("llama"), tmp_path / "run", ["later"]).holding == ()


def test_undoing_twice_equals_undoing_at_once(stream, tmp_path):
    at_once, twice = tiny_language_model("llama"), tiny_language_model("llama")
    undo(at_once, copied(stream, tmp_path / "a"), ["1", "4", "6"])
    folder = copied(stream, tmp_path / "b")
    undo(tiny_language_model("llama"), folder, ["4"])
    undo(twice, folder, ["6", "1"])
    torch.testing.assert_close(at_once.model.state_dict()[SITE], twice.model.state_dict()[SITE], rtol=1e-10, atol=1e-12)


def test_a_half_written_undo_is_none(stream, tmp_path):
    folder = copied(stream, tmp_path)
    path = folder / "ledger" / "edits.jsonl"
    before, end = path.read_bytes(), (path.parent / "end.json").read_bytes()
    undo(tiny_language_model("llama"), folder, ["2"])
    after = path.read_bytes()
    assert after.startswith(before)
    expected = tiny_language_model("llama")
    path.write_bytes(before)
    with pytest.raises(LedgerError, match="lines are missing"):  # no undo that was killed: its lines were lost later
        replay(expected, folder)
    (path.parent / "end.json").write_bytes(end)  # written last of all
    replay(expected, folder)
    for cut in (len(before) + 1, len(after) - 1, (len(before) + len(after)) // 2):
        path.write_bytes(after[:cut])
        language_model = tiny_language_model("llama")
        assert len(replay(language_model, folder).names) == 8
        assert torch.equal(language_model.model.state_dict()[SITE], expected.model.state_dict()[SITE])


@pytest.mark.parametrize(
    ("names", "message"), [(["99"], "the ledger has no such record"), (["1", "3"], "edit 3 is not in the weight")]
)
def test_what_is_not_in_the_weight_cannot_be_undone(names, message, stream, tmp_path):
    folder = copied(stream, tmp_path)
    undo(tiny_language_model("llama"), folder, ["3"])
    before = (folder / "ledger" / "edits.jsonl").read_bytes()
    with pytest.raises(LedgerError, match=message):
        undo(tiny_language_model("llama"), folder, names)
    assert (folder / "ledger" / "edits.jsonl").read_bytes() == before


# ---- from the command line


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setenv("ROME_PL_CACHE", str(tmp_path / "cache"))
    return edited_by_command(tmp_path, "llama")


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_show_and_undo_work_on_a_run_of_the_command_line(work, capsys):
    capsys.readouterr()
    assert main(["show", "--ledger", str(work / "run")]) == 0
    assert "4 edits: 4 applied" in capsys.readouterr().out
    assert main(["show", "--ledger", str(work / "run" / "ledger"), "--cases", "2"]) == 0
    text = capsys.readouterr().out
    assert "Korrin2" in text
    assert "000002.safetensors" in text
    assert main(["undo", "--ledger", str(work / "run"), "--cases", "1,2", "--save_model", str(work / "two")]) == 0
    assert "2 edits undone, 2 remain, 1 of them solved anew" in capsys.readouterr().out
    assert main(["show", "--ledger", str(work / "run")]) == 0
    assert "2 applied, 2 undone" in capsys.readouterr().out
    original, two, edited = (weights(work / name) for name in ("model", "two", "edited"))
    assert not torch.equal(two[SITE], original[SITE])
    assert not torch.equal(two[SITE], edited[SITE])
    assert main(["undo", "--ledger", str(work / "run"), "--cases", "all", "--save_model", str(work / "none")]) == 0
    assert all(torch.equal(tensor, original[name]) for name, tensor in weights(work / "none").items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["undo", "--ledger", "{work}/run", "--cases", "7"], "the ledger has no record 7"),
        (["undo", "--ledger", "{work}/nowhere", "--cases", "1"], "holds no ledger"),
        (["undo", "--ledger", "{work}/run", "--cases", "1", "--save_model", "{work}/model"], "is not empty"),
        (["show", "--ledger", "{work}/run", "--cases", "x"], "the ledger has no record x"),
    ],
)
def test_mistakes_are_said_without_a_traceback(arguments, message, work, capsys):
    before = (work / "run" / "ledger" / "edits.jsonl").read_bytes()
    capsys.readouterr()
    assert main([part.format(work=work) for part in arguments]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert (work / "run" / "ledger" / "edits.jsonl").read_bytes() == before


def test_an_undo_whose_model_cannot_be_saved_is_none(work, capsys):
    before = (work / "run" / "ledger" / "edits.jsonl").read_bytes()
    capsys.readouterr()
    undo = ["undo", "--ledger", str(work / "run"), "--cases", "1", "--save_model", str(work / "two")]
    with no_room_on_disk():
        assert main(undo) == 2
    assert "two" in capsys.readouterr().err
    assert not (work / "two").exists()
    assert (work / "run" / "ledger" / "edits.jsonl").read_bytes() == before
    assert main(undo) == 0  # with room again
    assert (work / "two" / "model.safetensors").exists()


def test_a_run_with_undone_edits_is_not_gone_on_with(work, capsys):
    assert main(["undo", "--ledger", str(work / "run"), "--cases", "1"]) == 0
    config = work / "run" / "config.yaml"
    (work / "run" / "results.json").unlink()
    (work / "records.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    capsys.readouterr()
    assert main(["edit", "--config", str(config), "--resume", "auto"]) == 2
    assert "edits were undone" in capsys.readouterr().err


def test_edits_of_single_mode_cannot_be_undone(tmp_path):
    run(tmp_path / "run", sequential_edit=False)
    with pytest.raises(LedgerError, match="single edits"):
        undo(tiny_language_model("llama"), tmp_path / "run", ["1"])


def base_of_runs(monkeypatch):
    """The runs of this file began with a model that is on no disk."""
    monkeypatch.setattr("rome_pl.cli.commands.base_model", lambda *_: tiny_language_model("llama"))


def test_some_edits_are_picked_and_the_ledger_stays_as_it_is(stream, tmp_path, monkeypatch, capsys):
    folder, undone = copied(stream, tmp_path / "a"), copied(stream, tmp_path / "b")
    base_of_runs(monkeypatch)
    before = (folder / "ledger" / "edits.jsonl").read_bytes()
    assert main(["pick", "--ledger", str(folder), "--cases", "2,5", "--save_model", str(tmp_path / "some")]) == 0
    assert "2 edits" in capsys.readouterr().out
    assert (folder / "ledger" / "edits.jsonl").read_bytes() == before
    expected = tiny_language_model("llama")
    undo(expected, undone, ["0", "1", "3", "4", "6", "7"])
    found = load_file(tmp_path / "some" / "model.safetensors")
    assert torch.equal(found[SITE], expected.model.state_dict()[SITE])
    assert main(["pick", "--ledger", str(folder), "--cases", "2", "--save_model", str(tmp_path / "some")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["pick", "--ledger", str(undone), "--cases", "3", "--save_model", str(tmp_path / "none")]) == 2
    assert "edit 3 is not in the weights (undone)" in capsys.readouterr().err


def test_blame_finds_the_edit_behind_a_prompt(stream, tmp_path, monkeypatch, capsys):
    folder = stream[0]
    language_model = tiny_language_model("llama")
    layers = replay(language_model, folder)
    found = blame(language_model, layers, "The lighthouse of Korrin3 stands in")
    assert len(found) == len(layers) * 8 * len({one.column for one in found})
    # By hand: the change of the projection's output at each token is the sum of what the edits do there.
    row = language_model.encoder.prompt("The lighthouse of Korrin3 stands in")
    site = layers.last.site
    with capture_columns(site.projection, 1, slice(None)) as seen, torch.no_grad():
        language_model.model(input_ids=torch.tensor([row.ids]), use_cache=False)
    keys, norms = seen["input"][0], {}
    for written in layers.last.written:
        for name in written.names:
            update = written.part(name).update
            for column, key in enumerate(keys):
                norms[name, column] = (
                    float(update.right[0] @ key),
                    float((update.right[0] @ key * update.left).norm()),
                )
    usual = (seen["output"][0] - sum(keys @ w.update.right.T @ w.update.left for w in layers.last.written)).norm(dim=1)
    for one in found:
        if one.layer == site.layer:
            share, norm = norms[one.name, one.column]
            assert (one.share, one.size) == pytest.approx((share, norm / float(usual[one.column])), rel=1e-9, abs=1e-12)
    assert [one.size for one in found] == sorted((one.size for one in found), reverse=True)
    base_of_runs(monkeypatch)
    assert (
        main(["blame", "--ledger", str(folder), "--prompt", "The lighthouse of Korrin3 stands in", "--top", "3"]) == 0
    )
    assert "Korrin" in capsys.readouterr().out


def test_diff_names_what_differs_and_measures_it(stream, tmp_path, capsys):
    folder, other = copied(stream, tmp_path / "a"), copied(stream, tmp_path / "b")
    assert differences(folder, other).names == ()
    assert differences(folder, other).norm == pytest.approx(0, abs=1e-5)
    undo(tiny_language_model("llama"), other, ["1", "6"])
    found = differences(folder, other)
    assert found.names == ("1", "6")
    models = [tiny_language_model("llama") for _ in range(3)]
    for model, run_folder in zip(models, (folder, other), strict=False):
        replay(model, run_folder)
    one, two, base = (model.model.state_dict() for model in models)
    apart = sum(float((one[name] - two[name]).square().sum()) for name in base)
    assert found.norm == pytest.approx(apart**0.5, rel=1e-6)
    changes = sum(float((one[name] - base[name]).square().sum()) for name in base)
    assert found.norms[0] == pytest.approx(changes**0.5, rel=1e-6)
    assert main(["diff", "--ledger", str(folder), "--other", str(other)]) == 0
    said = capsys.readouterr().out
    assert "2 of 8 records differ" in said
    assert "undone" in said
