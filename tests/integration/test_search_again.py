"""Retries: a search that finds too little, a value that cannot be written, an edit that a check takes back."""

import math
from dataclasses import replace

import pytest
import torch

from rome_pl.callbacks import EditCommit, RepresentationCheck, Verification
from rome_pl.data_modules.request_data import request_loader
from rome_pl.ledger.status import EditStatus
from rome_pl.modules.rome_module import RomeModule
from rome_pl.search.objective import ValueObjective
from tests.integration.helpers import (
    FACTS,
    FAST,
    REQUESTS,
    SURE,
    changed,
    lenient_callbacks,
    quiet_trainer,
    run_edits,
    snapshot,
    sure_model,
)
from tests.tiny import tiny_language_model
from tests.variants import slow

pytestmark = pytest.mark.usefixtures("no_perplexity")

OPTIONS = {**SURE, "v_num_grad_steps": 1, "retry_below": 0.0}
LONG = {"v_num_grad_steps": 30}


def demanding(least):
    callbacks = lenient_callbacks()
    for callback in callbacks:
        if isinstance(callback, Verification):
            callback.least_probability = least
    return callbacks


def test_a_search_that_finds_nothing_is_made_again_with_other_settings(tmp_path):
    options = {"v_num_grad_steps": 2, "retry_below": 0.5}
    plain = run_edits(tiny_language_model(), tmp_path / "a", **options)
    assert all(edit.steps[-1].probability < 0.5 for edit in plain.edits)
    retries = [{"v_num_grad_steps": 3}, {"v_num_grad_steps": 60, "clamp_norm_factor": 100.0}]
    again = run_edits(tiny_language_model(), tmp_path / "b", batch_size=2, retries=retries, v_lr=0.5, **options)
    once = run_edits(tiny_language_model(), tmp_path / "c", v_num_grad_steps=60, clamp_norm_factor=100.0, v_lr=0.5)
    for edit, expected in zip(again.edits, once.edits, strict=True):
        assert edit.notes[-2:] == ["searched again with retry 1", "searched again with retry 2"]
        torch.testing.assert_close(edit.search.delta, expected.search.delta, rtol=1e-8, atol=1e-11)
    enough = run_edits(tiny_language_model(), tmp_path / "d", retries=retries, **{**options, "retry_below": 0.0})
    assert not any("searched again" in note for edit in enough.edits for note in edit.notes)


def test_a_search_that_blew_up_is_made_again_too(tmp_path, monkeypatch):
    calls = []
    original = ValueObjective.__call__

    def overflows(self, deltas, members=None, contexts=None):
        losses = original(self, deltas, members, contexts)
        calls.append(len(calls))
        return replace(losses, nll=losses.nll * math.nan) if len(calls) == 2 else losses

    monkeypatch.setattr(ValueObjective, "__call__", overflows)
    retries = [{"v_num_grad_steps": 4}]
    (edit,) = run_edits(tiny_language_model(), tmp_path, REQUESTS[:1], retries=retries).edits
    assert edit.status is EditStatus.APPLIED
    assert (edit.failed, edit.reason) == (False, None)


def test_retries_with_unknown_settings_are_refused(language_model):
    with pytest.raises(ValueError, match="retries: v_steps is no option of the search"):
        RomeModule.from_language_model(language_model, **FAST, retries=[{"v_steps": 3}])
    with pytest.raises(ValueError, match="v_num_grad_steps: expected a number from 1"):
        RomeModule.from_language_model(language_model, **FAST, retries=[{"v_num_grad_steps": 0}])


