import pytest
import torch

from rome_pl.forward.hooks import capture_columns
from rome_pl.model.architecture import find_site
from rome_pl.write.closed_form import Assertion
from rome_pl.write.edited_weight import EditedWeight
from tests.tiny import FAMILIES, tiny_model

LAYER, COLUMN = 1, 5
IDS = torch.arange(3, 15).unsqueeze(0)

KINDS = ("gpt2", "llama", "opt")
"""A family for each kind of projection: all that an :class:`EditedWeight` knows of one."""


def metric_for(site, seed=7):
    """A well-conditioned symmetric metric that is far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(site.d_key, site.d_key, generator=generator, dtype=torch.float64)
    matrix = factor @ factor.T / site.d_key + 0.5 * torch.eye(site.d_key, dtype=torch.float64)
    return lambda keys: keys @ matrix


def measure(model, site):
    """The projection's input and output at one column of a whole forward."""
    with torch.no_grad(), capture_columns(site.projection, 1, slice(COLUMN, COLUMN + 1)) as seen:
        model(IDS)
    return seen["input"][0], seen["output"][0]


def random_assertion(site, seed):
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(1, site.d_key, generator=generator, dtype=torch.float64)
    value = torch.randn(1, site.d_value, generator=generator, dtype=torch.float64) * 3
    return Assertion(shape=key, at=key, value=value)


