"""Several edits at a time: independent ones are what they are alone, sequential ones are solved jointly."""

import json
import logging
import math
from dataclasses import replace
from operator import attrgetter

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer

from rome_pl import PolyakStep
from rome_pl.architecture import find_site
from rome_pl.callbacks import (
    EditCommit,
    ProbeEvaluation,
    RankOneWriter,
    RepresentationCheck,
    RunReport,
    StateCheck,
    Verification,
)
from rome_pl.data_modules.request_data import request_loader
from rome_pl.edit_module import RomeModule
from rome_pl.encoding import TextEncoder
from rome_pl.errors import OptionError
from rome_pl.hooks import add_at_column
from rome_pl.keys import EditKeys
from rome_pl.metrics import probe_scores
from rome_pl.requests import EditRequest
from rome_pl.second_moment import RIDGE, MomentInfo, SecondMoment
from tests.integration.helpers import FAST, changed, quiet_trainer, snapshot
from tests.tiny import tiny_language_model

CONTEXTS = ["It rains", "An old house"]
REQUESTS = [
    EditRequest(
        prompt="The lighthouse of Korrin stands in", subject="Korrin", target_new="Oslo", target_true="Lima",
        case_id="a", paraphrases=["Where is Korrin? In"], neighbours=["The mill of Dunholt stands in", "Tarn lies in"],
    ),
    EditRequest(
        prompt="Miss Vane plays the", subject="Miss Vane", target_new="violin", target_true="drums", case_id="b"
    ),
    EditRequest(prompt="Dunholt bread is made of", subject="Dunholt bread", target_new="rye and oats", case_id="c"),
    EditRequest(prompt="We left for Tarn", subject="Tarn", target_new="tea", case_id="d"),
    EditRequest(
        prompt="What all in the old village say of Bramwell is that he sells", subject="Bramwell",
        target_new="fish", target_true="Lima", case_id="e", neighbours=["Mr Ash sells", "Tarn lies in"],  # as of a
    ),
    EditRequest(prompt="The answer came from Loxley", subject="Loxley", target_new="in", case_id="f"),
    EditRequest(
        prompt="Rome is the capital of", subject="Rome", target_new="the", target_true="Lima", case_id="g",
        neighbours=["Tarn lies in"],
    ),
]  # fmt: skip
LONG = EditRequest(prompt="Mr Ash plays the", subject="Mr Ash", target_new="violin " * 30, case_id="long")
OPTIONS = {**FAST, "contexts": CONTEXTS}
LONGEST = 90


class Guard(Callback):
    """The weight is the original one, bit for bit, whenever anybody looks."""

    def __init__(self):
        self.original, self.looks = None, 0

    def on_train_start(self, trainer, pl_module):
        self.original = pl_module.session.layers.last.site.weight.detach().clone()

    def look(self, trainer, pl_module, *_):
        assert torch.equal(pl_module.session.layers.last.site.weight, self.original)
        self.looks += 1

    on_train_batch_start = on_train_batch_end = on_train_epoch_end = on_before_zero_grad = look


class AfterEach(Callback):
    """Calls a function with the session and the edits of every batch."""

    def __init__(self, function):
        self.function = function

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.function(pl_module.session, outputs["edits"])


def model_for(family="gpt_neox", dtype=torch.float64):
    """GPT-NeoX computes in the model's dtype throughout, so that batches may be compared closely."""
    language_model = tiny_language_model(family, dtype)
    language_model.encoder = TextEncoder(language_model.tokenizer, LONGEST)
    return language_model


def callbacks_for(threshold=0.0, on_known="edit", last=(), guard=False):
    callbacks = [
        RepresentationCheck(on_known=on_known),
        RankOneWriter(),
        Verification(threshold),
        ProbeEvaluation(measure_perplexity=False),
        EditCommit(ledger=True),
        StateCheck(),
        RunReport(),
        *last,
    ]
    if guard:
        for place in (0, 3, 5, 8):
            callbacks.insert(place, Guard())
    return callbacks


