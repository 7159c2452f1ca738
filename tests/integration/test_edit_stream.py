"""Streams of edits in a Trainer of the user's own."""

import json
import math
from copy import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from rome_pl.callbacks import EditCommit, ProbeEvaluation, RankOneWriter, RepresentationCheck, Verification
from rome_pl.data_modules.request_data import request_loader
from rome_pl.editing.edit import EditError
from rome_pl.encoding.text_encoder import TextEncoder
from rome_pl.errors import OptionError
from rome_pl.forward.prefix_pass import run_prefix
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics import probe_scores
from rome_pl.metrics.probes import TargetMeasure, measure_targets
from rome_pl.model.language_model import LanguageModel
from rome_pl.modules.rome_module import RomeModule
from rome_pl.requests.edit_request import EditRequest, RequestError
from rome_pl.search.objective import ValueObjective
from rome_pl.write.edit_keys import EditKeys
from rome_pl.write.edited_weight import EditedWeight
from tests.integration.helpers import FAST, REQUESTS, changed, lenient_callbacks, quiet_trainer, run_edits, snapshot
from tests.tiny import byte_level_tokenizer, tiny_language_model, tiny_model

pytestmark = pytest.mark.usefixtures("no_perplexity")

WEIGHT = "model.layers.1.mlp.down_proj.weight"
# One key that both shapes and asserts, as a joint write needs it, and no statistics.
JOINT = {"preset": "r_rome", "mom2_adjustment": False}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_single_mode_evaluates_each_edit_and_restores_the_weights(batch_size, language_model, tmp_path):
    before = snapshot(language_model.model)
    session = run_edits(language_model, tmp_path, batch_size=batch_size)
    assert [edit.status for edit in session.edits] == [EditStatus.APPLIED] * 3
    assert changed(language_model.model, before) == []
    for edit in session.edits:
        assert edit.after > edit.before
        assert edit.scores["immediate"].rewrite[0] == pytest.approx(math.log(edit.after), rel=1e-9)
        assert "final" not in edit.scores


def numbers(scores):
    pairs = (scores.rewrite, *scores.paraphrases, *scores.neighbours)
    return [value for pair in pairs for value in pair if value is not None]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_single_edit_is_evaluated_as_if_it_were_written(batch_size, tmp_path):
    """Nothing is written in single mode; what is measured is what the written weights give."""
    single = run_edits(tiny_language_model(), tmp_path, batch_size=batch_size)
    for edit, request in zip(single.edits, REQUESTS, strict=True):
        language_model = tiny_language_model()
        written = run_edits(language_model, tmp_path, [request], sequential_edit=True).edits[0]
        assert edit.before == pytest.approx(written.before, rel=1e-9)
        assert edit.after == pytest.approx(written.after, rel=1e-9)
        (plain,) = probe_scores(language_model, [request])
        assert numbers(edit.scores["immediate"]) == pytest.approx(numbers(plain), rel=1e-9)
        assert edit.written.realised == pytest.approx(written.written.realised, rel=1e-9)


def test_single_mode_edits_do_not_know_of_each_other(tmp_path):
    apart, together = (run_edits(tiny_language_model(), tmp_path, batch_size=size) for size in (1, 3))
    for index, request in enumerate(REQUESTS):
        alone = run_edits(tiny_language_model(), tmp_path, [request]).edits[0]
        assert torch.equal(alone.search.delta, apart.edits[index].search.delta)
        assert alone.scores == apart.edits[index].scores
        # Other rows in the batch change the order of sums, and so the last bits.
        shared = together.edits[index]
        torch.testing.assert_close(alone.search.delta, shared.search.delta, rtol=1e-9, atol=1e-12)
        for moment in ("base", "immediate"):
            assert numbers(alone.scores[moment]) == pytest.approx(numbers(shared.scores[moment]), rel=1e-9)


def test_sequential_mode_keeps_every_edit(language_model, tmp_path):
    before = snapshot(language_model.model)
    session = run_edits(language_model, tmp_path, sequential_edit=True)
    assert changed(language_model.model, before) == [WEIGHT]
    update = sum(written.update.left.T @ written.update.right for written in session.layers.last.written)
    torch.testing.assert_close(
        language_model.model.state_dict()[WEIGHT], before[WEIGHT] + update, rtol=1e-12, atol=1e-12
    )
    final = {edit.name: edit.scores["final"].rewrite for edit in session.edits}
    last = session.edits[-1]
    assert final[last.name] == last.scores["immediate"].rewrite
    first = session.edits[0]
    assert final[first.name] != first.scores["immediate"].rewrite  # later edits moved it
    assert [check["edits"] for check in session.measured.state_checks] == [3]


