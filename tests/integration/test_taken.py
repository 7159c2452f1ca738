"""What counts as an edit that has taken: in every mode, with retries, where it held already, and in reports."""

import json
import math
from dataclasses import replace

import pytest
import torch

from rome_pl.callbacks import EditCommit, ProbeEvaluation, RankOneWriter, RepresentationCheck, StateCheck, Verification
from rome_pl.cli.app import main
from rome_pl.editing import probing
from rome_pl.editing.outcome import HELD_ALREADY
from rome_pl.editing.session_watch import SessionWatch
from rome_pl.editor import EditRejectedError, KnowledgeEditor
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics.probes import TargetMeasure, measure_targets
from rome_pl.model.language_model import LanguageModel
from rome_pl.search.objective import ValueObjective
from tests.integration.helpers import FACTS, FAST, PLAIN_SEARCH, SURE, changed, run_edits, snapshot, sure_model
from tests.tiny import tiny_language_model

pytestmark = pytest.mark.usefixtures("no_perplexity")

LONG_TARGET = (
    "the ferry at noon, and waited on the pier until the last boat had come in. Nobody saw him leave, and the keeper "
    "found his coat there in the morning"
)
SLIGHT = 1e-30  # far below what a tiny random model gives any target: what is said decides alone


def callbacks(least=SLIGHT, greedy=None, check=True):
    chosen = [RankOneWriter(), Verification(least, greedy=greedy), ProbeEvaluation(measure_perplexity=False)]
    return [*[RepresentationCheck()] * check, *chosen, EditCommit()]


def generated(language_model, prompt, count):
    """What greedy decoding gives, token by token, without anything of the package."""
    ids = language_model.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, language_model.model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, -count:].tolist()


def informed_model(folder):
    """A model of its own that says :data:`FACTS`' first target before anything is edited, and not the others'."""
    language_model = sure_model()
    run_edits(language_model, folder, FACTS[:1], callbacks(), **SURE)
    (token,) = generated(language_model, FACTS[0].prompt, 1)
    assert language_model.tokenizer.decode([token]) == f" {FACTS[0].target_new}"
    return LanguageModel(language_model.model, language_model.tokenizer, "informed")


@pytest.mark.parametrize(("sequential", "batch_size"), [(True, 1), (True, 2), (False, 2)])
def test_a_long_target_that_has_only_risen_is_rejected_and_the_reason_says_where_it_ends(
    sequential, batch_size, tmp_path
):
    long = replace(FACTS[0], target_new=LONG_TARGET, subject_span=None)
    options = {**SURE, "sequential_edit": sequential}
    lenient = tiny_language_model()
    (written,) = run_edits(
        lenient, tmp_path / "a", [long], callbacks(least=0), **{**options, "sequential_edit": True}
    ).edits
    assert written.status is EditStatus.APPLIED
    assert written.after > written.before
    target = list(written.search.encoded.rows[0].target)
    says = generated(lenient, long.prompt, len(target))
    place = next(index for index, (given, wanted) in enumerate(zip(says, target, strict=True)) if given != wanted)
    assert written.greedy_after is False
    strict = tiny_language_model()
    before = snapshot(strict.model)
    session = run_edits(strict, tmp_path / "b", [FACTS[1], long], callbacks(), batch_size, **options)
    other, edit = session.edits
    assert (other.status, other.greedy_after) == (EditStatus.APPLIED, True)
    assert edit.status is EditStatus.REJECTED
    assert "the model says " in edit.reason
    if not sequential:  # alone on the original weights, as above
        assert f"(token {place + 1} of {len(target)} should be" in edit.reason
    assert "not the target (probability " in edit.reason
    assert edit.reason.endswith("; the weights are as before this edit")
    assert list(session.layers.names) == ([other.name] if sequential else [])
    assert bool(changed(strict.model, before)) == sequential


@pytest.mark.parametrize(("greedy", "expected"), [(None, "the model says"), (False, "found no change")])
@pytest.mark.parametrize("sequential", [True, False])
def test_a_search_that_has_found_nothing_is_no_edit(greedy, expected, sequential, tmp_path):
    options = {**SURE, "v_num_grad_steps": 1, "sequential_edit": sequential}
    session = run_edits(sure_model(), tmp_path, FACTS, callbacks(greedy=greedy), 2, **options)
    for edit in session.edits:
        assert (edit.status, edit.held_already) == (EditStatus.REJECTED, False)
        assert float(edit.search.delta.norm()) == 0
        assert expected in edit.reason