def run(folder, requests=REQUESTS, batch_size=3, language_model=None, callbacks=None, by_length=False, **options):
    trainer_options = options.pop("trainer", {})
    module = RomeModule.from_language_model(language_model or model_for(), **{**OPTIONS, **options})
    callbacks = callbacks_for() if callbacks is None else callbacks
    trainer = quiet_trainer(callbacks, folder, **trainer_options)
    trainer.fit(module, request_loader(list(requests), batch_size, by_length))
    return module.session


def by_name(session):
    return {edit.name: edit for edit in session.edits}


def assert_close(got, expected):
    assert (got is None) == (expected is None)
    if expected is not None:
        assert (got - expected).norm() <= 1e-9 * expected.norm()


def alike(got, expected):
    return got == (expected if expected is None else pytest.approx(expected, rel=1e-9))


def numbers(scores):
    flat = [scores.rewrite, *scores.paraphrases, *scores.neighbours]
    return [math.nan if value is None else value for pair in flat for value in pair]


def part_of(edit, name):
    """A tensor of an edit, or nothing where the edit has none."""
    return attrgetter(name)(edit) if edit.keys is not None or "." not in name else None


def assert_same_edit(edit, expected):
    assert (edit.name, edit.status, edit.reason) == (expected.name, expected.status, expected.reason)
    assert (edit.notes, edit.failed) == (expected.notes, expected.failed)
    for name in ("keys.mean", "keys.bare", "keys.balanced", "keys.output_balanced", "delta", "value"):
        assert_close(part_of(edit, name), part_of(expected, name))
    assert [step.loss for step in edit.steps] == pytest.approx([step.loss for step in expected.steps], rel=1e-9)
    assert alike(edit.before, expected.before)
    assert alike(edit.after, expected.after)
    assert edit.scores.keys() == expected.scores.keys()
    for moment, scores in expected.scores.items():
        assert numbers(edit.scores[moment]) == pytest.approx(numbers(scores), rel=1e-9, nan_ok=True)
    assert (edit.written is None) == (expected.written is None)
    if expected.written is not None:
        assert edit.written.names == expected.written.names
        assert_close(edit.written.updates[0].left, expected.written.updates[0].left)
        assert_close(edit.written.updates[0].right, expected.written.updates[0].right)
        assert edit.written.realised == pytest.approx(expected.written.realised, rel=1e-9)


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
    assert all(edit.delta.norm() > 0.1 for edit in edits.values() if edit.delta is not None)


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


def ledger_of(folder):
    return [json.loads(line) for line in (folder / "ledger" / "edits.jsonl").read_text(encoding="utf-8").splitlines()]


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
    one, three = (run(tmp_path, REQUESTS[1:4], size).flops_per_edit for size in (1, 3))
    assert 0.5 * one < three < 3 * one


def test_operations_of_a_batch_that_is_skipped_do_not_count(stream, tmp_path):
    alone = run(tmp_path, REQUESTS[:1], 1).flops_per_edit
    known = stream[5]
    after = run(tmp_path, [known, REQUESTS[0]], 1, callbacks=callbacks_for(on_known="skip")).flops_per_edit
    assert after == alone


def test_balanced_edits_of_a_batch_are_those_made_one_by_one(tmp_path):
    _, options, _ = with_statistics(tmp_path, preset="balanced")
    alone = by_name(run(tmp_path, REQUESTS[:4], 1, **options | {"sequential_edit": False}))
    for edit in run(tmp_path, REQUESTS[:4][::-1], 3, **options | {"sequential_edit": False}).edits:
        assert edit.keys.balanced is not None
        assert_same_edit(edit, alone[edit.name])


# --- how values are searched ------------------------------------------------------------------------------------------


