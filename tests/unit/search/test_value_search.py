"""The search for values in a plain torch loop: edits side by side are what they are alone."""

import math
from dataclasses import replace

import pytest
import torch

from rome_pl.search.polyak_step import PolyakStep
from rome_pl.search.value_search import SearchOptions, ValueSearch
from tests.lively import NAMES, REQUESTS, encode, objective_of

DEFAULTS = {
    "v_num_grad_steps": 10,
    "clamp_norm_factor": 20.0,
    "stop_loss": 0.0,
    "stop_probability": 1.0,
    "stop_greedy": False,
    "contexts_per_step": None,
    "seed": 0,
}
OPTIMIZERS = {
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.3),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.5),
    "polyak": lambda groups: PolyakStep(groups),
}
LOSS = 5.5
"""Reached by some edits at once, by some late, by some never."""


class Watched:
    """An objective that remembers what it was asked and what it answered, by member."""

    def __init__(self, objective, spoil=None):
        self.objective, self.spoil = objective, spoil
        self.seen = {}

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def __call__(self, deltas, members=None, contexts=None):
        losses = self.objective(deltas, members, contexts)
        if self.spoil is not None:
            losses = self.spoil(losses, list(members), self.seen)
        for place, member in enumerate(members):
            asked = (deltas[place].detach().clone(), contexts and list(contexts[place]), losses.greedy[place].item())
            self.seen.setdefault(member, []).append(asked)
        return losses


def search(objective, members, names, make=OPTIMIZERS["adam"], interval=1, **options):
    """The loop around a search as its docstring has it, with one parameter group an edit."""
    search = ValueSearch(objective, members, names, SearchOptions(**{**DEFAULTS, **options}))
    search._interval = interval
    optimizer = make([{"params": [parameter]} for parameter in search.parameters])
    group_of = {group["params"][0]: group for group in optimizer.param_groups}
    while (loss := search.evaluate()) is not None:
        optimizer.param_groups = [
            group_of[parameter] | {"loss": loss_of_edit, "scale": scale}
            for parameter, loss_of_edit, scale in zip(search.parameters, search.losses, search.scales, strict=True)
        ]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        search.project()
    return search.found()


def search_together(requests=REQUESTS, spoil=None, **options):
    objective = Watched(objective_of(encode(requests)), spoil)
    found = search(objective, range(len(requests)), [str(request.case_id) for request in requests], **options)
    return dict(zip((request.case_id for request in requests), found, strict=True)), objective


def search_alone(request, **options):
    return search(objective_of(encode([request])), [0], [str(request.case_id)], **options)[0]


def assert_same(found, expected):
    assert len(found.steps) == len(expected.steps)
    torch.testing.assert_close(found.delta, expected.delta, rtol=0, atol=1e-9 * float(expected.delta.norm()))
    for step, other in zip(found.steps, expected.steps, strict=True):
        assert step.loss == pytest.approx(other.loss, rel=1e-9)
        assert step.nll == pytest.approx(other.nll, rel=1e-9)
        assert step.kl == pytest.approx(other.kl, rel=1e-8, abs=1e-12)
        assert step.decay == pytest.approx(other.decay, rel=1e-9)
        assert step.probability == pytest.approx(other.probability, rel=1e-9)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_edit_of_a_batch_is_what_it_is_alone(optimizer):
    options = {"make": OPTIMIZERS[optimizer], "stop_loss": LOSS}
    together, _ = search_together(**options)
    ends = [len(found.steps) for found in together.values()]
    assert len(set(ends)) >= 3  # they leave at different steps
    assert max(ends) == DEFAULTS["v_num_grad_steps"]
    assert all(float(found.delta.norm()) > 0.1 for found in together.values())
    for request in REQUESTS:
        assert_same(together[request.case_id], search_alone(request, **options))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
def test_the_order_of_a_batch_does_not_matter(order, optimizer):
    options = {"make": OPTIMIZERS[optimizer], "stop_loss": LOSS}
    together, _ = search_together(**options)
    reordered, _ = search_together([REQUESTS[index] for index in order], **options)
    for name, found in together.items():
        assert_same(reordered[name], found)


def test_some_members_of_an_objective_are_searched_like_all():
    """The module leaves out what a callback has decided already."""
    together, objective = search_together(stop_loss=LOSS)
    some = search(objective.objective, [1, 2, 4], ["b", "c", "e"], stop_loss=LOSS)
    for name, found in zip("bce", some, strict=True):
        assert_same(found, together[name])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("interval", "options"),
    [(3, {"stop_loss": LOSS}), (4, {"stop_greedy": True, "contexts_per_step": 0}), (20, {"stop_probability": 0.004})],
)
def test_asking_seldom_which_edits_have_ended_changes_nothing(interval, options, optimizer):
    always, _ = search_together(make=OPTIMIZERS[optimizer], **options)
    seldom, objective = search_together(make=OPTIMIZERS[optimizer], interval=interval, **options)
    for name, found in always.items():
        assert_same(seldom[name], found)
    # The host did ask less often: some edits were evaluated after their end.
    assert any(len(objective.seen[place]) > len(seldom[name].steps) for place, name in enumerate(NAMES))