def test_a_probability_that_is_no_number_is_rejected(tmp_path, monkeypatch):
    def broken(language_model, rows, changes=None):
        found = measure_targets(language_model, rows, changes)
        return [TargetMeasure(math.nan, True)] * len(rows) if broken.calls.append(1) or len(broken.calls) > 1 else found

    broken.calls = []
    monkeypatch.setattr("rome_pl.metrics.probes.measure_targets", broken)
    session = run_edits(sure_model(), tmp_path, FACTS[:2], callbacks(least=0), 2, **SURE)
    assert [edit.status for edit in session.edits] == [EditStatus.REJECTED] * 2
    assert all("no number" in edit.reason for edit in session.edits)
    assert not session.layers.names


@pytest.mark.parametrize("listed", ["all", "no check", "neither"])
@pytest.mark.parametrize("sequential", [True, False])
def test_a_target_that_holds_already_is_noted_and_counted(listed, sequential, tmp_path):
    language_model = informed_model(tmp_path / "before")
    chosen = callbacks(check=listed == "all")
    if listed == "neither":
        chosen = [one for one in chosen if not isinstance(one, Verification)]
    options = {**SURE, "sequential_edit": sequential}
    session = run_edits(language_model, tmp_path / "run", FACTS[:2], chosen, 2, **options)
    first, second = session.edits
    assert [edit.status for edit in session.edits] == [EditStatus.APPLIED] * 2
    assert (first.greedy_before, second.greedy_before) == (True, False)
    assert (first.held_already, second.held_already) == (True, False)
    assert first.notes.count(HELD_ALREADY) == 1
    assert HELD_ALREADY not in second.notes
    assert first.record()["greedy"]["before"] is True


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_retry_takes_over_where_the_model_does_not_say_the_target_after_the_write(batch_size, tmp_path):
    longer = {"v_num_grad_steps": 40}
    options = {**SURE, "v_num_grad_steps": 1}
    direct = run_edits(sure_model(), tmp_path / "a", FACTS, callbacks(), batch_size, **{**options, **longer})
    assert all(edit.greedy_after for edit in direct.edits)
    retries = {"retries": [{}, longer], "retry_below": SLIGHT}
    again = run_edits(sure_model(), tmp_path / "b", FACTS, callbacks(), batch_size, **retries, **options)
    for edit, expected in zip(again.edits, direct.edits, strict=True):
        assert (edit.status, edit.search.attempt, edit.greedy_after) == (EditStatus.APPLIED, 2, True)
        first, second = (note for note in edit.notes if "again" in note)
        assert first.startswith("searched again with retry 1: after the write the model says ")
        assert second.startswith("searched again with retry 2: after the write the model says ")
        torch.testing.assert_close(edit.search.delta, expected.search.delta, rtol=1e-8, atol=1e-11)
    # An edit that takes at the first attempt is what it is without the rule.
    lenient = run_edits(sure_model(), tmp_path / "c", FACTS, callbacks(least=0), batch_size, **{**options, **longer})
    for edit, expected in zip(lenient.edits, direct.edits, strict=True):
        assert torch.equal(edit.search.delta, expected.search.delta)
        assert edit.after == expected.after


def test_an_edit_that_takes_is_not_searched_again_whatever_its_search_has_seen(tmp_path, monkeypatch):
    """The write may give what the value found does not quite give: it is the write that is judged."""
    plain = run_edits(sure_model(), tmp_path / "a", FACTS, callbacks(), 2, **SURE)
    original = ValueObjective.__call__

    def unsaid(self, *arguments):
        losses = original(self, *arguments)
        return replace(losses, bare_greedy=torch.zeros_like(losses.bare_greedy))

    monkeypatch.setattr(ValueObjective, "__call__", unsaid)
    session = run_edits(sure_model(), tmp_path / "b", FACTS, callbacks(), 2, retries=[{"v_num_grad_steps": 3}], **SURE)
    for edit, expected in zip(session.edits, plain.edits, strict=True):
        assert (edit.status, edit.search.attempt, edit.greedy_after) == (EditStatus.APPLIED, 0, True)
        assert torch.equal(edit.search.delta, expected.search.delta)