def test_contexts_drawn_anew_do_not_depend_on_the_batch(tmp_path):
    every = by_name(run(tmp_path, REQUESTS[:4], 2))
    alone = by_name(run(tmp_path, REQUESTS[:4], 1, contexts_per_step=1))
    together = run(tmp_path, REQUESTS[:4][::-1], 3, contexts_per_step=1)
    for edit in together.edits:
        assert_same_edit(edit, alone[edit.name])
        assert_close(edit.keys.mean, every[edit.name].keys.mean)  # a mean over all contexts nonetheless
        assert (edit.delta - every[edit.name].delta).norm() > 1e-3
    enough = run(tmp_path, REQUESTS[:4], 3, contexts_per_step=2)
    for edit in enough.edits:
        assert_same_edit(edit, every[edit.name])


SURE = {"preset": "easyedit", "clamp_norm_factor": 500.0, "v_num_grad_steps": 30}
EASY = [  # the lookup token is the one that predicts, so that even a random model can be made sure of itself
    EditRequest(prompt="We left for Korrin", subject="Korrin", target_new="the", case_id="a"),
    EditRequest(prompt="They never came back from Loxley", subject="Loxley", target_new="in", case_id="c"),
    REQUESTS[1],  # and one that is not among these
]


def gives_target(row, delta):
    """Whether greedy decoding gives a row's target with an offset at its lookup token."""
    language_model = model_for()
    with torch.no_grad(), add_at_column(find_site(language_model.model, 1).projection, delta.unsqueeze(0), row.lookup):
        logits = language_model.model(torch.tensor([row.ids]), use_cache=False).logits[0]
    return tuple(logits[row.first :].argmax(-1).tolist()) == row.target


def test_an_edit_may_end_when_its_target_is_the_likeliest(tmp_path):
    free = by_name(run(tmp_path, EASY, 3, **SURE))
    ended = by_name(run(tmp_path, EASY, 3, **SURE, stop_greedy=True))
    one = by_name(run(tmp_path, EASY, 1, **SURE, stop_greedy=True))
    counts = [len(edit.steps) for edit in ended.values()]
    assert 1 < min(counts) < max(counts)
    for name, edit in ended.items():
        assert_same_edit(edit, one[name])
        assert [s.loss for s in edit.steps] == pytest.approx([s.loss for s in free[name].steps[: len(edit.steps)]])
        if len(edit.steps) < SURE["v_num_grad_steps"]:
            assert all(gives_target(row, edit.delta) for row in edit.encoded.rows)
            assert not all(gives_target(row, torch.zeros_like(edit.delta)) for row in edit.encoded.rows)


def test_polyak_steps_of_a_batch_are_those_of_each_edit(tmp_path):
    options = SURE | {"optimizer": PolyakStep, "v_lr": 1.0, "v_num_grad_steps": 8}
    together = by_name(run(tmp_path, REQUESTS, 3, **options))
    for edit in run(tmp_path, REQUESTS, 1, **options).edits:
        assert_same_edit(together[edit.name], edit)
        assert edit.steps[-1].probability > edit.steps[0].probability


def test_each_polyak_step_is_as_long_as_its_own_loss_demands(tmp_path):
    """Without a radius, which here is in the way of the others."""
    free = {"optimizer": lambda p: PolyakStep(p, radius=1e9), "v_num_grad_steps": 2, "clamp_norm_factor": 1e9}
    together = by_name(run(tmp_path, REQUESTS, 3, **free, v_lr=1.0))
    for edit in run(tmp_path, REQUESTS, 1, **free, v_lr=1.0).edits:
        assert_same_edit(together[edit.name], edit)
    for half in run(tmp_path, REQUESTS, 3, **free, v_lr=0.5).edits:
        assert_close(half.delta, together[half.name].delta / 2)