@pytest.mark.parametrize("layers", [{}, slow({"layers": [0, 1]}), {"layers": [0, 1, 2]}])
@pytest.mark.parametrize(("sequential", "batch_size"), [(True, 1), (True, 4), (False, 1), (False, 4)])
def test_what_does_not_pass_verification_is_searched_again(sequential, batch_size, layers, tmp_path):
    options = {**OPTIONS, "sequential_edit": sequential}
    direct, model = sure_model(), sure_model()
    good = run_edits(direct, tmp_path / "good", FACTS, batch_size=batch_size, **{**options, **LONG, **layers})
    assert all(edit.after > 0.5 for edit in good.edits)
    session = run_edits(
        model, tmp_path / "run", FACTS, batch_size=batch_size, callbacks=demanding(0.5),
        retries=[{"v_num_grad_steps": 1}, {**LONG, **layers}], **options,
    )  # fmt: skip
    where = f", at layer {', '.join(map(str, layers['layers']))}" if layers else ""
    for edit, expected in zip(session.edits, good.edits, strict=True):
        assert edit.status is EditStatus.APPLIED
        first, second = [note for note in edit.notes if "searched again" in note]
        assert first.startswith("searched again with retry 1: after the write the target has probability")
        assert second.startswith(f"searched again with retry 2{where}: after the write")
        torch.testing.assert_close(edit.search.delta, expected.search.delta, rtol=1e-9, atol=1e-12)
        assert edit.after == pytest.approx(expected.after, rel=1e-9)
    one, other = snapshot(model.model), snapshot(direct.model)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-12)


def test_others_of_the_batch_keep_their_values(tmp_path):
    options = {**OPTIONS, "v_num_grad_steps": 2, "batch_size": 4}
    plain = run_edits(sure_model(), tmp_path / "plain", FACTS, **options)
    poor = [edit.after < 0.5 for edit in plain.edits]
    assert 0 < sum(poor) < 4
    session = run_edits(sure_model(), tmp_path / "run", FACTS, callbacks=demanding(0.5), retries=[LONG], **options)
    assert [edit.search.attempt for edit in session.edits] == poor
    assert all(edit.status is EditStatus.APPLIED for edit in session.edits)
    weight = session.layers.last
    matrix = weight.site.matrix(weight.site.weight.detach()).double()
    for edit, before, other in zip(session.edits, plain.edits, poor, strict=True):
        (asserted,) = edit.written.assertions
        given = asserted.at @ matrix.T
        assert float((given - asserted.value).norm() / asserted.value.norm()) < 1e-9
        assert torch.equal(asserted.value, before.written.assertions[0].value) != other


@pytest.mark.parametrize("sequential", [True, False])
def test_an_edit_without_retries_left_is_rejected(sequential, tmp_path):
    language_model = tiny_language_model()
    before = snapshot(language_model.model)
    session = run_edits(
        language_model, tmp_path, batch_size=3, callbacks=demanding(0.999), retries=[LONG, {"layers": [1]}],
        **{**OPTIONS, "sequential_edit": sequential},
    )  # fmt: skip
    for edit in session.edits:
        assert edit.status is EditStatus.REJECTED
        assert edit.reason.endswith("below 0.999; the weights are as before this edit")
        assert (edit.search.attempt, edit.layers) == (2, (1,))
    assert changed(language_model.model, before) == []
    assert session.layers.names == []


def test_a_key_that_a_batch_holds_already_may_be_written_elsewhere(tmp_path):
    twin = replace(REQUESTS[2], target_new="clay", case_id="d")
    options = {**OPTIONS, "batch_size": 4}
    requests = [*REQUESTS, twin]
    rejected = run_edits(tiny_language_model(), tmp_path / "without", requests, **options)
    assert [str(edit.status) for edit in rejected.edits] == ["applied"] * 3 + ["rejected"]
    session = run_edits(tiny_language_model(), tmp_path / "with", requests, retries=[{"layers": [1]}], **options)
    assert [str(edit.status) for edit in session.edits] == ["applied"] * 4
    assert [edit.layers for edit in session.edits] == [(2,), (2,), (2,), (1,)]
    assert "at layer 1: its key is all but a combination" in session.edits[3].notes[-1]