def bits(tensor):
    """A view of a tensor that compares bit by bit: -0.0 is not 0.0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_edited_module_gives_the_value_at_the_key_and_nothing_else_changes(family):
    model = tiny_model(family)
    site = find_site(model, LAYER)
    before = snapshot(model)
    key, output = measure(model, site)
    value = output + torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    written = EditedWeight(site, metric_for(site)).write(["a"], Assertion(shape=key, at=key, value=value))

    key_after, output_after = measure(model, site)
    assert torch.equal(key_after, key)
    assert (output_after - value).norm() / value.norm() < 1e-9
    assert written.realised == (pytest.approx(1, abs=1e-9),)
    after = model.state_dict()
    assert set(after) == set(before)
    assert [name for name in before if not torch.equal(bits(after[name]), bits(before[name]))] == [site.name]


@pytest.mark.parametrize("family", FAMILIES)
def test_update_is_shaped_by_the_metric(family):
    model = tiny_model(family)
    site = find_site(model, LAYER)
    metric, assertion = metric_for(site), random_assertion(site, 1)
    before = site.matrix(site.weight).detach().clone()
    written = EditedWeight(site, metric).write(["a"], assertion)
    change = site.matrix(site.weight).detach() - before
    direction = metric(assertion.shape)
    residual = assertion.value - assertion.at @ before.T - (0 if site.bias is None else site.bias.detach())
    torch.testing.assert_close(change, residual.T @ direction / (direction @ assertion.at.T), rtol=1e-9, atol=1e-12)
    # The bias is a parameter: what a write keeps must not keep a graph with it.
    assert not written.update.left.requires_grad
    assert written.update.norm == pytest.approx(float(change.norm()), rel=1e-9)


def kind_of(family):
    """How the projection keeps its weight, and whether it has a bias."""
    site = find_site(tiny_model(family), LAYER)
    return isinstance(site.projection, torch.nn.Linear), site.bias is not None


def test_every_family_is_of_a_kind():
    assert {kind_of(family) for family in FAMILIES} == {kind_of(family) for family in KINDS}
    assert len({kind_of(family) for family in KINDS}) == len(KINDS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", KINDS)
def test_revert_gives_back_the_weight_bit_for_bit(family, dtype):
    model = tiny_model(family, dtype)
    site = find_site(model, LAYER)
    original = site.weight.detach().clone()
    edited = EditedWeight(site, metric_for(site))
    edited.write(["a"], random_assertion(site, 1))
    assert not torch.equal(site.weight, original)
    edited.revert()
    assert torch.equal(bits(site.weight.detach()), bits(original))
    assert edited.change == 0
    assert not edited.written


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", KINDS)
def test_revert_of_a_second_write_gives_back_the_first(family, dtype):
    model = tiny_model(family, dtype)
    site = find_site(model, LAYER)
    edited = EditedWeight(site, metric_for(site))
    edited.write(["a"], random_assertion(site, 1))
    edited.commit()
    first = site.weight.detach().clone()
    edited.write(["b"], random_assertion(site, 2))
    assert not torch.equal(site.weight, first)
    edited.revert()
    assert torch.equal(bits(site.weight.detach()), bits(first))
    assert [written.names for written in edited.written] == [("a",)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", KINDS)
def test_removing_a_committed_edit_gives_back_the_weight_bit_for_bit(family, dtype):
    model = tiny_model(family, dtype)
    site = find_site(model, LAYER)
    before = snapshot(model)
    edited = EditedWeight(site, metric_for(site))
    edited.write(["a"], random_assertion(site, 1))
    edited.commit()
    edited.revert()  # nothing is pending: the committed edit stays
    assert not torch.equal(site.weight, before[site.name])
    edited.remove(["a"])
    assert all(torch.equal(bits(tensor), bits(before[name])) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", KINDS)
def test_removing_the_middle_edit_equals_writing_the_other_two_alone(family, dtype):
    def write(model, seeds):
        site = find_site(model, LAYER)
        edited = EditedWeight(site, metric_for(site))
        for seed in seeds:
            edited.write([f"edit {seed}"], random_assertion(site, seed))
            edited.commit()
        return edited

    removed, alone = write(tiny_model(family, dtype), [1, 2, 3]), write(tiny_model(family, dtype), [1, 3])
    assert not torch.equal(removed.site.weight, alone.site.weight)
    removed.remove(["edit 2"])
    assert torch.equal(removed.site.weight, alone.site.weight)
    assert [written.names for written in removed.written] == [("edit 1",), ("edit 3",)]
    assert removed.change == alone.change
    removed.remove(["edit 1", "edit 3"])
    assert torch.equal(
        bits(removed.site.weight.detach()), bits(tiny_model(family, dtype).get_parameter(alone.site.name))
    )


@pytest.mark.parametrize("family", KINDS)
def test_bfloat16_reports_how_much_of_the_edit_the_weight_took(family):
    model = tiny_model(family, torch.bfloat16)
    site = find_site(model, LAYER)
    assertion = random_assertion(site, 1)
    before = site.matrix(site.weight).detach().double()
    bias = 0 if site.bias is None else site.bias.detach().double()
    wanted = assertion.value - assertion.at @ before.T - bias
    written = EditedWeight(site, metric_for(site)).write(["a"], assertion)
    measured = assertion.at @ (site.matrix(site.weight).detach().double() - before).T
    (realised,) = written.realised
    assert 0 < realised < 1.5
    assert realised == pytest.approx(float((measured * wanted).sum() / (wanted * wanted).sum()), rel=1e-9)


def test_bfloat16_reports_that_an_edit_smaller_than_the_steps_is_lost():
    site = find_site(tiny_model("llama", torch.bfloat16), LAYER)
    key = random_assertion(site, 1).at
    value = key @ site.weight.detach().double().T
    edited = EditedWeight(site, metric_for(site))
    original = site.weight.detach().clone()
    written = edited.write(["a"], Assertion(shape=key, at=key, value=value + 1e-9))
    assert abs(written.realised[0]) < 0.5
    edited.revert()
    assert torch.equal(site.weight, original)


def test_removing_an_unknown_name_is_refused_and_changes_nothing():
    site = find_site(tiny_model("gpt2"), LAYER)
    edited = EditedWeight(site, metric_for(site))
    edited.write(["a"], random_assertion(site, 1))
    edited.commit()
    after = site.weight.detach().clone()
    with pytest.raises(KeyError, match="undone already"):
        edited.remove(["a", "b"])
    assert torch.equal(site.weight, after)
    assert [written.names for written in edited.written] == [("a",)]


def test_update_that_is_not_finite_is_refused_and_changes_nothing():
    site = find_site(tiny_model("llama"), LAYER)
    edited = EditedWeight(site, metric_for(site))
    original, assertion = site.weight.detach().clone(), random_assertion(site, 1)
    with pytest.raises(ValueError, match="not finite"):
        edited.write(["a"], Assertion(assertion.shape, assertion.at, assertion.value * float("inf")))
    assert torch.equal(site.weight, original)
    assert not edited.pending
    assert not edited.written


@pytest.mark.parametrize("family", KINDS)
def test_edits_written_jointly_all_hold_and_are_undone_one_by_one(family):
    site = find_site(tiny_model(family), LAYER)
    before = site.weight.detach().clone()
    edited = EditedWeight(site, metric_for(site))
    assertions = [random_assertion(site, seed) for seed in (1, 2, 3)]
    written = edited.write(["a", "b", "c"], Assertion.joint(assertions))
    edited.commit()
    bias = 0 if site.bias is None else site.bias.detach()
    for name, assertion in zip("abc", assertions, strict=True):
        given = assertion.at @ site.matrix(site.weight).detach().T + bias
        torch.testing.assert_close(given, assertion.value, rtol=1e-9, atol=1e-9)
        assert torch.equal(written.part(name).assertion.value, assertion.value)
        assert written.part(name).realised == (pytest.approx(1, abs=1e-9),)
    parts = sum(part.left.T @ part.right for part in (written.part(name).update for name in "abc"))
    torch.testing.assert_close(site.matrix(before) + parts, site.matrix(site.weight).detach(), rtol=1e-9, atol=1e-12)
    assert edited.names == ["a", "b", "c"]

    edited.remove(["b"])
    alone = EditedWeight(find_site(tiny_model(family), LAYER), metric_for(site))
    alone.write(["a", "c"], Assertion.joint([assertions[0], assertions[2]]))
    assert torch.equal(site.weight, alone.site.weight)
    assert edited.names == ["a", "c"]
    edited.remove(["c", "a"])
    assert torch.equal(bits(site.weight.detach()), bits(before))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_proposal_is_what_a_write_would_be_and_writes_nothing(dtype):
    site = find_site(tiny_model("gpt2", dtype), LAYER)
    before, edited = site.weight.detach().clone(), EditedWeight(site, metric_for(site))
    proposed = edited.propose("a", random_assertion(site, 1))
    assert torch.equal(bits(site.weight.detach()), bits(before))
    assert not edited.pending
    assert not edited.written
    written = edited.write(["a"], random_assertion(site, 1))
    assert (proposed.names, proposed.realised) == (written.names, written.realised)
    assert torch.equal(proposed.update.left, written.update.left)
    assert torch.equal(proposed.update.right, written.update.right)