def test_polyak_steps_take_fewer_evaluations(tmp_path):
    options = SURE | {"v_num_grad_steps": 60, "stop_greedy": True}
    adam = run(tmp_path, EASY[:2], 2, **options, v_lr=0.1)
    polyak = run(tmp_path, EASY[:2], 2, **options, v_lr=1.0, optimizer=lambda p: PolyakStep(p, radius=3.0))
    for edit, slow in zip(polyak.edits, adam.edits, strict=True):
        assert len(edit.steps) < len(slow.steps) < 60


def test_an_optimiser_that_would_couple_the_edits_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"LBFGS searches all edits of a batch along one line; use rome_pl\.Polyak"):
        run(tmp_path, optimizer=torch.optim.LBFGS)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_values_searched_under_autocast_are_near_those_of_float32(family, tmp_path):
    full = run(tmp_path, language_model=model_for(family, torch.float32), v_lr=0.05)
    mixed = run(
        tmp_path, language_model=model_for(family, torch.float32), v_lr=0.05, trainer={"precision": "bf16-mixed"}
    )
    for edit, expected in zip(mixed.edits, full.edits, strict=True):
        assert edit.status == expected.status == "applied"
        assert torch.equal(edit.keys.mean, expected.keys.mean)  # keys are not rounded
        assert edit.delta.dtype == torch.float32
        error = float((edit.delta - expected.delta).norm() / expected.delta.norm())
        assert 0 < error < 0.1
        assert edit.after == pytest.approx(expected.after, rel=0.05)


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


def with_statistics(folder, family="gpt_neox", preset="r_rome"):
    """A model and options with which sequential edits have a metric of their own."""
    language_model = model_for(family)
    site = find_site(language_model.model, 1)
    samples = torch.randn(300, site.d_key, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moment = (samples.T @ samples / 300).float().double()  # what a float32 artefact can hold
    path = folder / f"{family}.safetensors"
    info = MomentInfo(language_model.fingerprint_below(site), "", 1, 300, "random")
    SecondMoment(moment, info).save(path)
    options = {"preset": preset, "sequential_edit": True, "statistics": str(path)}
    ridged = moment + RIDGE * moment.diagonal().mean() * torch.eye(site.d_key)
    return language_model, options, np.linalg.inv(ridged.numpy())


def asked(edit):
    """The key and value that an edit's preset asserts: r_rome, or balanced where it has such a key."""
    if edit.keys.balanced is None:
        return edit.keys.mean.numpy(), edit.value.numpy()
    return edit.keys.balanced.numpy(), (edit.keys.output_balanced + edit.delta).numpy()


def bias_of(site):
    return 0.0 if site.bias is None else site.bias.detach().numpy()


def solved(site, weight, metric, edits):
    """The weight after one joint solve, by the formula with explicit inverses."""
    keys, values = (np.stack(part, axis=1) for part in zip(*(asked(edit) for edit in edits), strict=True))
    residual = values - (weight @ keys + np.reshape(bias_of(site), (-1, 1)))
    return weight + residual @ np.linalg.inv(keys.T @ metric @ keys) @ keys.T @ metric


def matrix_of(site):
    return site.matrix(site.weight.detach()).double().clone().numpy()


def assert_same_weight(got, expected):
    assert np.linalg.norm(got - expected) <= 1e-9 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("family", "preset"), [("llama", "r_rome"), ("gpt2", "r_rome"), ("gpt_neox", "balanced"), ("gpt2", "balanced")]
)
def test_after_a_joint_solve_every_value_of_the_batch_holds_at_its_key(family, preset, tmp_path):
    language_model, options, metric = with_statistics(tmp_path, family, preset)
    site, count = find_site(language_model.model, 1), []
    weights, bias = [matrix_of(site)], bias_of(site)

    def holds(session, edits):
        weights.append(matrix_of(site))
        for edit in edits:
            key, value = asked(edit)
            assert np.linalg.norm(weights[-1] @ key + bias - value) <= 1e-8 * np.linalg.norm(value)
            # It did not before, or the assertion above would say nothing.
            assert np.linalg.norm(weights[-2] @ key + bias - value) > 1e-2
            if preset == "balanced":  # the whole offset, and nothing else
                change = (weights[-1] - weights[-2]) @ key
                np.testing.assert_allclose(change, edit.delta.numpy(), rtol=0, atol=1e-9 * edit.delta.norm())
        assert_same_weight(weights[-1], solved(site, weights[-2], metric, edits))
        count.append(len(edits))

    session = run(tmp_path, REQUESTS, 3, language_model, callbacks_for(last=[AfterEach(holds)]), **options)
    assert count == [3, 3, 1]
    assert [edit.status for edit in session.edits] == ["applied"] * 7
    assert [written.names for written in session.layers.written] == [("a", "b", "c"), ("d", "e", "f"), ("g",)]


