"""The optimisers of values in a run: Polyak steps, contexts drawn anew, greedy stops, autocast."""

import pytest
import torch

from rome_pl import PolyakStep
from rome_pl.errors import OptionError
from rome_pl.forward.hooks import add_at_column
from rome_pl.model.architecture import find_site
from rome_pl.requests.edit_request import EditRequest
from tests.integration.batch_runs import REQUESTS, assert_close, assert_same_edit, by_name, model_for, run


def test_contexts_drawn_anew_do_not_depend_on_the_batch(tmp_path):
    every = by_name(run(tmp_path, REQUESTS[:4], 2))
    alone = by_name(run(tmp_path, REQUESTS[:4], 1, contexts_per_step=1))
    together = run(tmp_path, REQUESTS[:4][::-1], 3, contexts_per_step=1)
    for edit in together.edits:
        assert_same_edit(edit, alone[edit.name])
        assert_close(edit.search.keys.mean, every[edit.name].search.keys.mean)  # a mean over all contexts nonetheless
        assert (edit.search.delta - every[edit.name].search.delta).norm() > 1e-3
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
            assert all(gives_target(row, edit.search.delta) for row in edit.search.encoded.rows)
            assert not all(gives_target(row, torch.zeros_like(edit.search.delta)) for row in edit.search.encoded.rows)


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
        assert_close(half.search.delta, together[half.name].search.delta / 2)


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
        assert torch.equal(edit.search.keys.mean, expected.search.keys.mean)  # keys are not rounded
        assert edit.search.delta.dtype == torch.float32
        error = float((edit.search.delta - expected.search.delta).norm() / expected.search.delta.norm())
        assert 0 < error < 0.1
        assert edit.after == pytest.approx(expected.after, rel=0.05)
