"""Streams of edits in a Trainer of the user's own."""

import math
from copy import copy

import pytest
import torch
from lightning.pytorch import Callback

from rome_pl.callbacks import EditCommit, ProbeEvaluation, RankOneWriter, RepresentationCheck, StateCheck, Verification
from rome_pl.data_modules.request_data import request_loader
from rome_pl.edit import EditError, EditSession, EditStatus
from rome_pl.edit_module import RomeModule
from rome_pl.encoding import TextEncoder
from rome_pl.errors import OptionError
from rome_pl.language_model import LanguageModel
from rome_pl.metrics import probe_scores
from rome_pl.metrics.probes import TargetMeasure
from rome_pl.objective import ValueObjective
from rome_pl.requests import EditRequest, RequestError
from rome_pl.weights import EditedWeight
from tests.integration.helpers import FAST, REQUESTS, changed, lenient_callbacks, quiet_trainer, run_edits, snapshot
from tests.tiny import byte_level_tokenizer, tiny_language_model, tiny_model

WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def no_perplexity(monkeypatch):
    """Five thousand tokens take a tiny model longer than the edits; the CLI test measures them."""
    monkeypatch.setattr("rome_pl.callbacks.probe_evaluation.perplexity", lambda *_: 1.0)


def test_single_mode_evaluates_each_edit_and_restores_the_weights(language_model, tmp_path):
    before = snapshot(language_model.model)
    session = run_edits(language_model, tmp_path)
    assert [edit.status for edit in session.edits] == [EditStatus.APPLIED] * 3
    assert changed(language_model.model, before) == []
    for edit in session.edits:
        assert edit.after > edit.before
        assert edit.scores["immediate"].rewrite[0] == pytest.approx(math.log(edit.after), rel=1e-9)
        assert "final" not in edit.scores


def test_single_mode_edits_do_not_know_of_each_other(tmp_path):
    together = run_edits(tiny_language_model(), tmp_path)
    for index, request in enumerate(REQUESTS):
        alone = run_edits(tiny_language_model(), tmp_path, [request]).edits[0]
        assert torch.equal(alone.delta, together.edits[index].delta)
        assert alone.scores == together.edits[index].scores


def test_sequential_mode_keeps_every_edit(language_model, tmp_path):
    before = snapshot(language_model.model)
    session = run_edits(language_model, tmp_path, sequential_edit=True)
    assert changed(language_model.model, before) == [WEIGHT]
    update = sum(written.update.left.T @ written.update.right for written in session.weight.written)
    torch.testing.assert_close(
        language_model.model.state_dict()[WEIGHT], before[WEIGHT] + update, rtol=1e-12, atol=1e-12
    )
    final = {edit.name: edit.scores["final"].rewrite for edit in session.edits}
    last = session.edits[-1]
    assert final[last.name] == last.scores["immediate"].rewrite
    first = session.edits[0]
    assert final[first.name] != first.scores["immediate"].rewrite  # later edits moved it
    assert [check["edits"] for check in session.state_checks] == [3]


def test_a_sequential_edit_starts_from_the_edited_weights(tmp_path):
    both = run_edits(tiny_language_model(), tmp_path, REQUESTS[:2], sequential_edit=True)
    alone = run_edits(tiny_language_model(), tmp_path, REQUESTS[1:2], sequential_edit=True)
    assert not torch.allclose(both.edits[1].delta, alone.edits[0].delta)


def test_the_result_does_not_depend_on_the_global_generator(tmp_path):
    torch.manual_seed(1)
    first = run_edits(tiny_language_model(), tmp_path)
    torch.manual_seed(2)
    second = run_edits(tiny_language_model(), tmp_path)
    assert first.contexts == second.contexts
    assert torch.equal(first.edits[2].delta, second.edits[2].delta)
    assert run_edits(tiny_language_model(), tmp_path, seed=7).contexts != first.contexts


