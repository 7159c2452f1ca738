"""Several edits at a time: independent ones are what they are alone, sequential ones are solved jointly."""

import json
import math

import pytest
import torch
from lightning.pytorch import Trainer

from rome_pl.errors import OptionError
from rome_pl.metrics import probe_scores
from rome_pl.model.architecture import find_site
from rome_pl.requests.edit_request import EditRequest
from tests.integration.batch_runs import (
    LONG,
    REQUESTS,
    Guard,
    alike,
    assert_same_edit,
    by_name,
    callbacks_for,
    ledger_of,
    model_for,
    numbers,
    run,
    with_statistics,
)
from tests.integration.helpers import changed, snapshot

# --- independent edits ------------------------------------------------------------------------------------------------


def known_fact(language_model):
    """A request whose target the random model gives already."""
    for prompt in (
        "Old Mr Finch of",
        "The house at Wexley",
        "Nobody in Harrow",
        "The bell of Ulm",
        "In the town of Ely",
    ):
        row = language_model.encoder.prompt(prompt)
        token = int(language_model.model(torch.tensor([row.ids])).logits[0, -1].argmax())
        text = language_model.tokenizer.decode([token])
        if text.strip().isprintable() and text.strip():
            request = EditRequest(prompt=prompt, subject=prompt.split()[-1], target_new=text, case_id="known")
            if language_model.encoder.continuation(prompt, text, request).target == (token,):
                return request
    raise AssertionError("no prompt whose next token is a text of its own")