def test_a_sequential_edit_starts_from_the_edited_weights(tmp_path):
    both = run_edits(tiny_language_model(), tmp_path, REQUESTS[:2], sequential_edit=True)
    alone = run_edits(tiny_language_model(), tmp_path, REQUESTS[1:2], sequential_edit=True)
    assert not torch.allclose(both.edits[1].search.delta, alone.edits[0].search.delta)


def test_the_result_does_not_depend_on_the_global_generator(tmp_path):
    torch.manual_seed(1)
    first = run_edits(tiny_language_model(), tmp_path)
    torch.manual_seed(2)
    second = run_edits(tiny_language_model(), tmp_path)
    assert first.contexts == second.contexts
    assert torch.equal(first.edits[2].search.delta, second.edits[2].search.delta)
    assert run_edits(tiny_language_model(), tmp_path, seed=7).contexts != first.contexts


def test_a_balanced_edit_adds_its_offset_in_full_under_the_bare_prompt_and_the_contexts(tmp_path, monkeypatch):
    taken = []
    original = EditKeys.of

    def of(_, keys, *others):
        taken.append(keys)
        return original(keys, *others)

    monkeypatch.setattr(EditKeys, "of", classmethod(of))
    session = run_edits(
        tiny_language_model(), tmp_path, REQUESTS[:1], preset="balanced", mom2_adjustment=False, sequential_edit=True
    )
    (edit,), (keys,) = session.edits, taken
    bare, contexts = keys[0], keys[1:].mean(0)
    assert (bare - contexts).norm() > 0.01 * bare.norm()
    (update,) = session.layers.written[0].updates
    for key in (bare, contexts):
        torch.testing.assert_close((update.right @ key) @ update.left, edit.search.delta, rtol=1e-9, atol=1e-12)
    even = (update.right @ (2 * bare - contexts)) @ update.left  # anywhere on the line through both
    torch.testing.assert_close(even, edit.search.delta, rtol=1e-9, atol=1e-12)


def test_a_bos_changes_nothing_but_the_row(tmp_path):
    """With and without BOS the same characters are looked up and predicted."""
    model = tiny_model("llama")
    for bos in (False, True):
        language_model = LanguageModel(model, byte_level_tokenizer(bos))
        edit = run_edits(language_model, tmp_path, REQUESTS[:1]).edits[0]
        row = edit.search.encoded.rows[0]
        assert language_model.tokenizer.decode(row.target) == " Oslo"
        assert language_model.tokenizer.decode(row.ids[: row.lookup + 1], skip_special_tokens=True).endswith("Korrin")


# --- what can go wrong ------------------------------------------------------------------------------------------------


def _raise(*_, **__):
    raise RuntimeError("injected")


class _RaiseFrom:
    """Does as ``function`` does, until its n-th call."""

    def __init__(self, function, call):
        self.function, self.call, self.calls = function, call, 0

    def __call__(self, *args):
        self.calls += 1
        return _raise() if self.calls >= self.call else self.function(*args)


def _explodes_at_the_second_step(evaluate, members=(0, 1, 2)):
    """Losses that become NaN, for these edits of a batch, once their offsets have moved."""

    def explodes(self, deltas, running, contexts=None):
        losses = evaluate(self, deltas, running, contexts)
        hit = torch.tensor([member in members for member in running]) & (deltas.detach().norm(dim=1) > 0)
        return replace(losses, nll=torch.where(hit, math.nan, losses.nll))

    return explodes


