"""Several facts about one subject in a sequential stream: they have one key, and none is to cost another."""

import math
from dataclasses import replace

import pytest
import torch

from rome_pl.callbacks import EditCommit
from rome_pl.data_modules import RequestDataModule
from rome_pl.data_modules.request_data import request_loader
from rome_pl.editor import KnowledgeEditor
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics.probes import measure_targets
from rome_pl.modules.rome_module import RomeModule
from rome_pl.requests.edit_request import EditRequest
from tests.integration.helpers import FAST, lenient_callbacks, quiet_trainer, run_edits
from tests.tiny import tiny_language_model

pytestmark = pytest.mark.usefixtures("no_perplexity")

FACTS = [
    EditRequest(prompt="Korrin stands in", subject="Korrin", target_new="Oslo", case_id="place"),
    EditRequest(prompt="Korrin was painted by", subject="Korrin", target_new="violin", case_id="painter"),
    EditRequest(prompt="Dunholt bread is made of", subject="Dunholt bread", target_new="rye", case_id="other"),
]
# One key that both shapes and asserts, as a joint write needs it, and no statistics.
OPTIONS = {
    "preset": "r_rome", "mom2_adjustment": False, "sequential_edit": True,
}  # fmt: skip


def probabilities(language_model, requests=FACTS):
    rows = [language_model.encoder.edit(request).rows[0] for request in requests]
    return [measure.probability for measure in measure_targets(language_model, rows)]


def test_the_search_for_the_second_fact_also_weighs_the_first(tmp_path):
    language_model = tiny_language_model()
    run_edits(language_model, tmp_path / "one", FACTS[:1], **OPTIONS)
    (before,) = probabilities(language_model, FACTS[:1])
    session = run_edits(tiny_language_model(), tmp_path / "all", FACTS, **OPTIONS)
    assert [edit.status for edit in session.edits] == [EditStatus.APPLIED] * 3
    assert [len(edit.search.encoded.kept) for edit in session.edits] == [0, 1, 0]
    for edit, expected in zip(session.edits, (0.0, -math.log(before), 0.0), strict=True):
        first = edit.steps[0]
        assert first.loss - first.nll - first.kl - first.decay == pytest.approx(expected, abs=1e-5)
    free = run_edits(tiny_language_model(), tmp_path / "free", FACTS, keep_subject_facts=False, **OPTIONS)
    assert [len(edit.search.encoded.kept) for edit in free.edits] == [0, 0, 0]
    assert torch.equal(free.edits[0].search.delta, session.edits[0].search.delta)
    assert not torch.equal(free.edits[1].search.delta, session.edits[1].search.delta)


def test_a_fact_that_was_rejected_or_is_asked_for_anew_is_not_kept(tmp_path):
    anew = EditRequest(prompt="Korrin stands in", subject="Korrin", target_new="rye", case_id="anew")
    session = run_edits(tiny_language_model(), tmp_path, [FACTS[0], FACTS[1], anew], **OPTIONS)
    assert [len(edit.search.encoded.kept) for edit in session.edits] == [0, 1, 1]
    callbacks = lenient_callbacks()
    next(one for one in callbacks if hasattr(one, "least_probability")).least_probability = 0.999
    session = run_edits(tiny_language_model(), tmp_path, FACTS, callbacks, **OPTIONS)
    assert session.edits[0].status is EditStatus.REJECTED
    assert session.edits[1].search.encoded.kept == ()


def test_single_edits_know_nothing_of_each_other(tmp_path):
    session = run_edits(tiny_language_model(), tmp_path, FACTS, **{**OPTIONS, "sequential_edit": False})
    assert all(edit.search.encoded.kept == () for edit in session.edits)


def test_a_joint_solve_takes_the_facts_about_a_subject_one_after_the_other(tmp_path):
    """They would have one key and two values, which no solve can assert at once."""
    language_model = tiny_language_model()
    module = RomeModule.from_language_model(language_model, **{**FAST, **OPTIONS})
    data = RequestDataModule(batch_size=3)
    data.requests = list(FACTS)
    quiet_trainer(lenient_callbacks(), tmp_path).fit(module, data)
    session = module.session
    assert [edit.status for edit in session.edits] == [EditStatus.APPLIED] * 3
    assert [written.names for written in session.layers.written] == [("place",), ("painter", "other")]


def test_a_run_that_is_gone_on_with_keeps_what_the_earlier_one_taught(tmp_path):
    def run(folder, requests):
        callbacks = [one for one in lenient_callbacks() if not isinstance(one, EditCommit)]
        language_model = tiny_language_model()
        session = run_edits(
            language_model, folder, requests, [*callbacks, EditCommit(ledger=True, resume=True)], **OPTIONS
        )
        return language_model, session

    whole, _ = run(tmp_path / "whole", FACTS)
    run(tmp_path / "parts", FACTS[:1])
    parts, session = run(tmp_path / "parts", FACTS)
    assert session.edits[0].resumed
    assert len(session.edits[1].search.encoded.kept) == 1
    weights = parts.model.state_dict()
    assert all(weights[name].equal(tensor) for name, tensor in whole.model.state_dict().items())


def test_edits_of_an_editor_know_those_before_them_and_not_what_was_undone():
    editor = KnowledgeEditor(tiny_language_model(), **{**FAST, "preset": "r_rome", "mom2_adjustment": False})

    def edit(prompt, target):
        return editor.edit(prompt, subject="Korrin", target_new=target, verify=False)

    first, second = edit("Korrin stands in", "Oslo"), edit("Korrin was painted by", "violin")
    assert len(second.edit.search.encoded.kept) == 1
    assert second.edit.search.encoded.kept[0] == first.edit.search.encoded.rows[0]
    editor.undo(first)
    third = edit("Korrin is full of", "rye")
    assert third.edit.search.encoded.kept == (second.edit.search.encoded.rows[0],)


def test_where_the_key_is_the_prompt_s_own_nothing_is_kept(tmp_path):
    language_model = tiny_language_model()
    module = RomeModule.from_language_model(language_model, **{**FAST, **OPTIONS, "fact_token": "last"})
    data = RequestDataModule(batch_size=3)
    data.requests = list(FACTS)
    quiet_trainer(lenient_callbacks(), tmp_path).fit(module, data)
    assert all(edit.search.encoded.kept == () for edit in module.session.edits)
    assert [written.names for written in module.session.layers.written] == [("place", "painter", "other")]


def test_a_refused_edit_of_a_known_name_does_not_stand_for_the_one_in_the_weights(tmp_path):
    language_model = tiny_language_model()
    module = RomeModule.from_language_model(language_model, **{**FAST, **OPTIONS})

    def fit(requests):
        quiet_trainer(lenient_callbacks(), tmp_path).fit(module, request_loader(requests))
        return module.session.edits

    fit(FACTS[:1])
    (again,) = fit([replace(FACTS[1], case_id="place")])
    assert again.status is EditStatus.REJECTED
    (third,) = fit(FACTS[1:2])
    (kept,) = third.search.encoded.kept
    assert kept == language_model.encoder.edit(FACTS[0]).rows[0]


def test_the_key_of_the_subject_is_no_surprise_where_its_facts_are_kept(tmp_path):
    noted = {}
    for keep in (True, False):
        folder = tmp_path / str(keep)
        session = run_edits(tiny_language_model(), folder, FACTS, keep_subject_facts=keep, **OPTIONS)
        noted[keep] = [note for edit in session.edits for note in edit.notes if "all but equals" in note]
    assert noted[True] == []
    assert len(noted[False]) == 1
    assert "record place" in noted[False][0]
