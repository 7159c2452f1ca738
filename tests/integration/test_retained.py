"""The state check's bound on what earlier edits of a stream are still worth."""

from dataclasses import replace

import pytest
import torch

from rome_pl.callbacks import EditCommit, StateCheck, Verification, default_callbacks
from rome_pl.data_modules.request_data import request_loader
from rome_pl.editing import retention
from rome_pl.ledger.edit_log import read_lines
from rome_pl.modules.rome_module import RomeModule
from rome_pl.utils.hashing import hash_seed
from tests.integration.helpers import (
    FACTS,
    FAST,
    OTHERWISE,
    SURE,
    lenient_callbacks,
    quiet_trainer,
    run_edits,
    snapshot,
    sure_model,
)
from tests.tiny import tiny_language_model

pytestmark = pytest.mark.usefixtures("no_perplexity")


def edited(folder, requests, batch_size=1, verification=True, language_model=None, **state_check):
    callbacks = []
    for callback in default_callbacks():
        if isinstance(callback, Verification):
            callback.least_probability = 0.0
            callbacks += [callback] * verification
        elif isinstance(callback, StateCheck):
            callbacks.append(StateCheck(**{"least_canary_agreement": 0.0, "largest_change": 1e9} | state_check))
        else:
            callbacks.append(callback)
        if isinstance(callback, EditCommit):
            callback.ledger = True
    session = run_edits(language_model or sure_model(), folder, requests, callbacks, batch_size, **SURE)
    session.ledger.close()
    return session


def plainly(language_model, request):
    """A target's probability after the bare prompt, by a forward of its own: the geometric mean over its tokens."""
    prompt = language_model.tokenizer(request.prompt)["input_ids"]
    whole = language_model.tokenizer(f"{request.prompt} {request.target_new}")["input_ids"]
    assert whole[: len(prompt)] == prompt
    with torch.no_grad():
        log_probs = language_model.model(input_ids=torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
    target = torch.tensor(whole[len(prompt) :])
    return float(log_probs[len(prompt) - 1 :].gather(1, target.unsqueeze(1)).mean().exp())


def test_the_share_of_edits_that_keep_half_of_their_probability_is_found(tmp_path):
    language_model = sure_model()
    stream = [*FACTS[:3], OTHERWISE[0]]
    session = edited(tmp_path, stream, language_model=language_model, every_n_edits=3, least_retained=0.8)
    now = [plainly(language_model, request) for request in stream]
    kept = [one >= 0.5 * edit.after for one, edit in zip(now, session.edits, strict=True)]
    assert not kept[0]
    assert sum(kept) >= 2
    assert session.edits[0].after > 0.5
    assert [check["edits"] for check in session.measured.state_checks] == [3, 4]
    assert session.measured.state_checks[1]["retained"] == sum(kept) / 4
    failure = f"{sum(kept) / 4:.0%} of earlier edits are retained (least_retained: 0.8)"
    assert session.measured.state_checks[1]["failures"] == [failure]
    assert session.measured.state_checks[0]["retained"] == 1.0
    assert session.measured.state_checks[0]["failures"] == []


def test_a_fact_that_is_stated_anew_is_not_counted_as_lost(tmp_path):
    anew = replace(FACTS[0], target_new="was", case_id="anew")
    stream = [*FACTS[:3], anew]
    session = edited(tmp_path, stream, every_n_edits=4, least_retained=1.0)
    assert plainly(session.language_model, FACTS[0]) < 0.5 * session.edits[0].after
    assert session.measured.state_checks[-1]["retained"] == 1.0
    assert session.measured.state_checks[-1]["failures"] == []


@pytest.mark.parametrize("batch_size", [1, 2])
def test_edits_that_overwrite_others_are_dropped(batch_size, tmp_path):
    language_model = sure_model()
    stream = [*FACTS, OTHERWISE[0], OTHERWISE[2]]
    options = {"every_n_edits": 2, "least_retained": 1.0, "on_failure": "recover"}
    session = edited(tmp_path / "a", stream, batch_size, language_model=language_model, **options)
    statuses = {edit.name: str(edit.status) for edit in session.edits}
    assert statuses == {fact.case_id: "applied" for fact in FACTS} | {
        "Korrin again": "rolled_back", "Dunholt bread again": "rolled_back"
    }  # fmt: skip
    assert "of earlier edits are retained" in session.edits[-1].reason
    assert session.measured.state_checks[-1]["retained"] == 1.0
    assert session.measured.state_checks[-1]["recovered"]
    expected = sure_model()
    edited(tmp_path / "b", FACTS, batch_size, language_model=expected)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(language_model.model).values(),
                                                 snapshot(expected.model).values(), strict=True))  # fmt: skip