@pytest.mark.parametrize("sequential", [True, False])
def test_what_rounding_would_lose_is_searched_again(sequential, tmp_path):
    """An offset far below the weight's precision is what a short search finds, a longer one finds a larger one."""
    options = {**OPTIONS, "preset": "balanced", "sequential_edit": sequential, "batch_size": 4, "v_lr": 2e-5}
    options |= {"v_num_grad_steps": 2}
    model = tiny_language_model(dtype=torch.bfloat16)
    before = snapshot(model.model)
    lost = run_edits(model, tmp_path / "lost", FACTS, **options)
    assert [str(edit.status) for edit in lost.edits] == ["rejected"] * 4
    assert all("survives rounding to torch.bfloat16" in edit.reason for edit in lost.edits)
    assert changed(model.model, before) == []
    session = run_edits(model, tmp_path / "run", FACTS, retries=[{"v_num_grad_steps": 60}], **options)
    for edit in session.edits:
        assert edit.status is EditStatus.APPLIED
        assert edit.written.realised[0] >= 0.5
        # Beside larger changes that are solved jointly a small one may survive.
        assert edit.search.attempt == 1 or sequential
    again = [edit for edit in session.edits if edit.search.attempt == 1]
    assert again
    assert all(edit.notes[-1].startswith("searched again with retry 1: only") for edit in again)


@pytest.mark.parametrize("sequential", [True, False])
def test_a_second_search_that_blows_up_ends_the_edit(sequential, tmp_path, monkeypatch):
    original = ValueObjective.__call__
    searches = []

    def overflows(self, *arguments, **options):
        losses = original(self, *arguments, **options)
        return replace(losses, nll=losses.nll * math.nan) if searches else losses

    language_model = tiny_language_model()
    before = snapshot(language_model.model)
    monkeypatch.setattr(ValueObjective, "__call__", overflows)
    callbacks = demanding(0.999)
    place = next(index for index, callback in enumerate(callbacks) if isinstance(callback, Verification))

    class Watched(Verification):
        def on_train_batch_end(self, *arguments):
            searches.append(1)
            super().on_train_batch_end(*arguments)

    callbacks[place] = Watched(0.999)
    session = run_edits(
        language_model, tmp_path, REQUESTS[:1], callbacks=callbacks, retries=[LONG],
        **{**OPTIONS, "sequential_edit": sequential},
    )  # fmt: skip
    (edit,) = session.edits
    assert (edit.status, edit.failed) == (EditStatus.REJECTED, False)
    assert edit.reason.endswith("below 0.999; the weights are as before this edit")
    assert changed(language_model.model, before) == []
    assert not session.layers.pending


@pytest.mark.parametrize("layers", [{}, slow({"layers": [2]}), {"layers": [1, 2]}])
@pytest.mark.parametrize("why", ["too little is found", "it does not pass"])
def test_a_second_search_under_autocast_has_the_keys_of_the_model(why, layers, tmp_path):
    sessions = []
    for precision in ("bf16-mixed", "32-true"):
        options = {**FAST, "preset": "r_rome", "mom2_adjustment": False, "sequential_edit": True, "v_num_grad_steps": 2}
        options |= {"retries": [layers], "retry_below": 1.0 if why == "too little is found" else 0.0}
        module = RomeModule.from_language_model(tiny_language_model(dtype=torch.float32), **options)
        callbacks = demanding(0.999 if why == "it does not pass" else 0.0)
        quiet_trainer(callbacks, tmp_path, precision=precision).fit(module, request_loader(REQUESTS[:1]))
        sessions.append(module.session)
    (edit,), (plain,) = (session.edits for session in sessions)
    assert edit.search.attempt == plain.search.attempt == 1
    assert torch.equal(edit.search.keys.mean, plain.search.keys.mean)
    assert torch.equal(edit.search.keys.output_bare, plain.search.keys.output_bare)
    assert not torch.equal(edit.search.delta, plain.search.delta)


