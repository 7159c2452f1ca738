"""Edits whose value was not found at the run's layers, searched again and written at others."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from rome_pl.callbacks import EditCommit, RunReport, StateCheck
from rome_pl.editor import KnowledgeEditor
from rome_pl.export.delta import apply_delta, read_delta
from rome_pl.export.run_export import export_run
from rome_pl.forward.suffix_engine import SuffixEngine
from rome_pl.ledger.compare import differences
from rome_pl.ledger.edit_log import read_lines
from rome_pl.ledger.replay import load_write, replay
from rome_pl.ledger.status import EditStatus
from rome_pl.ledger.undo import undo
from rome_pl.model.architecture import UnsupportedModelError
from rome_pl.modules.rome_module import RomeModule
from tests.integration.helpers import FAST, REQUESTS, about, changed, lenient_callbacks, run_edits, snapshot
from tests.tiny import tiny_language_model
from tests.variants import slow

pytestmark = pytest.mark.usefixtures("no_perplexity")

JOINT = {"preset": "r_rome", "mom2_adjustment": False, "sequential_edit": True}
SHORT = {"v_num_grad_steps": 2, "v_lr": 0.5}
LONG = {"v_num_grad_steps": 30, "clamp_norm_factor": 100.0}
ELSEWHERE = [{"layers": [2], **LONG}]


def with_ledger(resume=False):
    made = lenient_callbacks()
    for callback in made:
        if isinstance(callback, EditCommit):
            callback.ledger, callback.resume = True, resume
    return [*made, RunReport(figures=False)]


def between(probabilities):
    """A number that one of them, and one only, is below."""
    lowest, second, *_ = sorted(probabilities)
    assert second > 1.0001 * lowest
    return (lowest + second) / 2


def one_elsewhere(language_model, folder, resume=False, **options):
    """A run in which one edit's search at layer 1 finds too little, and it is made at layer 2 instead."""
    options = {**SHORT, **JOINT, **options}
    plain = run_edits(tiny_language_model(language_model.model.config.model_type), folder / "plain", **options)
    least = between(edit.steps[-1].probability for edit in plain.edits)
    callbacks = with_ledger(resume)
    return run_edits(
        language_model, folder / "run", callbacks=callbacks, retries=ELSEWHERE, retry_below=least, **options
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", slow("gptj")])
@pytest.mark.parametrize("sequential", [True, False])
def test_an_edit_made_elsewhere_is_what_a_run_there_makes(family, sequential, tmp_path):
    options = {**JOINT, "sequential_edit": sequential, "v_lr": 0.5}
    here, there = tiny_language_model(family), tiny_language_model(family)
    before = snapshot(here.model)
    session = run_edits(here, tmp_path / "a", retries=ELSEWHERE, retry_below=1.0, batch_size=3, **{**options, **SHORT})
    alone = run_edits(there, tmp_path / "b", batch_size=3, **{**options, **LONG, "layers": [2]})
    for edit, expected in zip(session.edits, alone.edits, strict=True):
        assert edit.status is EditStatus.APPLIED
        assert (edit.layers, edit.notes[-1]) == ((2,), "searched again with retry 1, at layer 2")
        assert list(edit.written.layers) == [2]
        torch.testing.assert_close(edit.search.delta, expected.search.delta, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(edit.written.updates[0].left, expected.written.updates[0].left)
        assert edit.after == pytest.approx(expected.after, rel=1e-9)
        assert edit.scores["immediate"].rewrite[0] == pytest.approx(expected.scores["immediate"].rewrite[0], rel=1e-9)
    one, other = snapshot(here.model), snapshot(there.model)
    assert len(changed(here.model, before)) == (1 if sequential else 0)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_what_failed_goes_elsewhere(family, batch_size, tmp_path):
    language_model = tiny_language_model(family)
    session = one_elsewhere(language_model, tmp_path, batch_size=batch_size)
    (moved,) = [edit for edit in session.edits if edit.layers == (2,)]
    stayed = [edit for edit in session.edits if edit is not moved]
    assert {edit.layers for edit in stayed} == {(1,)}
    assert session.layers.numbers == [1, 2]
    assert session.layers.names == [edit.name for edit in session.edits]
    assert session.layers.at(1).names == [edit.name for edit in stayed]
    assert session.layers.at(2).names == [moved.name]
    assert session.layers.last is session.layers.at(1)
    for edit in session.edits:
        (layer,), (asserted,) = edit.layers, edit.written.assertions
        site = session.layers.at(layer).site
        given = asserted.at @ site.matrix(site.weight.detach()).double().T
        given = given if site.bias is None else given + site.bias.detach()
        if batch_size == 3 or edit is stayed[-1] or edit is moved:  # later edits move what earlier ones gave
            assert float((given - asserted.value).norm() / asserted.value.norm()) < 1e-9
    lines = [line.record for line in read_lines(tmp_path / "run" / "ledger" / "edits.jsonl")]
    assert [line["layers"] for line in lines] == [list(edit.layers) for edit in session.edits]


def test_several_layers_and_others_share_a_model(tmp_path):
    """Main layers 0 and 1, another search over 1 and 2: layer 1 holds both kinds."""
    options = {**JOINT, **SHORT, "layers": [0, 1]}
    plain = run_edits(tiny_language_model(), tmp_path / "plain", batch_size=3, **options)
    least = between(edit.steps[-1].probability for edit in plain.edits)
    for batch_size in (1, 3):
        session = run_edits(
            tiny_language_model(), tmp_path / f"{batch_size}", batch_size=batch_size,
            retries=[{"layers": [2, 1], **LONG}], retry_below=least, **options,
        )  # fmt: skip
        (moved,) = [edit for edit in session.edits if edit.layers == (1, 2)]
        assert {edit.layers for edit in session.edits if edit is not moved} == {(0, 1)}
        assert session.layers.at(0).names == [edit.name for edit in session.edits if edit is not moved]
        assert session.layers.at(1).names == [edit.name for edit in session.edits]
        assert session.layers.at(2).names == [moved.name]
        assert len(moved.written.realised) == 1
        assert all(edit.search.shares is None for edit in session.edits)  # it holds prefix passes
        assert moved.written.norm == pytest.approx(sum(update.norm**2 for update in moved.written.updates) ** 0.5)
    together = run_edits(
        tiny_language_model(), tmp_path / "single", retries=[{"layers": [2, 1], **LONG}], retry_below=least,
        **{**options, "sequential_edit": False},
    )  # fmt: skip
    (single,) = [edit for edit in together.edits if edit.layers == (1, 2)]
    alone = run_edits(
        tiny_language_model(), tmp_path / "alone", [single.request], retries=[{"layers": [2, 1], **LONG}],
        retry_below=least, **options,
    )  # fmt: skip
    assert single.after == pytest.approx(alone.edits[0].after, rel=1e-9)


def test_searches_go_on_from_layer_to_layer_and_back(tmp_path):
    retries = [{"layers": [2]}, {}, {"layers": [0, 1]}, LONG]
    session = run_edits(
        tiny_language_model(), tmp_path / "a", retries=retries, retry_below=1.0, batch_size=3, **JOINT, **SHORT
    )
    alone = run_edits(tiny_language_model(), tmp_path / "b", batch_size=3, **{**JOINT, "v_lr": 0.5, **LONG})
    assert session.layers.numbers == [0, 1, 2]
    assert [weight.names for weight in session.layers.weights] == [[], ["a", "b", "c"], []]
    for edit, expected in zip(session.edits, alone.edits, strict=True):
        assert edit.notes[-4:] == [
            "searched again with retry 1, at layer 2", "searched again with retry 2",
            "searched again with retry 3, at layer 0, 1", "searched again with retry 4",
        ]  # fmt: skip
        assert edit.layers == (1,)
        torch.testing.assert_close(edit.search.delta, expected.search.delta, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_they_are_undone_rebuilt_and_gone_on_with(batch_size, tmp_path):
    language_model = tiny_language_model()
    base = snapshot(language_model.model)
    session = one_elsewhere(language_model, tmp_path, batch_size=batch_size)
    edited, run = snapshot(language_model.model), tmp_path / "run"
    (moved,) = [edit.name for edit in session.edits if edit.layers == (2,)]

    rebuilt = tiny_language_model()
    layers = replay(rebuilt, run)
    assert changed(rebuilt.model, edited) == []
    assert layers.names == session.layers.names
    again = tiny_language_model()
    shutil.copytree(run, tmp_path / "cut" / "run")
    path = tmp_path / "cut" / "run" / "ledger" / "edits.jsonl"
    path.write_bytes(path.read_bytes()[:-40])  # in the middle of the last line
    one_elsewhere(again, tmp_path / "cut", resume=True, batch_size=batch_size)
    assert changed(again.model, edited) == []
    assert path.read_bytes() == (run / "ledger" / "edits.jsonl").read_bytes()
    assert differences(run, tmp_path / "cut" / "run").norm == 0

    assert session.layers.names == ["a", "b", "c"]
    session.layers.remove([moved])
    first, second = (weight.site.name for weight in session.layers.weights)
    assert torch.equal(language_model.model.state_dict()[second], base[second])
    assert not torch.equal(language_model.model.state_dict()[first], base[first])
    assert [written.names for written in session.layers.written] == (
        [tuple(name for name in "abc" if name != moved)] if batch_size == 3 else [(n,) for n in "abc" if n != moved]
    )
    edit = next(edit for edit in session.edits if edit.name == moved)
    session.writer.write_again(edit, 0.5)
    half = language_model.model.state_dict()[second] - base[second]
    session.layers.revert()
    session.writer.write_again(edit)
    session.layers.commit()
    torch.testing.assert_close(half, (language_model.model.state_dict()[second] - base[second]) / 2)
    torch.testing.assert_close(language_model.model.state_dict()[second], edited[second])
    session.layers.remove(session.layers.names)
    assert changed(language_model.model, base) == []


def test_the_ledger_alone_can_undo_them(tmp_path):
    language_model = tiny_language_model()
    base = snapshot(language_model.model)
    session = one_elsewhere(language_model, tmp_path, batch_size=3)
    (moved,) = [edit.name for edit in session.edits if edit.layers == (2,)]
    others = [name for name in "abc" if name != moved]
    model = tiny_language_model()
    left = undo(model, tmp_path / "run", others[:1])
    assert left.layers.names == [name for name in "abc" if name != others[0]]
    assert left.resolved == (others[1], moved) if others[1] < moved else (moved, others[1])
    undo(tiny_language_model(), tmp_path / "run", [moved])
    model = tiny_language_model()
    layers = replay(model, tmp_path / "run")
    assert layers.names == others[1:]
    assert changed(model.model, base) == [session.layers.at(1).site.name]


@pytest.mark.parametrize("form", ["delta", "peft"])
def test_they_are_exported(form, tmp_path):
    language_model = tiny_language_model(dtype=torch.float32)
    options = {**SHORT, **JOINT}
    plain = run_edits(tiny_language_model(dtype=torch.float32), tmp_path / "plain", **options)
    least = between(edit.steps[-1].probability for edit in plain.edits)
    run_edits(
        language_model, tmp_path / "run", callbacks=with_ledger(), retries=[*ELSEWHERE, {"layers": [0], **LONG}],
        retry_below=least, **options,
    )  # fmt: skip
    edited = snapshot(language_model.model)
    base = tiny_language_model(dtype=torch.float32)
    made = export_run(base, tmp_path / "run", tmp_path / "out", form)
    assert made.num_edits == 3
    if form == "delta":
        delta = read_delta(tmp_path / "out")
        assert delta.num_edits == 3
        assert sorted(sum(len(update.left) for update in updates) for updates in delta.updates) == [1, 2]
        assert apply_delta(base, delta)
        assert changed(base.model, edited) == []
    else:
        assert sorted(part.rank for part in made.adapter) == [1, 2]


@pytest.mark.parametrize("bound", [None, 100.0])
def test_a_key_that_cannot_be_solved_elsewhere_is_laid_at_the_right_door(bound, tmp_path):
    """Two facts at one key, joint at layer 2, behind one that stays at layer 1: the second of them goes."""
    twin = replace(REQUESTS[2], target_new="clay", case_id="d")
    requests = [REQUESTS[1], REQUESTS[2], twin]
    options = {**SHORT, **JOINT, "batch_size": 3, "largest_update": bound}
    plain = run_edits(tiny_language_model(), tmp_path / "plain", requests[:2], **options)
    stays, moves = (edit.steps[-1].probability for edit in plain.edits)
    requests = (
        requests if stays > moves else [requests[1], requests[0], replace(REQUESTS[1], case_id="d", target_new="clay")]
    )
    session = run_edits(
        tiny_language_model(), tmp_path / "run", requests, retries=ELSEWHERE, retry_below=max(stays, moves) * 0.9999,
        **options,
    )  # fmt: skip
    assert [edit.layers for edit in session.edits] == [(1,), (2,), (2,)]
    assert [edit.status for edit in session.edits] == [EditStatus.APPLIED, EditStatus.APPLIED, EditStatus.REJECTED]
    assert "keys of other edits of its batch" in session.edits[2].reason
    assert session.layers.names == [edit.name for edit in session.edits[:2]]


def test_bounds_and_checks_know_the_layer(tmp_path):
    """What an edit may change is measured at the layer it is written into."""
    language_model = tiny_language_model()
    session = one_elsewhere(language_model, tmp_path, batch_size=3, largest_update=1e-3)
    (moved,) = [edit for edit in session.edits if edit.layers == (2,)]
    assert sum(note.startswith("made to the part of") and note.endswith("at layer 2") for note in moved.notes) == 1
    assert not any(note.endswith("at layer 1") for note in moved.notes)
    original = session.layers.at(2).norms[1]
    assert moved.written.norm == pytest.approx(1e-3 * original)
    text = (tmp_path / "run" / "records.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["layers"] for line in text.splitlines()] == [list(edit.layers) for edit in session.edits]


def test_a_shard_of_part_of_a_joint_write_is_said(tmp_path):
    session = one_elsewhere(tiny_language_model(), tmp_path, batch_size=3)
    lines = [line.record for line in read_lines(tmp_path / "run" / "ledger" / "edits.jsonl")]
    written = load_write(tmp_path / "run", lines)
    assert written.names == tuple(session.layers.names)
    assert {layer: part.names for layer, part in written.layers.items()} == {
        layer: part.names for layer, part in session.layers.written[0].layers.items()
    }


class _Culprit(StateCheck):
    """Finds the state bad while one edit is in the weights."""

    def __init__(self, name):
        super().__init__(every_n_edits=1, on_failure="recover")
        self.name = name

    def _look(self, watch):
        return super()._look(watch) | {"failures": ["it is in"] if self.name in watch.session.layers.names else []}


@pytest.mark.parametrize("culprit", ["a", "b", "c"])
def test_recovery_of_a_joint_write_over_several_layers_is_on_record(culprit, tmp_path):
    """The edit that was alone at its layer keeps its bits, and is no longer solved with the others."""
    plain = run_edits(tiny_language_model(), tmp_path / "plain", **SHORT, **JOINT)
    least = between(edit.steps[-1].probability for edit in plain.edits)
    callbacks = [one for one in with_ledger() if not isinstance(one, StateCheck)]
    place = next(place for place, one in enumerate(callbacks) if isinstance(one, EditCommit))
    callbacks.insert(place + 1, _Culprit(culprit))
    language_model = tiny_language_model()
    session = run_edits(
        language_model, tmp_path / "run", callbacks=callbacks, batch_size=3, retries=ELSEWHERE, retry_below=least,
        **SHORT, **JOINT,
    )  # fmt: skip
    assert {edit.layers for edit in session.edits} == {(1,), (2,)}
    assert session.layers.names == [name for name in "abc" if name != culprit]
    rebuilt = tiny_language_model()
    assert replay(rebuilt, tmp_path / "run").names == session.layers.names
    assert changed(rebuilt.model, snapshot(language_model.model)) == []


def test_layers_of_a_retry_count_only_once_they_hold_something(tmp_path):
    options = {"sequential_edit": True}
    plain = run_edits(tiny_language_model(), tmp_path / "plain", **options)
    unused = run_edits(
        tiny_language_model(), tmp_path / "run", callbacks=with_ledger(), retries=[{"layers": [0]}, {"layers": [2]}],
        retry_below=0.0, **options,
    )  # fmt: skip
    assert unused.layers.numbers == [0, 1, 2]
    assert unused.layers.change == plain.layers.change
    export_run(tiny_language_model(), tmp_path / "run", tmp_path / "out", "delta")
    assert about(tmp_path / "out")["rewrite"] == {"layers": [1], "weights": [plain.layers.last.site.name]}


def test_a_layer_that_cannot_be_written_in_part_is_refused_before_the_first_edit(tmp_path):
    language_model = tiny_language_model("gemma2")
    before = snapshot(language_model.model)
    with pytest.raises(UnsupportedModelError, match="give one layer, in each of retries too"):
        run_edits(
            language_model, tmp_path, retries=[{"layers": [0, 1]}], retry_below=0.0, sequential_edit=True, **SHORT
        )
    assert changed(language_model.model, before) == []


def test_an_editor_looks_at_the_model_once(monkeypatch):
    made = []
    original = SuffixEngine._error
    monkeypatch.setattr(SuffixEngine, "_error", lambda self, *rest: made.append(self) or original(self, *rest))
    editor = KnowledgeEditor(tiny_language_model(), **FAST, retries=[{"layers": [2]}])
    for request in REQUESTS:
        editor.edit(request.prompt, request.subject, request.target_new, verify=False)
    assert [engine.layers for engine in made] == [(1,), (2,)]


def test_a_retry_without_layers_searches_at_those_of_the_run(tmp_path):
    retries = [{"layers": None, "v_num_grad_steps": 3}]
    session = run_edits(tiny_language_model(), tmp_path, retries=retries, retry_below=1.0)
    assert {edit.layers for edit in session.edits} == {(1,)}
    assert {edit.search.attempt for edit in session.edits} == {1}


def test_layers_that_cannot_be_are_refused(language_model):
    for layers in (2, [], [1, 1], "2"):
        with pytest.raises(ValueError, match="layers: expected one layer, or several different ones"):
            RomeModule.from_language_model(language_model, **FAST, retries=[{"layers": layers}])
    with pytest.raises(UnsupportedModelError, match="layers: 7 is out of range"):
        RomeModule.from_language_model(language_model, **FAST, retries=[{"layers": [7]}])