@pytest.fixture(scope="module")
def stream():
    """Requests of every fate, and the threshold that rejects one of them."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("HF_HUB_OFFLINE", "1")
        known = known_fact(model_for())
    return [REQUESTS[0], LONG, *REQUESTS[1:4], known, *REQUESTS[4:]]


@pytest.fixture(scope="module")
def one_by_one(stream, tmp_path_factory):
    """The edits made one at a time, by name, and the threshold that rejects one."""
    free = run(tmp_path_factory.mktemp("free"), stream, 1, callbacks=callbacks_for(on_known="skip"))
    after = sorted(edit.after for edit in free.edits if edit.after is not None)
    threshold = (after[0] + after[1]) / 2
    session = run(
        tmp_path_factory.mktemp("one"), stream, 1, callbacks=callbacks_for(threshold, on_known="skip", guard=True)
    )
    return by_name(session), threshold


def test_the_stream_has_edits_of_every_fate(one_by_one):
    """Guards what follows."""
    edits, _ = one_by_one
    statuses = [str(edit.status) for edit in edits.values()]
    assert (statuses.count("applied"), statuses.count("rejected"), statuses.count("skipped")) == (6, 1, 2)
    assert "field 'target_new'" in edits["long"].reason
    assert edits["known"].reason == "the model gives this target already (on_known: skip)"
    assert all(edit.value_norm > 0.1 for edit in edits.values() if edit.value_norm is not None)


def test_scores_of_independent_edits_are_those_of_the_written_weight(one_by_one):
    edits, _ = one_by_one
    for edit in edits.values():
        if edit.status != "applied":
            assert edit.scores.get("immediate") == edit.scores.get("base")
            continue
        language_model = model_for()
        site = find_site(language_model.model, 1)
        with torch.no_grad():
            site.weight.add_(site.matrix(edit.written.updates[0].left.T @ edit.written.updates[0].right))
        (scores,) = probe_scores(language_model, [edit.request])
        assert numbers(edit.scores["immediate"]) == pytest.approx(numbers(scores), rel=1e-9, nan_ok=True)
        assert edit.after == pytest.approx(math.exp(scores.rewrite[0]), rel=1e-9)
        assert edit.scores["immediate"] != edit.scores["base"]


@pytest.mark.parametrize("batch_size", [3, 20])
def test_independent_edits_of_a_batch_are_those_made_one_by_one(batch_size, stream, one_by_one, tmp_path):
    expected, threshold = one_by_one
    guarded = callbacks_for(threshold, on_known="skip", guard=True)
    language_model = model_for()
    before = snapshot(language_model.model)
    session = run(tmp_path, stream, batch_size, language_model, guarded)
    assert changed(language_model.model, before) == []
    assert [edit.index for edit in session.edits] == list(range(len(stream)))
    for edit in session.edits:
        assert_same_edit(edit, expected[edit.name])
    looks = [callback.looks for callback in guarded if isinstance(callback, Guard)]
    assert len(looks) == 4
    assert min(looks) > 2 * math.ceil(len(stream) / batch_size)
    assert session.layers.written == []


@pytest.mark.parametrize(
    ("order", "by_length"), [([8, 7, 6, 5, 4, 3, 2, 1, 0], False), ([3, 0, 6, 8, 1, 5, 2, 7, 4], True)]
)
def test_the_order_of_the_requests_does_not_matter(order, by_length, stream, one_by_one, tmp_path):
    expected, threshold = one_by_one
    callbacks = callbacks_for(threshold, on_known="skip", guard=True)
    requests = [stream[index] for index in order]
    session = run(tmp_path, requests, 3, callbacks=callbacks, by_length=by_length)
    assert len(session.edits) == len(stream)
    for edit in session.edits:
        assert requests[edit.index].case_id == edit.name
        assert_same_edit(edit, expected[edit.name])


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def without_time(record):
    return {name: value for name, value in record.items() if name != "seconds"}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_ledger_and_results_are_in_the_order_of_the_stream(batch_size, stream, one_by_one, tmp_path):
    expected, threshold = one_by_one
    run(tmp_path, stream, batch_size, callbacks=callbacks_for(threshold, on_known="skip"))
    ledger, results = ledger_of(tmp_path), results_of(tmp_path)
    for records in (ledger, results["records"]):
        assert [record["index"] for record in records] == list(range(len(stream)))
        assert [record["case_id"] for record in records] == [request.case_id for request in stream]
        assert [record["status"] for record in records] == [str(expected[r.case_id].status) for r in stream]
    shards = {line["shard"] for line in ledger if "shard" in line}
    assert shards == {f"{line['index']:06d}.safetensors" for line in ledger if line["status"] == "applied"}
    assert {path.name for path in (tmp_path / "ledger" / "shards").iterdir()} == shards
    assert not any("joint" in line for line in ledger)
    assert (results["n_requested"], results["n_applied"], results["n_rejected"], results["n_skipped"]) == (9, 6, 1, 2)
    assert results["interrupted"] is False


def test_results_are_in_the_order_of_the_stream_where_batches_are_not(stream, one_by_one, tmp_path):
    expected, threshold = one_by_one
    session = run(tmp_path, stream, 3, callbacks=callbacks_for(threshold, on_known="skip"), by_length=True)
    order = [edit.index for edit in session.edits]
    assert order != sorted(order) == list(range(len(stream)))
    records, ledger = results_of(tmp_path)["records"], ledger_of(tmp_path)
    assert [record["index"] for record in records] == list(range(len(stream)))
    for record, request in zip(records, stream, strict=True):
        edit = expected[request.case_id]
        assert (record["case_id"], record["status"]) == (request.case_id, str(edit.status))
        assert record["num_steps"] == len(edit.steps)
        assert alike(record["probability"]["after"], edit.after)
    # The ledger is written as batches end: every edit once.
    assert [line["index"] for line in ledger] == order


def test_operations_are_those_of_the_first_edits(tmp_path):
    one, three = (run(tmp_path, REQUESTS[1:4], size).flops.per_edit for size in (1, 3))
    assert 0.5 * one < three < 3 * one


def test_operations_of_a_batch_that_is_skipped_do_not_count(stream, tmp_path):
    alone = run(tmp_path, REQUESTS[:1], 1).flops.per_edit
    known = stream[5]
    after = run(tmp_path, [known, REQUESTS[0]], 1, callbacks=callbacks_for(on_known="skip")).flops.per_edit
    assert after == alone


def test_balanced_edits_of_a_batch_are_those_made_one_by_one(tmp_path):
    _, options, _ = with_statistics(tmp_path, preset="balanced")
    alone = by_name(run(tmp_path, REQUESTS[:4], 1, **options | {"sequential_edit": False}))
    for edit in run(tmp_path, REQUESTS[:4][::-1], 3, **options | {"sequential_edit": False}).edits:
        assert edit.search.keys.balanced is not None
        assert_same_edit(edit, alone[edit.name])


# --- how values are searched ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["16-mixed", "64-true", "bf16-true", "16-true"])
def test_other_precisions_are_refused(precision, tmp_path, monkeypatch):
    options = {"precision": precision}
    if precision == "16-mixed":  # on a CPU Lightning would take bf16-mixed instead, with a warning
        monkeypatch.setattr(Trainer, "precision", property(lambda self: "16-mixed"))
        options = {}
    with pytest.raises(OptionError, match=rf"precision is {precision}: use '32-true', or 'bf16-mixed'"):
        run(tmp_path, language_model=model_for(dtype=torch.float32), trainer=options)


@pytest.mark.parametrize("precision", ["64-true", "16-true"])
def test_a_refused_precision_leaves_the_model_as_it_was(precision, tmp_path):
    language_model = model_for(dtype=torch.float32)
    before = snapshot(language_model.model)
    with pytest.raises(OptionError):
        run(tmp_path, language_model=language_model, trainer={"precision": precision})
    assert all(parameter.dtype == torch.float32 for parameter in language_model.model.parameters())
    assert changed(language_model.model, before) == []


# --- joint edits ------------------------------------------------------------------------------------------------------