def test_an_edit_searched_again_stays_within_the_largest_update_beside_others(tmp_path):
    """The share is that of the solve that is made, with the others of the batch in it."""
    about_one = [
        FACTS[0],
        replace(FACTS[0], prompt=f"We set out for {FACTS[0].subject}", subject_span=None, case_id="again"),
    ]
    options = {**OPTIONS, "v_num_grad_steps": 2, "batch_size": 2}
    plain = run_edits(sure_model(), tmp_path / "plain", about_one, **options)
    lowest, highest = sorted(edit.after for edit in plain.edits)
    assert lowest < 0.99 * highest
    for bound in (0.02, 0.05):
        session = run_edits(
            sure_model(), tmp_path / f"{bound}", about_one, callbacks=_objects_to(about_one[1]), retries=[LONG],
            largest_update=bound, **options,
        )  # fmt: skip
        assert [edit.search.attempt for edit in session.edits] == [0, 1]
        original = session.layers.last.norms[1]
        for edit in session.edits:
            assert edit.written.norm <= bound * original * (1 + 1e-9)
            assert sum(note.startswith("made to the part of") for note in edit.notes) <= 1


def _objects_to(request):
    """Callbacks whose verification takes the first write of one edit back."""

    class Objects(Verification):
        def _disturbs(self, edit, session):
            return "not that" if edit.name == str(request.case_id) and edit.search.attempt == 0 else None

    return [Objects(least_probability=0.0) if isinstance(one, Verification) else one for one in lenient_callbacks()]


def test_an_edit_that_was_written_does_not_go_for_one_that_comes_to_its_key(tmp_path):
    """At layer 1 two facts of one key cannot both be; the one that came there later has to look on."""
    twin = replace(REQUESTS[2], target_new="clay", case_id="d")
    options = {**OPTIONS, "layers": [2], "batch_size": 2}
    retries = [{"layers": [1]}, {"layers": [0]}]
    # The twin goes to layer 1 at once, and its elder follows when verification takes it back.
    session = run_edits(
        tiny_language_model(), tmp_path, [REQUESTS[2], twin], callbacks=_objects_to(REQUESTS[2]), retries=retries,
        **options,
    )  # fmt: skip
    assert [str(edit.status) for edit in session.edits] == ["applied", "applied"]
    assert [edit.layers for edit in session.edits] == [(0,), (1,)]


@pytest.mark.parametrize("sequential", [True, False])
def test_what_was_not_written_holds_no_prefix_pass(sequential, tmp_path):
    twin = replace(REQUESTS[2], target_new="clay", case_id="d")
    callbacks = demanding(0.999)
    check = next(one for one in callbacks if isinstance(one, RepresentationCheck))
    check.least_specificity, check.largest_norm_ratio = 0, 10
    skip = check._check
    check._check = lambda session, edit, before: (
        edit.decide(EditStatus.SKIPPED, "no") if edit.name == "a" else skip(session, edit, before)
    )
    options = {**OPTIONS, "layers": [0, 1], "sequential_edit": sequential, "batch_size": 4}
    session = run_edits(tiny_language_model(), tmp_path, [*REQUESTS, twin], callbacks=callbacks, **options)
    assert {str(edit.status) for edit in session.edits} == {"skipped", "rejected"}
    assert all(edit.search.shares is None for edit in session.edits)


def test_a_resumed_run_says_the_same_of_what_was_rejected(tmp_path):
    def run(folder, resume):
        callbacks = demanding(0.9999)
        for callback in callbacks:
            if isinstance(callback, EditCommit):
                callback.ledger, callback.resume = True, resume
        options = {**OPTIONS, "v_num_grad_steps": 2}
        return run_edits(sure_model(), folder, FACTS, callbacks, retries=[{"v_num_grad_steps": 3}], **options)

    whole = run(tmp_path / "whole", False)
    assert "rejected" in {str(edit.status) for edit in whole.edits}
    again = run(tmp_path / "whole", True)
    assert [edit.record() for edit in again.edits] == [edit.record() for edit in whole.edits]