def test_an_edit_that_does_not_take_when_it_is_written_again_is_dropped(tmp_path, monkeypatch):
    def run(folder, least):
        looks = iter([["too much"], ["too much"], []])  # after the stream, at full strength, at half

        def look(self):
            return {"failures": next(looks, [])}

        monkeypatch.setattr(SessionWatch, "look", look)
        chosen = [*callbacks(least), StateCheck(every_n_edits=1, on_failure="shrink")]
        return run_edits(sure_model(), tmp_path / folder, FACTS[:1], chosen, **SURE)

    kept = run("a", 0.0)
    assert kept.edits[0].status is EditStatus.APPLIED
    (weaker,) = probing.measure_targets(kept, kept.edits, written=True)
    assert weaker.probability < kept.edits[0].after
    session = run("b", (weaker.probability + kept.edits[0].after) / 2)
    (edit,) = session.edits
    assert edit.status is EditStatus.ROLLED_BACK
    assert "too much; written again, it does not take: after the write" in edit.reason
    assert not session.layers.names


def test_the_editor_says_what_the_model_says(tmp_path):
    language_model = informed_model(tmp_path)
    options = {name: value for name, value in (PLAIN_SEARCH | SURE).items() if name != "sequential_edit"}
    editor = KnowledgeEditor(language_model, **options)
    held, fact = FACTS[:2]
    outcome = editor.edit(fact.prompt, fact.subject, fact.target_new)
    assert (outcome.before.says_target, outcome.after.says_target) == (False, True)
    outcome = editor.edit(held.prompt, held.subject, held.target_new)
    assert outcome.before.says_target
    assert outcome.edit.held_already
    editor.undo()
    before = snapshot(language_model.model)
    with pytest.raises(EditRejectedError, match=r"the model says .* \(token \d+ of \d+ should be"):
        editor.edit(fact.prompt, fact.subject, LONG_TARGET)
    assert changed(language_model.model, before) == []
    asked = [held, fact, replace(fact, target_new=LONG_TARGET, subject_span=None)]
    entries, _, _ = editor.edit(
        prompts=[one.prompt for one in asked], subject=[one.subject for one in asked],
        target_new=[one.target_new for one in asked], sequential_edit=False,
    )  # fmt: skip
    assert [entry["status"] for entry in entries] == ["applied", "applied", "rejected"]
    assert [entry["held_already"] for entry in entries] == [True, False, False]


def test_reports_count_what_held_already(tmp_path, capsys):
    language_model = informed_model(tmp_path / "before")
    language_model.model.save_pretrained(tmp_path / "model")
    language_model.tokenizer.save_pretrained(tmp_path / "model")
    held = FACTS[0]
    records = [
        {"prompt": one.prompt, "subject": one.subject, "target_new": one.target_new, "case_id": one.case_id}
        for one in FACTS[:2]
    ]
    (tmp_path / "records.json").write_text(json.dumps(records), encoding="utf-8")
    options = {f"model.{name}": value for name, value in FAST.items()} | {
        "model.pretrained": tmp_path / "model", "model.sequential_edit": True, "data.path": tmp_path / "records.json",
        "trainer.default_root_dir": tmp_path / "run", "trainer.accelerator": "cpu",
        "verification.least_probability": 0, "probe_evaluation.measure_perplexity": False,
    }  # fmt: skip
    assert main(["edit", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]) == 0
    counts = "2 applied (1 of them held already)"
    printed = " ".join(capsys.readouterr().out.split())
    assert f"2 requested: {counts}, 0 rejected" in printed
    content = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert (content["n_applied"], content["n_held_already"]) == (2, 1)
    assert [record["greedy"]["before"] for record in content["records"]] == [True, False]
    assert f"2 requested, {counts}." in (tmp_path / "run" / "table.md").read_text(encoding="utf-8")
    assert "1 of them held already" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert main(["show", "--ledger", str(tmp_path / "run")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"2 edits: {counts}" in printed
    assert main(["show", "--ledger", str(tmp_path / "run"), "--cases", str(held.case_id)]) == 0
    assert "applied (held already)" in " ".join(capsys.readouterr().out.split())
