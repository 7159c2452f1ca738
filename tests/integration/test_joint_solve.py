"""Sequential edits in batches, solved jointly."""

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from rome_pl.data_modules.request_data import request_loader
from rome_pl.editing.probing import measure_targets
from rome_pl.errors import OptionError
from rome_pl.model.architecture import find_site
from rome_pl.modules.rome_module import RomeModule
from rome_pl.requests.edit_request import EditRequest
from rome_pl.write.edit_keys import EditKeys
from tests.integration.batch_runs import (
    LONG,
    OPTIONS,
    REQUESTS,
    assert_close,
    by_name,
    callbacks_for,
    ledger_of,
    model_for,
    part_of,
    run,
    with_statistics,
)
from tests.integration.helpers import changed, quiet_trainer, snapshot


class AfterEach(Callback):
    """Calls a function with the session and the edits of every batch."""

    def __init__(self, function):
        self.function = function

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.function(pl_module.session, outputs["edits"])


def asked(edit):
    """The key and value that an edit's preset asserts: r_rome, or balanced where it has such a key."""
    if edit.search.keys.balanced is None:
        return edit.search.keys.mean.numpy(), edit.search.value.numpy()
    return edit.search.keys.balanced.numpy(), (edit.search.keys.output_balanced + edit.search.delta).numpy()


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
                np.testing.assert_allclose(
                    change, edit.search.delta.numpy(), rtol=0, atol=1e-9 * edit.search.delta.norm()
                )
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
    assert (
        original.edits[0].search.delta - joint["d"].search.delta
    ).norm() > 1e-6  # the second batch did see the first


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
    assert all(f"below {threshold:g}" in edit.reason or "less than before" in edit.reason for edit in rejected)
    # What is reported of the others is what holds in the end.
    for edit, now in zip(kept, measure_targets(session, kept, written=False), strict=True):
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