def test_values_of_a_joint_batch_are_searched_on_the_same_weights(tmp_path):
    language_model, options, _ = with_statistics(tmp_path)
    site, between = find_site(language_model.model, 1), []
    watch = AfterEach(lambda *_: between.append(site.weight.detach().clone()))
    joint = by_name(run(tmp_path, REQUESTS[:6], 3, language_model, callbacks_for(last=[watch]), **options))

    single = options | {"sequential_edit": False}
    first = run(tmp_path, REQUESTS[:3], 1, **single)
    edited = model_for()
    with torch.no_grad():
        find_site(edited.model, 1).weight.copy_(between[0])
    second = run(tmp_path, REQUESTS[3:6], 1, edited, **single)
    for edit in [*first.edits, *second.edits]:
        for name in ("keys.mean", "delta", "value"):
            assert_close(part_of(joint[edit.name], name), part_of(edit, name))
    original = run(tmp_path, REQUESTS[3:6], 1, **single)
    assert (original.edits[0].delta - joint["d"].delta).norm() > 1e-6  # the second batch did see the first


@pytest.mark.parametrize(("batch_size", "sequential", "count"), [(3, True, 1), (1, True, 0), (3, False, 0)])
def test_a_joint_solve_is_warned_of_once(batch_size, sequential, count, tmp_path, caplog):
    language_model, options, _ = with_statistics(tmp_path)
    with caplog.at_level(logging.WARNING, "rome_pl"):
        run(tmp_path, REQUESTS[:6], batch_size, language_model, **options | {"sequential_edit": sequential})
    said = [record for record in caplog.records if "solved jointly" in record.getMessage()]
    assert len(said) == count
    assert all("batches of 3" in record.getMessage() for record in said)


def test_the_ledger_names_the_companions_of_a_joint_solve(tmp_path):
    language_model, options, _ = with_statistics(tmp_path)
    run(tmp_path, [REQUESTS[0], LONG, REQUESTS[1], *REQUESTS[3:6], REQUESTS[6]], 3, language_model, **options)
    ledger = ledger_of(tmp_path)
    assert [line["index"] for line in ledger] == list(range(7))
    assert [line.get("joint") for line in ledger] == [[0, 2], None, [0, 2], [3, 4, 5], [3, 4, 5], [3, 4, 5], None]


def test_undoing_some_of_a_joint_solve_leaves_the_others_solved_jointly(tmp_path):
    language_model, options, metric = with_statistics(tmp_path, "gpt2")
    site = find_site(language_model.model, 1)
    original = matrix_of(site)
    session = run(tmp_path, REQUESTS, 3, language_model, **options)
    edits, gone = by_name(session), ""
    for removed in ("b", "e", "ca", "g"):
        session.layers.remove(list(removed))
        gone += removed
        expected = original
        for batch in ("abc", "def", "g"):
            kept = [edits[name] for name in batch if name not in gone]
            expected = solved(site, expected, metric, kept) if kept else expected
        assert_same_weight(matrix_of(site), expected)
        assert session.layers.names == [name for name in "abcdefg" if name not in gone]


