"""The model's state between edits: what is looked at, and what is done when it is bad."""

import pytest
import torch

from rome_pl.callbacks import EditCommit, StateCheck
from rome_pl.ledger.edit_log import read_lines
from rome_pl.ledger.replay import groups_of, load_write, read_edits
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics.text import TextMeasure
from rome_pl.model.architecture import find_site
from rome_pl.requests.edit_request import EditRequest
from rome_pl.write.edited_weight import EditedWeight
from tests.integration.helpers import changed, lenient_callbacks, run_edits, snapshot
from tests.tiny import tiny_language_model

pytestmark = pytest.mark.usefixtures("no_perplexity")

WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("on_failure", ["warn", "rollback", "stop"])
def test_a_bad_state_is_reported_or_rolled_back(on_failure, language_model, tmp_path):
    before = snapshot(language_model.model)
    check = StateCheck(every_n_edits=2, largest_change=1e-9, on_failure=on_failure)
    session = run_edits(language_model, tmp_path, callbacks=[*lenient_callbacks()[:-1], check], sequential_edit=True)
    assert "largest_change" in session.measured.state_checks[0]["failures"][0]
    if on_failure == "warn":
        assert [edit.status for edit in session.edits] == ["applied"] * 3
        assert changed(language_model.model, before) == [WEIGHT]
    else:
        count = 3 if on_failure == "rollback" else 2
        assert [edit.status for edit in session.edits] == ["rolled_back"] * count
        assert changed(language_model.model, before) == []


MANY = [
    EditRequest(
        prompt=f"The lighthouse of Korrin{index} stands in", subject=f"Korrin{index}", target_new="Oslo",
        target_true="Lima", case_id=index,
    )
    for index in range(12)
]  # fmt: skip


class _Fails(StateCheck):
    """Finds the state bad while certain edits are in the weight."""

    def __init__(self, bad, **options):
        super().__init__(every_n_edits=4, on_failure="recover", **options)
        self.bad = bad

    def _look(self, watch):
        inside = self.bad & set(watch.session.layers.names)
        return super()._look(watch) | {"failures": [f"{sorted(inside)} are in"] if inside else []}


def recovered(tmp_path, bad):
    language_model = tiny_language_model()
    callbacks = [*lenient_callbacks()[:-2], _Fails(bad)]
    for callback in callbacks:
        if isinstance(callback, EditCommit):
            callback.ledger = True
    session = run_edits(language_model, tmp_path, MANY, callbacks, sequential_edit=True)
    return session, language_model


def test_recovery_drops_the_edits_that_break_the_model_and_keeps_the_others(tmp_path):
    session, language_model = recovered(tmp_path, {"1", "6"})
    statuses = [str(edit.status) for edit in session.edits]
    assert [index for index, status in enumerate(statuses) if status == "rolled_back"] == [1, 6]
    assert statuses.count("applied") == 10
    assert session.layers.names == [str(index) for index in range(12) if index not in (1, 6)]
    # What is in the weight is the closed form for the others, in order, with the values as they were found.
    expected = EditedWeight(find_site(tiny_language_model().model, 1), session.layers.last.metric)
    for edit in session.edits:
        if edit.status is EditStatus.APPLIED:
            expected.write([edit.name], edit.written.assertions[0])
            expected.commit()
    assert torch.equal(language_model.model.state_dict()[WEIGHT], expected.site.weight)
    assert [(check["edits"], bool(check["failures"])) for check in session.measured.state_checks] == [
        (4, True), (4, False), (8, True), (8, False), (12, False)
    ]  # fmt: skip


def test_a_ledger_knows_what_recovery_has_written_anew(tmp_path):
    session, language_model = recovered(tmp_path, {"1", "6"})
    session.ledger.close()
    lines = read_lines(tmp_path / "ledger" / "edits.jsonl")
    merged = {}
    for line in lines:
        merged[line.record["case_id"]] = merged.get(line.record["case_id"], {}) | line.record
    weight = EditedWeight(find_site(tiny_language_model().model, 1), session.layers.last.metric)
    for group in groups_of(list(merged.values())):
        weight.restore(load_write(tmp_path, group).layers[1])
    assert torch.equal(weight.site.weight, language_model.model.state_dict()[WEIGHT])
    assert {name for name, record in merged.items() if record["status"] == "rolled_back"} == {1, 6}


def test_stopped_in_the_midst_of_recovery_the_edits_are_in_the_weight(tmp_path, monkeypatch):
    expected = run_edits(tiny_language_model(), tmp_path / "a", MANY[:4], sequential_edit=True)
    language_model, calls = tiny_language_model(), []
    check = _Fails({"1"})
    look = check._look

    def stopped(watch):
        calls.append(watch.session.layers.names)
        if len(calls) == 4:  # the failing check, and three edits written again
            raise RuntimeError("the lights went out")
        return look(watch)

    monkeypatch.setattr(check, "_look", stopped)
    with pytest.raises(RuntimeError, match="lights"):
        run_edits(language_model, tmp_path / "b", MANY[:4], [*lenient_callbacks()[:-2], check], sequential_edit=True)
    assert len(calls[-1]) == 2  # the second edit had been dropped
    assert torch.equal(language_model.model.state_dict()[WEIGHT], expected.layers.last.site.weight)