class _Exploding(Callback):
    """A user's callback that fails while an edit is pending."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        _raise()


STAGES = {
    # The first pass is the engine's trial, which takes what a model raises for its answer.
    "prefix": ("rome_pl.forward.suffix_engine.run_prefix", _RaiseFrom(run_prefix, 2)),
    "optimise": ("rome_pl.search.objective.ValueObjective.__call__", _raise),
    "clamp": ("rome_pl.search.value_search.clamp_norm_", _raise),
    "solve": ("rome_pl.write.edited_weight.rank_one_update", _raise),
    "commit": ("rome_pl.callbacks.commit.session_of", _raise),
    # The targets' probabilities before the edit pass; the next are taken of what was written.
    "verify": ("rome_pl.metrics.probes.measure_targets", _RaiseFrom(measure_targets, 2)),
    "base scores": ("rome_pl.metrics.score_cache.probe_scores", _raise),
    "evaluate": ("rome_pl.metrics.probes.probe_scores", _raise),
    "ledger": ("rome_pl.editing.edit.Edit.record", _raise),
    "state check": ("rome_pl.editing.session_watch.SessionWatch.look", _raise),
    "contexts": ("rome_pl.editing.run_setup.generate_contexts", _raise),
}


# Single mode leaves no state to check.
STAGES_AND_MODES = [
    (stage, sequential)
    for stage in [*STAGES, "user callback"]
    for sequential in (False, True)
    if sequential or stage != "state check"
]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("stage", "sequential"), STAGES_AND_MODES)
def test_an_exception_anywhere_leaves_the_model_as_it_was(
    stage, sequential, batch_size, language_model, tmp_path, monkeypatch
):
    model = language_model.model
    model.model.layers[0].mlp.train()  # a state of the user's own
    model.lm_head.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before, state = snapshot(model), torch.get_rng_state()
    callbacks = lenient_callbacks()
    if stage == "user callback":
        callbacks.insert(2, _Exploding())
    else:
        name, replacement = STAGES[stage]
        monkeypatch.setattr(name, copy(replacement))  # with calls of its own to count
    if stage == "ledger":
        callbacks = [
            EditCommit(ledger=True) if isinstance(callback, EditCommit) else callback for callback in callbacks
        ]
    with pytest.raises(RuntimeError, match="injected"):
        run_edits(
            language_model,
            tmp_path,
            callbacks=callbacks,
            batch_size=batch_size,
            sequential_edit=sequential,
            **(JOINT if batch_size > 1 else {}),
        )
    # By the time the state is checked, the edits are committed.
    assert changed(model, before) == ([WEIGHT] if stage == "state check" else [])
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_run_that_ends_well_leaves_no_trace_but_the_edits(language_model, tmp_path):
    model = language_model.model
    model.model.layers[0].mlp.train()
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    run_edits(language_model, tmp_path, sequential_edit=True)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def test_earlier_edits_survive_a_later_exception(language_model, tmp_path, monkeypatch):
    calls = []
    original = EditedWeight.write

    def second_fails(self, names, assertion):
        calls.append(names)
        if len(calls) == 2:
            _raise()
        return original(self, names, assertion)

    monkeypatch.setattr(EditedWeight, "write", second_fails)
    alone = snapshot(
        run_edits(tiny_language_model(), tmp_path, REQUESTS[:1], sequential_edit=True).language_model.model
    )
    calls.clear()
    with pytest.raises(RuntimeError, match="injected"):
        run_edits(language_model, tmp_path, sequential_edit=True)
    assert changed(language_model.model, alone) == []


def test_a_loss_that_is_not_finite_skips_the_edit(language_model, tmp_path, monkeypatch):
    monkeypatch.setattr(ValueObjective, "__call__", _explodes_at_the_second_step(ValueObjective.__call__))
    before = snapshot(language_model.model)
    session = run_edits(language_model, tmp_path, sequential_edit=True)
    assert [edit.status for edit in session.edits] == [EditStatus.SKIPPED] * 3
    assert "the loss became nan at step 1" in session.edits[0].reason
    assert changed(language_model.model, before) == []
    with pytest.raises(EditError, match="record a: the loss became nan"):
        run_edits(language_model, tmp_path, on_error="stop")


def test_a_loss_that_is_not_finite_skips_its_own_edit_of_a_batch(tmp_path, monkeypatch):
    expected = run_edits(tiny_language_model(), tmp_path, batch_size=3)
    monkeypatch.setattr(ValueObjective, "__call__", _explodes_at_the_second_step(ValueObjective.__call__, [1]))
    session = run_edits(tiny_language_model(), tmp_path, batch_size=3)
    assert [edit.status for edit in session.edits] == ["applied", "skipped", "applied"]
    assert "the loss became nan at step 1" in session.edits[1].reason
    for index in (0, 2):
        torch.testing.assert_close(
            session.edits[index].search.delta, expected.edits[index].search.delta, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_failure_that_stops_the_run_is_on_record_with_its_batch(batch_size, language_model, tmp_path, monkeypatch):
    members = [1] if batch_size == 3 else [0]
    monkeypatch.setattr(ValueObjective, "__call__", _explodes_at_the_second_step(ValueObjective.__call__, members))
    callbacks = [*lenient_callbacks()[:-3], EditCommit(ledger=True)]
    with pytest.raises(EditError, match="the loss became nan"):
        run_edits(language_model, tmp_path, callbacks=callbacks, batch_size=batch_size, on_error="stop")
    lines = (tmp_path / "ledger" / "edits.jsonl").read_text(encoding="utf-8").splitlines()
    expected = ["skipped"] if batch_size == 1 else ["applied", "skipped", "applied"]
    assert [json.loads(line)["status"] for line in lines] == expected


def test_a_wanted_skip_is_no_error(language_model, tmp_path, monkeypatch):
    known = iter([[TargetMeasure(0.9, True)]])
    monkeypatch.setattr(
        "rome_pl.metrics.probes.measure_targets", lambda *arguments: next(known, None) or measure_targets(*arguments)
    )
    callbacks = [RepresentationCheck(on_known="skip"), *lenient_callbacks()[1:]]
    session = run_edits(language_model, tmp_path, REQUESTS[:2], callbacks=callbacks, on_error="stop")
    assert [edit.status for edit in session.edits] == ["skipped", "applied"]


def test_two_requests_of_one_name_are_refused(language_model, tmp_path):
    with pytest.raises(RequestError, match="record a, field 'case_id': occurs twice"):
        run_edits(language_model, tmp_path, [REQUESTS[0], REQUESTS[0]])


def test_a_second_fit_forgets_what_the_first_refused(tmp_path):
    language_model = tiny_language_model()
    language_model.encoder = TextEncoder(language_model.tokenizer, 60)
    module = RomeModule.from_language_model(language_model, **FAST)
    long = EditRequest(prompt="Miss Vane plays the", subject="Miss Vane", target_new="violin " * 30, case_id="a")
    quiet_trainer(lenient_callbacks(), tmp_path).fit(module, request_loader([long]))
    assert module.session.edits[0].status is EditStatus.SKIPPED
    quiet_trainer(lenient_callbacks(), tmp_path).fit(module, request_loader(REQUESTS[:1]))
    assert [edit.status for edit in module.session.edits] == ["applied"]


def test_a_weight_changed_from_outside_is_noticed(language_model, tmp_path):
    module = RomeModule.from_language_model(language_model, **FAST, sequential_edit=True)
    quiet_trainer(lenient_callbacks(), tmp_path).fit(module, request_loader(REQUESTS[:1]))
    with torch.no_grad():
        language_model.model.get_parameter(WEIGHT).add_(1e-3)
    with pytest.raises(RuntimeError, match="changed from outside"):
        quiet_trainer(lenient_callbacks(), tmp_path).fit(module, request_loader(REQUESTS[1:2]))


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "bf16-true", "64-true"])
def test_other_precisions_are_refused(precision, language_model, tmp_path, monkeypatch):
    module = RomeModule.from_language_model(language_model, **FAST)
    if precision == "16-mixed":  # for which Lightning takes bfloat16 on a CPU
        trainer = quiet_trainer([], tmp_path)
        monkeypatch.setattr(type(trainer), "precision", precision)
    else:
        trainer = quiet_trainer([], tmp_path, precision=precision)
    with pytest.raises(OptionError, match=r"model\.dtype"):
        trainer.fit(module, request_loader(REQUESTS))


def test_mixed_precision_optimises_values_and_measures_as_ever(tmp_path):
    sessions = []
    for precision in ("bf16-mixed", "32-true"):
        module = RomeModule.from_language_model(tiny_language_model(dtype=torch.float32), **FAST)
        quiet_trainer(lenient_callbacks(), tmp_path, precision=precision).fit(module, request_loader(REQUESTS))
        sessions.append(module.session)
    for edit, plain in zip(*(session.edits for session in sessions), strict=True):
        assert edit.status == "applied"
        assert edit.before == plain.before
        assert torch.equal(edit.search.keys.mean, plain.search.keys.mean)
        assert edit.search.delta.dtype == torch.float32
        assert not torch.equal(edit.search.delta, plain.search.delta)
        assert edit.steps[0].nll == pytest.approx(plain.steps[0].nll, rel=0.05)
        assert edit.scores["immediate"].rewrite[0] == pytest.approx(math.log(edit.after), rel=1e-6)


def test_a_pad_id_beyond_the_vocabulary_is_harmless(tmp_path):
    """A pad token added to the tokenizer alone."""
    model, tokenizer = tiny_model("llama"), byte_level_tokenizer()
    plain = run_edits(LanguageModel(model, tokenizer), tmp_path, REQUESTS[:1]).edits[0]
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    padded = run_edits(LanguageModel(model, tokenizer), tmp_path, REQUESTS[:1]).edits[0]
    torch.testing.assert_close(padded.search.delta, plain.search.delta, rtol=1e-9, atol=1e-12)


def test_a_request_that_does_not_fit_is_skipped_and_the_others_go_on(tmp_path):
    language_model = tiny_language_model()
    language_model.encoder = TextEncoder(language_model.tokenizer, 60)
    long = EditRequest(prompt="Miss Vane plays the", subject="Miss Vane", target_new="violin " * 30, case_id="long")
    session = run_edits(language_model, tmp_path, [REQUESTS[1], long, REQUESTS[2]])
    assert [edit.status for edit in session.edits] == ["applied", "skipped", "applied"]
    assert "record long, field 'target_new'" in session.edits[1].reason


@pytest.mark.parametrize("batch_size", [1, 3])
def test_verification_rejects_and_restores(batch_size, language_model, tmp_path):
    callbacks = [RepresentationCheck(), RankOneWriter(), Verification(0.999), ProbeEvaluation(), EditCommit()]
    before = snapshot(language_model.model)
    options = {"sequential_edit": True} | (JOINT if batch_size > 1 else {})
    session = run_edits(language_model, tmp_path, callbacks=callbacks, batch_size=batch_size, **options)
    assert [edit.status for edit in session.edits] == [EditStatus.REJECTED] * 3
    assert "below 0.999" in session.edits[0].reason
    assert changed(language_model.model, before) == []
    # Rejected edits are scored too, with what the model says without them.
    assert session.edits[0].scores["final"] == session.edits[0].scores["base"]


def test_a_writer_after_its_verifier_is_pointed_out(language_model, tmp_path):
    with pytest.raises(RuntimeError, match="list RankOneWriter before it"):
        run_edits(language_model, tmp_path, callbacks=[Verification(), RankOneWriter(), EditCommit()])


def test_a_second_epoch_is_refused(language_model, tmp_path):
    module = RomeModule.from_language_model(language_model, **FAST)
    with pytest.raises(ValueError, match="max_epochs=1"):
        quiet_trainer([], tmp_path, max_epochs=2).fit(module, request_loader(REQUESTS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_original_weight": True}, "sequential_edit: false"),
        ({"layers": [1, 1]}, "several different ones"),
        ({"layers": [9]}, "has 3 layers"),
        ({"v_lr": -1.0}, "v_lr"),
        ({"v_num_grad_steps": 0}, "v_num_grad_steps"),
        ({"preset": "mend"}, "preset"),
        ({"contexts_per_step": -1}, "contexts_per_step"),
    ],
)
def test_bad_options_say_what_to_do(options, message, language_model):
    with pytest.raises(ValueError, match=message):
        RomeModule.from_language_model(language_model, **{**FAST, **options})


def test_the_optimiser_comes_from_outside_with_the_learning_rate_of_the_method(language_model, tmp_path):
    module = RomeModule.from_language_model(
        language_model, **FAST, optimizer=lambda p: torch.optim.SGD(p, momentum=0.5)
    )
    quiet_trainer(lenient_callbacks(), tmp_path).fit(module, request_loader(REQUESTS[:1]))
    optimizer = module.optimizers().optimizer
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == FAST["v_lr"]
    assert optimizer.param_groups[0]["momentum"] == 0.5