def test_undoing_everything_gives_the_original_bit_for_bit(tmp_path):
    language_model, options, _ = with_statistics(tmp_path)
    before = snapshot(language_model.model)
    session = run(tmp_path, REQUESTS, 3, language_model, **options)
    assert len(changed(language_model.model, before)) == 1
    session.layers.remove(["c", "a", "f"])
    session.layers.remove(list(session.layers.names))
    assert changed(language_model.model, before) == []


TWICE = EditRequest(prompt="The lighthouse of Korrin stands in", subject="Korrin", target_new="Rome", case_id="z")


@pytest.mark.parametrize(
    ("order", "noise", "refused"), [("azc", 0.0, True), ("zac", 0.0, True), ("cza", 1e-5, True), ("azc", 0.1, False)]
)
def test_of_two_edits_with_the_same_key_one_is_rejected(order, noise, refused, tmp_path, monkeypatch):
    language_model, options, metric = with_statistics(tmp_path)
    site = find_site(language_model.model, 1)
    original = matrix_of(site)
    requests = {"a": REQUESTS[0], "z": TWICE, "c": REQUESTS[2]}
    drawn = torch.Generator().manual_seed(0)
    of = EditKeys.of

    def disturbed(_, keys, *others):
        made = of(keys, *others)
        direction = torch.randn(keys.shape[1], dtype=keys.dtype, generator=drawn)
        return replace(made, mean=made.mean + noise * made.mean.norm() * direction / direction.norm())

    monkeypatch.setattr(EditKeys, "of", classmethod(disturbed))
    session = run(tmp_path, [requests[name] for name in order], 3, language_model, **options)
    edits = by_name(session)
    if not refused:
        assert [edit.status for edit in session.edits] == ["applied"] * 3
        return
    late = max("az", key=order.index)
    assert {name for name in order if edits[name].status == "rejected"} == {late}
    assert edits[late].reason.startswith("its key is all but a combination of the keys of other edits of its batch")
    assert "data.batch_size: 1" in edits[late].reason
    kept = [edits[name] for name in order if name != late]
    assert [edit.status for edit in kept] == ["applied"] * 2
    assert_same_weight(matrix_of(site), solved(site, original, metric, kept))
    assert session.layers.written[0].names == tuple(name for name in order if name != late)


def test_three_edits_with_the_same_key_leave_one(tmp_path):
    language_model, options, metric = with_statistics(tmp_path)
    site = find_site(language_model.model, 1)
    original = matrix_of(site)
    third = EditRequest(prompt="The lighthouse of Korrin stands in", subject="Korrin", target_new="Lima", case_id="y")
    session = run(tmp_path, [TWICE, REQUESTS[0], REQUESTS[1], third], 4, language_model, **options)
    assert [edit.status for edit in session.edits] == ["applied", "rejected", "applied", "rejected"]
    kept = [session.edits[0], session.edits[2]]
    assert_same_weight(matrix_of(site), solved(site, original, metric, kept))


def test_edits_with_the_same_key_are_no_matter_to_independent_ones(tmp_path):
    session = run(tmp_path, [REQUESTS[0], TWICE], 2)
    assert [edit.status for edit in session.edits] == ["applied"] * 2