class _Weighs(StateCheck):
    """Finds the state bad while the weights have changed by more than so much."""

    def __init__(self, largest):
        super().__init__(every_n_edits=4, on_failure="shrink")
        self.largest = largest

    def _look(self, watch):
        norm = watch.session.layers.change
        return super()._look(watch) | {"failures": [f"{norm} is too much"] if norm > self.largest else []}


def test_an_edit_that_is_too_much_is_written_at_half_its_strength(tmp_path):
    free = run_edits(tiny_language_model(), tmp_path / "a", MANY[:4], sequential_edit=True)
    bound = 0.75 * free.layers.change
    callbacks = [*lenient_callbacks()[:-2], _Weighs(bound)]
    for callback in callbacks:
        if isinstance(callback, EditCommit):
            callback.ledger = True
    language_model = tiny_language_model()
    session = run_edits(language_model, tmp_path / "b", MANY[:4], callbacks, sequential_edit=True)
    session.ledger.close()
    assert session.layers.change <= bound
    halved = [edit for edit in session.edits if edit.notes and "at 50% of its strength" in edit.notes[-1]]
    assert halved
    assert all(edit.status is EditStatus.APPLIED for edit in halved)
    # By hand: the closed form for all that are left, in order, half of the residual for those.
    site = find_site(tiny_language_model().model, 1)
    weight = site.weight.detach().clone()
    for edit in session.edits:
        if edit.status is not EditStatus.APPLIED:
            continue
        original = free.edits[edit.index].written.assertions[0]
        strength = 0.5 if edit in halved else 1.0
        residual = strength * (original.value - original.at @ weight.T)
        weight = weight + residual.T @ original.shape / (original.shape @ original.at.T)
    torch.testing.assert_close(language_model.model.state_dict()[WEIGHT], weight, rtol=1e-9, atol=1e-11)
    edits = {str(edit["case_id"]): edit for edit in read_edits(tmp_path / "b")}
    assert all("strength" in edits[edit.name]["notes"][-1] for edit in halved)


def test_divergence_and_spectrum_are_watched_if_asked_for(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The lighthouse of Korrin stands in Oslo. It rains.", encoding="utf-8")
    options = {"every_n_edits": 2, "perplexity_text": str(text)}
    check = StateCheck(largest_divergence=1e-9, largest_spectral_change=1e-9, **options)
    model, before = tiny_language_model(), tiny_language_model()
    session = run_edits(model, tmp_path, MANY[:2], [*lenient_callbacks()[:-2], check], sequential_edit=True)
    (found,) = session.measured.state_checks
    ids = torch.tensor([model.tokenizer(text.read_text(encoding="utf-8"))["input_ids"]])
    with torch.no_grad():
        now, then = (one.model(input_ids=ids).logits[0, :-1].log_softmax(-1) for one in (model, before))
    assert found["divergence"] == pytest.approx(float((then.exp() * (then - now)).sum(-1).mean()), rel=1e-5)
    weight = before.model.state_dict()[WEIGHT]
    change = model.model.state_dict()[WEIGHT] - weight
    expected = float(torch.linalg.matrix_norm(change, 2) / torch.linalg.matrix_norm(weight, 2))
    assert found["spectral_change"] == pytest.approx(expected, rel=0.02)
    assert {failure.split("(")[1].split(":")[0] for failure in found["failures"][-2:]} == {
        "largest_divergence", "largest_spectral_change"
    }  # fmt: skip
    for name in ("largest_divergence", "largest_spectral_change"):
        with pytest.raises(ValueError, match=name):
            StateCheck(**{name: 0.0})


def test_a_stream_that_has_to_drop_more_than_a_fifth_ends_with_that_verdict(tmp_path, caplog):
    session, _ = recovered(tmp_path, {"0", "2", "3"})
    assert len(session.edits) == 4
    assert "3 of 4 edits had to be dropped" in session.measured.state_checks[-1]["verdict"]
    assert "does not suit this model" in caplog.text


def test_perplexity_is_watched_if_asked_for(tmp_path, monkeypatch):
    check = StateCheck(every_n_edits=2, largest_perplexity_ratio=1.5)
    found = iter([10.0, 12.0, 16.0])
    monkeypatch.setattr("rome_pl.metrics.model_health.measure_text", lambda *_: TextMeasure(next(found), None, 5))
    session = run_edits(
        tiny_language_model(), tmp_path, MANY[:4], [*lenient_callbacks()[:-2], check], sequential_edit=True
    )
    assert [round(check["perplexity_ratio"], 9) for check in session.measured.state_checks] == [1.2, 1.6]
    assert not any("perplexity" in failure for failure in session.measured.state_checks[0]["failures"])
    assert "1.60 times the unedited model's" in session.measured.state_checks[1]["failures"][-1]
    with pytest.raises(ValueError, match="largest_perplexity_ratio"):
        StateCheck(largest_perplexity_ratio=0.9)