@pytest.mark.parametrize("interval", [1, 3])
def test_an_edit_that_has_ended_leaves_and_keeps_the_offset_evaluated_then(interval):
    found, objective = search_together(stop_loss=LOSS, interval=interval)
    assert len({len(one.steps) for one in found.values()}) >= 3
    for place, one in enumerate(found.values()):
        asked = [delta for delta, _, _ in objective.seen[place]]
        assert torch.equal(one.delta, asked[len(one.steps) - 1])
        assert all(step.loss >= LOSS for step in one.steps[:-1])
        assert one.steps[-1].loss < LOSS or len(one.steps) == DEFAULTS["v_num_grad_steps"]
        # Nobody is evaluated beyond the step at which the host asks next.
        assert len(asked) == min(math.ceil(len(one.steps) / interval) * interval, DEFAULTS["v_num_grad_steps"])
        assert len({tuple(delta.tolist()) for delta in asked}) == len(asked)  # every step moved it


def test_the_steps_of_an_edit_are_its_evaluations():
    found, objective = search_together(stop_loss=LOSS)
    plain = objective_of(encode())
    plain(torch.zeros(len(REQUESTS), plain.base_output.shape[1], dtype=torch.float64))
    for place, one in enumerate(found.values()):
        assert len(one.steps) == len(objective.seen[place])
        for (delta, _, _), step in zip(objective.seen[place], one.steps, strict=True):
            losses = plain(delta.unsqueeze(0), [place])
            assert step.loss == pytest.approx(losses.total.item(), rel=1e-9)
            assert step.probability == pytest.approx(losses.probability.item(), rel=1e-9)
            assert step.loss == pytest.approx(step.nll + step.kl + step.decay, rel=1e-12)
            assert step.probability == pytest.approx(math.exp(-step.nll), rel=1e-12)


def first(condition, values):
    """Number of evaluations up to the first that meets a condition, or all."""
    return next((count for count, value in enumerate(values, start=1) if condition(value)), len(values))


@pytest.mark.parametrize("rule", ["stop_loss", "stop_probability", "stop_greedy"])
def test_a_stopping_rule_ends_an_edit_at_the_first_evaluation_where_it_holds(rule):
    options = {"v_num_grad_steps": 14, "contexts_per_step": 0 if rule == "stop_greedy" else None}
    free, objective = search_together(**options)
    limit, met = {
        "stop_loss": (LOSS, lambda step, _: step.loss < LOSS),
        "stop_probability": (0.004, lambda step, _: step.probability > 0.004),
        "stop_greedy": (True, lambda _, greedy: greedy),
    }[rule]
    ended, _ = search_together(**options, **{rule: limit})
    early = []
    for place, (name, found) in enumerate(free.items()):
        greedy = [answer for _, _, answer in objective.seen[place]]
        wanted = first(lambda pair: met(*pair), list(zip(found.steps, greedy, strict=True)))
        assert len(ended[name].steps) == wanted
        assert torch.allclose(ended[name].delta, objective.seen[place][wanted - 1][0], rtol=1e-9, atol=1e-12)
        early.append(1 < wanted < 14)
    assert any(early)
    assert not all(early)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_no_edit_takes_more_steps_than_it_may(steps):
    for interval in (1, 3):
        found, objective = search_together(v_num_grad_steps=steps, interval=interval)
        assert [len(one.steps) for one in found.values()] == [steps] * len(REQUESTS)
        assert all(len(asked) == steps for asked in objective.seen.values())
        if steps == 1:
            assert all(one.delta.norm() == 0 for one in found.values())


@pytest.mark.parametrize("kept", ["worse", "as before", "probable"])
def test_a_search_goes_on_until_earlier_facts_are_as_probable_as_they_were_or_as_is_wanted(kept):
    def with_an_earlier_fact(losses, members, seen):
        """The target is probable from the third evaluation on; the earlier fact is as it was from the sixth on."""
        step = len(seen.get(0, ()))
        nll = torch.full_like(losses.nll, 0.01 if step >= 2 else 3.0) + 0 * losses.nll
        after = {"worse": 2.0 if step < 5 else 1.0, "as before": 1.0, "probable": 0.05}[kept]
        stays = torch.full_like(losses.nll, 1.0 if step == 0 and kept != "probable" else after)
        return replace(losses, nll=nll, kept=stays)

    found, _ = search_together(REQUESTS[:1], with_an_earlier_fact, stop_probability=0.9)
    assert len(found["a"].steps) == {"worse": 6, "as before": 3, "probable": 3}[kept]


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_its_edit_and_no_other(bad, interval):
    def spoil(losses, members, seen):
        """Edit 2 goes bad at its third evaluation and stays so."""
        if 2 in members and len(seen.get(2, ())) >= 2:
            factor = torch.ones_like(losses.nll)
            factor[members.index(2)] = bad
            return replace(losses, nll=losses.nll * factor)
        return losses

    expected, _ = search_together()
    found, _ = search_together(spoil=spoil, interval=interval)
    assert len(found["c"].steps) == 3
    assert not found["c"].finite
    assert not math.isfinite(found["c"].steps[-1].loss)
    for name in "abde":
        assert found[name].finite
        assert_same(found[name], expected[name])