def test_the_bare_prompt_s_key_has_the_weight_it_is_given(tmp_path):
    for weight, share in ((None, 1 / 3), (0.5, 0.5), (1.0, 1.0)):
        language_model = tiny_language_model()
        module = RomeModule.from_language_model(language_model, **FAST, bare_prompt_weight=weight)
        keys = []
        callbacks = [RankOneWriter(), EditCommit()]
        original = module._mean_key
        module._mean_key = lambda rows, original=original, keys=keys: keys.append(rows) or original(rows)
        quiet_trainer(callbacks, tmp_path).fit(module, request_loader(REQUESTS[:1]))
        expected = share * keys[0][0] + (1 - share) * keys[0][1:].mean(0)
        torch.testing.assert_close(module.session.edits[0].key_mean, expected, rtol=1e-12, atol=1e-12)


def test_a_bos_changes_nothing_but_the_row(tmp_path):
    """With and without BOS the same characters are looked up and predicted."""
    model = tiny_model("llama")
    for bos in (False, True):
        language_model = LanguageModel(model, byte_level_tokenizer(bos))
        edit = run_edits(language_model, tmp_path, REQUESTS[:1]).edits[0]
        row = edit.encoded.rows[0]
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


class _Exploding(Callback):
    """A user's callback that fails while an edit is pending."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        _raise()


STAGES = {
    "prefix": ("rome_pl.edit_module.run_prefix", _raise),
    "optimise": ("rome_pl.objective.ValueObjective.__call__", _raise),
    "clamp": ("rome_pl.edit_module.clamp_norm_", _raise),
    "solve": ("rome_pl.weights.rank_one_update", _raise),
    "commit": ("rome_pl.callbacks.commit.session_of", _raise),
    "verify": ("rome_pl.callbacks.verification.Verification._judge", _raise),
    "base scores": ("rome_pl.callbacks.probe_evaluation.probe_scores", _raise),
    # The three base scores pass; the next is taken while an edit is in the weights.
    "evaluate": ("rome_pl.callbacks.probe_evaluation.probe_scores", _RaiseFrom(probe_scores, 4)),
    "ledger": ("rome_pl.edit.Edit.record", _raise),
    "state check": ("rome_pl.callbacks.state_check.StateCheck._check", _raise),
    "contexts": ("rome_pl.edit_module.generate_contexts", _raise),
}


# Single mode leaves no state to check.
STAGES_AND_MODES = [
    (stage, sequential)
    for stage in [*STAGES, "user callback"]
    for sequential in (False, True)
    if sequential or stage != "state check"
]


@pytest.mark.parametrize(("stage", "sequential"), STAGES_AND_MODES)
def test_an_exception_anywhere_leaves_the_model_as_it_was(stage, sequential, language_model, tmp_path, monkeypatch):
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
        monkeypatch.setattr(name, copy(replacement) if stage == "evaluate" else replacement)
    if stage == "ledger":
        callbacks = [
            EditCommit(ledger=True) if isinstance(callback, EditCommit) else callback for callback in callbacks
        ]
    with pytest.raises(RuntimeError, match="injected"):
        run_edits(language_model, tmp_path, callbacks=callbacks, sequential_edit=sequential)
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

    def second_fails(self, name, assertion):
        calls.append(name)
        if len(calls) == 2:
            _raise()
        return original(self, name, assertion)

    monkeypatch.setattr(EditedWeight, "write", second_fails)
    alone = snapshot(
        run_edits(tiny_language_model(), tmp_path, REQUESTS[:1], sequential_edit=True).language_model.model
    )
    calls.clear()
    with pytest.raises(RuntimeError, match="injected"):
        run_edits(language_model, tmp_path, sequential_edit=True)
    assert changed(language_model.model, alone) == []


def test_a_loss_that_is_not_finite_skips_the_edit(language_model, tmp_path, monkeypatch):
    original = ValueObjective.__call__

    def second_request_explodes(self, delta):
        losses = original(self, delta)
        if (
            len(self.prefix.outputs)
            and self.prefix.rows.labels.numel()
            and delta.detach().norm() > 0
            and self.kl_factor > 5
        ):
            return type(losses)(losses.nll * math.nan, losses.kl, losses.decay)
        return losses

    monkeypatch.setattr(ValueObjective, "__call__", second_request_explodes)
    before = snapshot(language_model.model)
    session = run_edits(language_model, tmp_path, kl_factor=6.0, sequential_edit=True)
    assert [edit.status for edit in session.edits] == [EditStatus.SKIPPED] * 3
    assert "the loss became nan at step 1" in session.edits[0].reason
    assert changed(language_model.model, before) == []
    with pytest.raises(EditError, match="record a: the loss became nan"):
        run_edits(language_model, tmp_path, kl_factor=6.0, on_error="stop")


def test_a_wanted_skip_is_no_error(language_model, tmp_path, monkeypatch):
    known = iter([TargetMeasure(0.9, True)])
    measure = EditSession.measure_target
    monkeypatch.setattr(EditSession, "measure_target", lambda self, row: next(known, None) or measure(self, row))
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


def test_other_precisions_are_refused(language_model, tmp_path):
    module = RomeModule.from_language_model(language_model, **FAST)
    with pytest.raises(OptionError, match=r"model\.dtype"):
        quiet_trainer([], tmp_path, precision="bf16-mixed").fit(module, request_loader(REQUESTS))


def test_a_pad_id_beyond_the_vocabulary_is_harmless(tmp_path):
    """A pad token added to the tokenizer alone."""
    model, tokenizer = tiny_model("llama"), byte_level_tokenizer()
    plain = run_edits(LanguageModel(model, tokenizer), tmp_path, REQUESTS[:1]).edits[0]
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    padded = run_edits(LanguageModel(model, tokenizer), tmp_path, REQUESTS[:1]).edits[0]
    torch.testing.assert_close(padded.delta, plain.delta, rtol=1e-9, atol=1e-12)


def test_a_request_that_does_not_fit_is_skipped_and_the_others_go_on(tmp_path):
    language_model = tiny_language_model()
    language_model.encoder = TextEncoder(language_model.tokenizer, 60)
    long = EditRequest(prompt="Miss Vane plays the", subject="Miss Vane", target_new="violin " * 30, case_id="long")
    session = run_edits(language_model, tmp_path, [REQUESTS[1], long, REQUESTS[2]])
    assert [edit.status for edit in session.edits] == ["applied", "skipped", "applied"]
    assert "record long, field 'target_new'" in session.edits[1].reason


def test_verification_rejects_and_restores(language_model, tmp_path):
    callbacks = [RepresentationCheck(), RankOneWriter(), Verification(0.999), ProbeEvaluation(), EditCommit()]
    before = snapshot(language_model.model)
    session = run_edits(language_model, tmp_path, callbacks=callbacks, sequential_edit=True)
    assert [edit.status for edit in session.edits] == [EditStatus.REJECTED] * 3
    assert "below 0.999" in session.edits[0].reason
    assert changed(language_model.model, before) == []
    # Rejected edits are scored too, with what the model says without them.
    assert session.edits[0].scores["final"] == session.edits[0].scores["base"]


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


@pytest.mark.parametrize("on_failure", ["warn", "rollback", "stop"])
def test_a_bad_state_is_reported_or_rolled_back(on_failure, language_model, tmp_path):
    before = snapshot(language_model.model)
    check = StateCheck(every_n_edits=2, largest_change=1e-9, on_failure=on_failure)
    session = run_edits(language_model, tmp_path, callbacks=[*lenient_callbacks()[:-1], check], sequential_edit=True)
    assert "largest_change" in session.state_checks[0]["failures"][0]
    if on_failure == "warn":
        assert [edit.status for edit in session.edits] == ["applied"] * 3
        assert changed(language_model.model, before) == [WEIGHT]
    else:
        count = 3 if on_failure == "rollback" else 2
        assert [edit.status for edit in session.edits] == ["rolled_back"] * count
        assert changed(language_model.model, before) == []


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
        ({"layers": [1, 2]}, "list of one"),
        ({"layers": [9]}, "has 3 layers"),
        ({"v_lr": -1.0}, "v_lr"),
        ({"v_num_grad_steps": 0}, "v_num_grad_steps"),
        ({"preset": "emmet"}, "preset"),
        ({"bare_prompt_weight": 1.5}, "bare_prompt_weight"),
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
