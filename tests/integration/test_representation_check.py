"""What is said of a request before its edit: known facts, odd keys, requests about facts of earlier ones."""

import math
from dataclasses import replace

import pytest
import torch

from rome_pl.callbacks import RepresentationCheck
from rome_pl.ledger.status import EditStatus
from rome_pl.requests.edit_request import EditRequest
from tests.integration.helpers import REQUESTS, lenient_callbacks, run_edits
from tests.tiny import tiny_language_model

pytestmark = pytest.mark.usefixtures("no_perplexity")


def test_a_key_that_is_not_finite_rejects_the_edit(language_model, tmp_path):
    with torch.no_grad():
        language_model.model.model.layers[1].mlp.up_proj.weight[0, 0] = math.inf
    session = run_edits(language_model, tmp_path, contexts=["It rains"])
    assert [edit.status for edit in session.edits] == [EditStatus.REJECTED] * 3
    assert "the key is not finite: load the model in float32 or bfloat16" in session.edits[0].reason


def test_a_fact_that_is_known_is_edited_with_a_note_or_skipped(language_model, tmp_path):
    # The lookup token is the one that predicts, so that even a random model can be made sure of itself.
    request = [EditRequest(prompt="We left for Korrin", subject="Korrin", target_new="the")]
    hard = {"sequential_edit": True, "v_num_grad_steps": 40, "clamp_norm_factor": 500.0}
    first = run_edits(language_model, tmp_path, request, **hard)
    assert first.edits[0].notes == []
    again = run_edits(language_model, tmp_path, request, **hard)
    assert again.edits[0].status is EditStatus.APPLIED
    assert "already" in again.edits[0].notes[0]
    skip = run_edits(
        language_model, tmp_path, request, callbacks=[RepresentationCheck(on_known="skip"), *lenient_callbacks()[1:]]
    )
    assert skip.edits[0].status is EditStatus.SKIPPED


def test_a_key_like_an_earlier_one_is_noted_or_rejected(language_model, tmp_path):
    twice = [
        REQUESTS[0],
        EditRequest(prompt="The lighthouse of Korrin stands in", subject="Korrin", target_new="Rome", case_id="z"),
    ]
    session = run_edits(language_model, tmp_path, twice, sequential_edit=True)
    assert "all but equals that of record a" in session.edits[1].notes[-1]
    callbacks = [RepresentationCheck(on_odd_key="reject"), *lenient_callbacks()[1:]]
    session = run_edits(tiny_language_model(), tmp_path, twice, callbacks=callbacks, sequential_edit=True)
    assert [edit.status for edit in session.edits] == ["applied", "rejected"]


def test_a_key_of_odd_norm_is_noted_or_rejected(language_model, tmp_path):
    """The norm is compared with that of ordinary keys, either way."""
    options = {"preset": "r_rome", "mom2_n_samples": 600}

    def notes(ratio):
        callbacks = [RepresentationCheck(largest_norm_ratio=ratio), *lenient_callbacks()[1:]]
        fresh = tiny_language_model()
        session = run_edits(fresh, tmp_path, REQUESTS[:1], callbacks=callbacks, **options)
        return [note for note in session.edits[0].notes if "times the usual one" in note]

    assert notes(1e6) == []
    found = notes(1 + 1e-6)
    assert len(found) == 1
    assert found[0].startswith("the key's norm is ")
    callbacks = [RepresentationCheck(largest_norm_ratio=1 + 1e-6, on_odd_key="reject"), *lenient_callbacks()[1:]]
    session = run_edits(language_model, tmp_path, REQUESTS[:1], callbacks=callbacks, **options)
    assert session.edits[0].status is EditStatus.REJECTED
    assert "times the usual one" in session.edits[0].reason


CONFLICTING = [
    replace(REQUESTS[0], case_id="first", relation="P1"),
    replace(REQUESTS[0], case_id="again", relation="P1"),
    replace(REQUESTS[0], case_id="otherwise", target_new="Bern", relation="P1"),
    replace(REQUESTS[0], case_id="other words", prompt="Korrin belongs to", subject_span=None, target_new="rye",
            relation="P1"),
    replace(REQUESTS[0], case_id="other fact", prompt="Korrin belongs to", subject_span=None, relation="P2"),
    REQUESTS[1],
]  # fmt: skip


FINDINGS = {
    "again": "asks for what record first asks for already",
    "otherwise": "contradicts record again, which asks for 'Oslo' of the same subject and prompt",
    "other words": "contradicts record otherwise, which asks for 'Bern' of the same subject and relation",
    "other fact": "contradicts record other words, which asks for 'rye' of the same subject and prompt",
}


def test_requests_about_facts_of_earlier_ones_are_said(language_model, tmp_path, caplog):
    session = run_edits(language_model, tmp_path, CONFLICTING, sequential_edit=True)
    assert {edit.name for edit in session.edits if edit.notes} >= set(FINDINGS)
    for edit in session.edits:
        said = [note for note in edit.notes if "record" in note and ("asks for" in note)]
        assert len(said) == (edit.name in FINDINGS)
        assert all(note.startswith(FINDINGS[edit.name]) for note in said)
    assert "4 records are about facts of earlier ones: record again asks for" in caplog.text


def test_requests_about_facts_of_earlier_ones_can_be_rejected(language_model, tmp_path):
    callbacks = [RepresentationCheck(on_conflict="reject"), *lenient_callbacks()[1:]]
    session = run_edits(language_model, tmp_path, CONFLICTING, callbacks, sequential_edit=True)
    statuses = {edit.name: edit.status for edit in session.edits}
    assert {name for name, status in statuses.items() if status is EditStatus.REJECTED} == set(FINDINGS)
    alone = run_edits(language_model, tmp_path, CONFLICTING, callbacks)  # single edits do not meet
    assert {edit.status for edit in alone.edits} == {EditStatus.APPLIED}