def drawn(objective):
    return {place: [contexts for _, contexts, _ in asked] for place, asked in objective.seen.items()}


def test_contexts_are_drawn_by_record_and_step():
    together, objective = search_together(contexts_per_step=1)
    draws = drawn(objective)
    for steps in draws.values():
        assert all(draw[0] == 0 and len(draw) == 2 and draw[1] in (1, 2) for draw in steps)
        assert len({tuple(draw) for draw in steps}) == 2  # another one now and then
    assert len({str(steps) for steps in draws.values()}) > 1  # not the same for every record
    for place, request in enumerate(REQUESTS):
        alone = Watched(objective_of(encode([request])))
        assert_same(search(alone, [0], [request.case_id], contexts_per_step=1)[0], together[request.case_id])
        assert drawn(alone)[0] == draws[place]
    renamed = Watched(objective_of(encode(REQUESTS[:1])))
    search(renamed, [0], ["another name"], contexts_per_step=1)
    assert drawn(renamed)[0] != draws[0]
    _, reseeded = search_together(contexts_per_step=1, seed=1)
    assert drawn(reseeded) != draws


def test_draws_do_not_depend_on_who_has_ended():
    _, free = search_together(contexts_per_step=1)
    _, objective = search_together(contexts_per_step=1, stop_loss=LOSS)
    assert min(len(asked) for asked in objective.seen.values()) < DEFAULTS["v_num_grad_steps"]
    for place, draws in drawn(objective).items():
        assert draws == drawn(free)[place][: len(draws)]


@pytest.mark.parametrize("wanted", [2, 50])
def test_as_many_contexts_as_there_are_or_more_are_all(wanted):
    found, objective = search_together(contexts_per_step=wanted)
    assert all(draw == [0, 1, 2] for steps in drawn(objective).values() for draw in steps)
    for name, one in search_together()[0].items():
        assert_same(found[name], one)


def test_no_context_beside_the_bare_prompt():
    found, objective = search_together(contexts_per_step=0)
    assert all(draw == [0] for steps in drawn(objective).values() for draw in steps)
    for request, bare in zip(REQUESTS, encode(contexts=("",)), strict=True):
        assert_same(found[request.case_id], search(objective_of([bare]), [0], [request.case_id])[0])


@pytest.mark.parametrize("interval", [1, 3])
def test_every_offset_stays_in_a_ball_of_its_own(interval):
    factor = 0.5
    _, objective = search_together(clamp_norm_factor=factor, interval=interval)
    radii = factor * objective.base_norm
    assert radii.max() > 1.2 * radii.min()
    for place, asked in objective.seen.items():
        norms = torch.stack([delta.norm() for delta, _, _ in asked])
        assert norms[0] == 0
        assert (norms <= radii[place] * (1 + 1e-12)).all()
        assert norms[-1] == pytest.approx(radii[place].item(), rel=1e-12)  # the ball was in the way


def test_the_ball_is_reached_by_shortening():
    """The first step of plain gradient descent, shortened, keeps its direction."""
    make = OPTIMIZERS["sgd"]
    _, wide = search_together(make=make, v_num_grad_steps=2, clamp_norm_factor=1e6)
    _, narrow = search_together(make=make, v_num_grad_steps=2, clamp_norm_factor=1e-3)
    for place in range(len(REQUESTS)):
        step, shortened = wide.seen[place][1][0], narrow.seen[place][1][0]
        expected = step * (1e-3 * wide.base_norm[place] / step.norm())
        torch.testing.assert_close(shortened, expected, rtol=1e-12, atol=0)
    _, still = search_together(make=make, v_num_grad_steps=3, clamp_norm_factor=0.0)
    assert all(delta.norm() == 0 for asked in still.seen.values() for delta, _, _ in asked)


def test_the_parameters_losses_and_scales_are_those_of_the_edits_still_searched():
    objective = objective_of(encode())
    search = ValueSearch(objective, range(5), NAMES, SearchOptions(**DEFAULTS | {"stop_loss": LOSS}))
    optimizer = torch.optim.Adam(search.parameters, lr=0.3)
    place_of, counts = {parameter: place for place, parameter in enumerate(search.parameters)}, []
    while (loss := search.evaluate()) is not None:
        places = [place_of[parameter] for parameter in search.parameters]
        counts.append(len(places))
        assert loss.item() == pytest.approx(search.losses.sum().item(), rel=1e-12)
        assert torch.equal(search.scales, objective.base_norm[places])
        total = objective(torch.stack(search.parameters), places).total
        torch.testing.assert_close(search.losses, total.detach(), rtol=1e-9, atol=0)
        assert (search.losses >= LOSS).all()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert counts[0] > counts[-1] > 0
    assert search.parameters == []


def test_members_may_come_in_any_order():
    together, objective = search_together()
    backwards = search(objective.objective, [4, 3, 2, 1, 0], NAMES[::-1])
    for name, found in zip(NAMES[::-1], backwards, strict=True):
        assert_same(found, together[name])