def test_nothing_is_measured_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("rome_pl.editing.session_watch.retained_share", lambda *_: 1 / 0)
    session = edited(tmp_path, [FACTS[0], OTHERWISE[0]], every_n_edits=1)
    assert all("retained" not in check and not check["failures"] for check in session.measured.state_checks)


def test_what_nothing_has_verified_is_measured_all_the_same(tmp_path):
    stream = [*FACTS[:3], OTHERWISE[0], FACTS[3]]
    options = {"every_n_edits": 2, "least_retained": 0.9, "on_failure": "recover"}
    verified, unverified = (
        edited(tmp_path / str(verification), stream, verification=verification, **options)
        for verification in (True, False)
    )
    assert [edit.status for edit in verified.edits].count("rolled_back") == 1
    for one, other in zip(verified.edits, unverified.edits, strict=True):
        assert (one.name, one.status, one.after) == (other.name, other.status, pytest.approx(other.after, rel=1e-12))
    assert verified.measured.state_checks == unverified.measured.state_checks
    lines = read_lines(tmp_path / "False" / "ledger" / "edits.jsonl")
    assert lines[0].record["probability"]["after"] is None  # that they were not verified stays to be seen


def test_a_seeded_sample_of_what_is_in_the_weights_is_measured(tmp_path, monkeypatch):
    asked, original = [], retention.measure_targets

    def noted(session, edits, *, written):
        if not written:
            asked.append([edit.name for edit in edits])
        return original(session, edits, written=written)

    def share(session, most):
        asked.clear()
        found = measure(session, most)
        inside = {edit.name for edit in session.edits if edit.status == "applied"} & set(session.layers.names)
        ranked = sorted(inside, key=lambda name: hash_seed("retention", name))
        assert asked == ([ranked[:3]] if inside else [])
        sizes.append((len(inside), found))
        return found

    sizes, measure = [], __import__("rome_pl.editing.retention", fromlist=["retained_share"]).retained_share
    monkeypatch.setattr(retention, "measure_targets", noted)
    monkeypatch.setattr("rome_pl.editing.session_watch.retained_share", share)
    stream = [FACTS[0], OTHERWISE[0], *FACTS[1:]]
    options = {"every_n_edits": 1, "least_retained": 1.0, "retention_sample": 3, "on_failure": "rollback"}
    session = edited(tmp_path, stream, **options)
    assert [str(edit.status) for edit in session.edits].count("rolled_back") == 1
    # The second edit takes the first one's place, and is rolled back.
    assert sizes[:3] == [(1, 1.0), (2, 0.5), (2, 1.0)]
    assert len(sizes) == 5


def test_no_edit_in_the_weights_is_no_failure(tmp_path):
    options = {"every_n_edits": 1, "least_retained": 1.0, "on_failure": "rollback", "largest_change": 1e-12}
    session = edited(tmp_path, FACTS[:2], **options)
    rejected = run_edits(
        tiny_language_model(), tmp_path, FACTS[:1],
        [*default_callbacks()[:-2], StateCheck(every_n_edits=1, least_retained=1.0)], sequential_edit=True,
        v_num_grad_steps=1,
    )  # fmt: skip
    assert [str(edit.status) for edit in session.edits] == ["rolled_back"] * 2
    assert str(rejected.edits[0].status) == "rejected"
    assert rejected.measured.state_checks[0]["retained"] is None
    assert rejected.measured.state_checks[0]["failures"] == []


@pytest.mark.parametrize(
    "options", [{"least_retained": -0.1}, {"least_retained": 1.1}, {"least_retained": float("nan")},
                {"retention_sample": 0}],
)  # fmt: skip
def test_bounds_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        StateCheck(**options)


def test_a_request_that_is_refused_since_an_earlier_fit_wrote_it_is_not_measured(tmp_path):
    module = RomeModule.from_language_model(sure_model(), **FAST | SURE)
    for _ in range(2):
        check = StateCheck(every_n_edits=1, least_retained=1.0, least_canary_agreement=0.0, largest_change=1e9)
        quiet_trainer([*lenient_callbacks()[:-2], check], tmp_path).fit(module, request_loader(FACTS[:1]))
    assert str(module.session.edits[0].status) == "rejected"
    assert module.session.layers.names == [FACTS[0].case_id]
    assert module.session.measured.state_checks[0]["retained"] is None