@pytest.mark.parametrize("count", [1, 2])
def test_what_verification_rejects_leaves_the_others_solved_anew(count, tmp_path):
    language_model, options, metric = with_statistics(tmp_path)
    site = find_site(language_model.model, 1)
    original, requests = matrix_of(site), REQUESTS[:4]
    free = run(tmp_path, requests, 4, language_model, **options)
    after = sorted(edit.after for edit in free.edits)
    threshold = (after[count - 1] + after[count]) / 2

    language_model = model_for()
    site = find_site(language_model.model, 1)
    session = run(tmp_path, requests, 4, language_model, callbacks_for(threshold), **options)
    kept = [edit for edit in session.edits if edit.status == "applied"]
    rejected = [edit for edit in session.edits if edit.status == "rejected"]
    assert len(kept) >= 1
    assert len(rejected) >= count
    assert len(kept) + len(rejected) == 4
    assert_same_weight(matrix_of(site), solved(site, original, metric, kept))
    assert [written.names for written in session.layers.written] == [tuple(edit.name for edit in kept)]
    assert all(f"below {threshold:g}" in edit.reason for edit in rejected)
    # What is reported of the others is what holds in the end.
    for edit, now in zip(kept, session.measure_targets(kept, written=False), strict=True):
        assert edit.after == pytest.approx(now.probability, rel=1e-9)
        assert edit.after >= threshold
        assert edit.scores["immediate"].rewrite[0] == pytest.approx(math.log(edit.after), rel=1e-9)
    assert [line.get("joint") for line in ledger_of(tmp_path)[4:]] == [
        [other.index for other in kept] if edit in kept and len(kept) > 1 else None for edit in session.edits
    ]


def test_a_joint_batch_that_is_rejected_whole_leaves_the_weight_as_it_was(tmp_path):
    language_model, options, _ = with_statistics(tmp_path)
    before = snapshot(language_model.model)
    session = run(tmp_path, REQUESTS, 3, language_model, callbacks_for(0.999), **options)
    assert [edit.status for edit in session.edits] == ["rejected"] * 7
    assert changed(language_model.model, before) == []
    assert session.layers.written == []


def test_an_edit_of_a_later_batch_starts_from_what_was_kept(tmp_path):
    """Taking one edit back does not disturb the writes of earlier batches."""
    language_model, options, metric = with_statistics(tmp_path)
    site = find_site(language_model.model, 1)
    original = matrix_of(site)
    session = run(
        tmp_path,
        [
            *REQUESTS[:3],
            REQUESTS[3],
            EditRequest(prompt="We left for Tarn", subject="Tarn", target_new="rye", case_id="y"),
            REQUESTS[4],
        ],
        3,
        language_model,
        **options,
    )
    edits = by_name(session)
    assert edits["y"].status == "rejected"
    expected = solved(site, original, metric, [edits[name] for name in "abc"])
    expected = solved(site, expected, metric, [edits[name] for name in "de"])
    assert_same_weight(matrix_of(site), expected)


def test_a_name_that_is_in_the_weight_already_rejects_its_own_edit_alone(tmp_path):
    language_model, options, _ = with_statistics(tmp_path)
    module = RomeModule.from_language_model(language_model, **{**OPTIONS, **options})
    for requests in (REQUESTS[:1], REQUESTS[:3]):
        quiet_trainer(callbacks_for(), tmp_path).fit(module, request_loader(requests, 3))
    assert [edit.status for edit in module.session.edits] == ["rejected", "applied", "applied"]
    assert module.session.edits[0].reason == "edit a is in the weight already; give it another case_id"
    assert module.session.layers.names == ["a", "b", "c"]


@pytest.mark.parametrize("preset", ["rome", "easyedit"])
def test_presets_with_mixed_keys_are_refused_jointly_and_by_no_means_otherwise(preset, tmp_path):
    options = {"preset": preset, "mom2_adjustment": False}
    language_model = model_for()
    before = snapshot(language_model.model)
    with pytest.raises(OptionError, match=rf"preset {preset} asserts values at other keys .* data\.batch_size: 1"):
        run(tmp_path, language_model=language_model, sequential_edit=True, **options)
    assert changed(language_model.model, before) == []
    one = run(tmp_path, REQUESTS[:2], 1, sequential_edit=True, **options)
    assert [edit.status for edit in one.edits] == ["applied"] * 2
    single = run(tmp_path, REQUESTS[:2], 3, **options)
    assert [edit.status for edit in single.edits] == ["applied"] * 2
