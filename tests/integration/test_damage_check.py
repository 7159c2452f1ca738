"""What edits cost the rest of a model: measured right, said when it is too much, and not when it may be chance."""

import json
import logging
from contextlib import nullcontext

import pytest
import torch

from rome_pl.callbacks import DamageCheck, EditCommit, ProbeEvaluation, RankOneWriter, Verification, default_callbacks
from rome_pl.metrics import held_out_text, measure_text
from rome_pl.metrics.damage import Damage, DamageBounds
from rome_pl.requests.edit_request import EditRequest
from tests.integration.helpers import run_edits
from tests.tiny import tiny_language_model


def crowd(count):
    """Facts whose neighbours share nearly all of their prompt: what is written for one spills over."""
    return [
        EditRequest(
            prompt=f"The lighthouse of Korrin{index} stands in", subject=f"Korrin{index}", target_new="Oslo",
            target_true="Lima", case_id=index,
            neighbours=[f"The lighthouse of Korrin{index}{letter} stands in" for letter in "abcdef"],
        )
        for index in range(count)
    ]  # fmt: skip


def run(tmp_path, count=6, sequential=False, **options):
    check = DamageCheck(first_edits=3, **options)
    callbacks = [RankOneWriter(), Verification(0.0), ProbeEvaluation(measure_perplexity=False), check, EditCommit()]
    hard = {"v_num_grad_steps": 12, "v_lr": 1.0, "sequential_edit": sequential}
    return run_edits(tiny_language_model(), tmp_path, crowd(count), callbacks, **hard)


def preferred(pairs):
    return sum(true > new for new, true in pairs) / len(pairs)


@pytest.mark.parametrize("sequential", [False, True])
def test_damage_is_what_the_written_weights_do(sequential, tmp_path):
    session = run(tmp_path, sequential=sequential, largest_divergence=1e-9)
    first, last = session.measured.damage
    assert (first["edits"], last["edits"]) == (3, 6)
    base = [preferred(session.measured.base_scores[edit.name].neighbours) for edit in session.edits]
    stage = "final" if sequential else "immediate"
    after = [preferred(edit.scores[stage].neighbours) for edit in session.edits]
    losses = torch.tensor(base, dtype=torch.float64) - torch.tensor(after, dtype=torch.float64)
    assert last["before"] - last["after"] == pytest.approx(float(losses.mean()))
    assert last["standard_error"] == pytest.approx(float(losses.std() / 6**0.5))
    # The divergence is that of weights with the edits in them.
    written, text = tiny_language_model(), held_out_text()
    weight, found = written.model.get_submodule("model.layers.1.mlp.down_proj").weight, []
    for edit in session.edits[: 6 if sequential else 3]:
        original = weight.detach().clone()
        weight.data += edit.written.layers[1].update.added_to(torch.zeros_like(weight, dtype=torch.float64))
        if not sequential:
            found.append(measure_text(tiny_language_model(), text, edited=lambda: nullcontext(written), windows=1))
            weight.data.copy_(original)
    if sequential:
        found.append(measure_text(tiny_language_model(), text, edited=lambda: nullcontext(written), windows=1))
    expected = sum(measure.divergence for measure in found) / (6 if sequential else 3)
    assert last["divergence"] == pytest.approx(expected, rel=1e-6)
    assert any("ordinary text" in finding for finding in last["findings"])


def test_the_warning_says_what_suffers_and_what_to_try(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        session = run(tmp_path, largest_neighbour_loss=0.0, largest_divergence=1e-9)
    said = [record.message for record in caplog.records if record.message.startswith("Damage")]
    assert len(said) == 2
    assert said[0].startswith("Damage after 3 edits: ")
    assert "rome-pl tune" in said[0]
    assert "at the end, with 6 edits" in said[1]
    assert json.loads(json.dumps(session.measured.damage)) == session.measured.damage


def test_nothing_is_said_within_the_bounds(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        session = run(tmp_path, largest_neighbour_loss=0.999, largest_divergence=1e9)
    assert not [record for record in caplog.records if record.message.startswith("Damage")]
    assert all(look["findings"] == [] for look in session.measured.damage)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (Damage(10, 10, 0.8, 0.6, 0.05), True),
        (Damage(10, 10, 0.8, 0.76, 0.01), False),  # within the bound
        (Damage(10, 10, 0.8, 0.7, 0.07), False),  # may be chance
        (Damage(4, 4, 0.8, 0.2, 0.0), False),  # too few
        (Damage(10), False),  # none has neighbours
    ],
)
def test_a_loss_has_to_be_large_and_more_than_chance(damage, told):
    assert bool(damage.findings(DamageBounds(0.05, None))) is told


def test_a_divergence_that_is_no_number_is_damage():
    assert Damage(10, divergence=float("nan")).findings(DamageBounds(None, 0.02))


@pytest.mark.parametrize(
    "options", [{"largest_neighbour_loss": 1.5}, {"largest_divergence": 0.0}, {"first_edits": 0}, {"windows": 0}]
)
def test_arguments_out_of_range_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: "):
        DamageCheck(**options)


def test_it_is_among_the_default_callbacks_unless_nothing_is_evaluated():
    assert any(isinstance(callback, DamageCheck) for callback in default_callbacks())
    assert not any(isinstance(callback, DamageCheck) for callback in default_callbacks(evaluate=False))
    assert not any(isinstance(callback, DamageCheck) for callback in default_callbacks(watch=False))
