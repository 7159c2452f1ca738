"""Writing into a mixture: one closed form over the parts of all experts."""

import pytest
import torch

from rome_pl.forward.hooks import capture_columns
from rome_pl.model.architecture import find_site
from rome_pl.second_moments.second_moment import RIDGE, MomentInfo, SecondMoment
from rome_pl.write.closed_form import Assertion, DisablingEditError
from rome_pl.write.edited_weight import EditedWeight
from rome_pl.write.key_metric import make_metric
from tests.tiny import MIXTURES, tiny_model
from tests.variants import slow

LAYER, COLUMN = 1, 5
IDS = torch.arange(3, 15).unsqueeze(0)
QUICK = ("mixtral", "gpt_oss", "deepseek_v3")
FAMILIES = [family if family in QUICK else slow(family) for family in MIXTURES]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moment_for(site, unknown=()):
    """A second moment of each expert, of its own size and shape."""
    size = site.d_key // site.experts
    factors = [random(3 * size, size, seed=expert) * (0.1 + expert) for expert in range(site.experts)]
    matrix = torch.stack([factor.T @ factor / len(factor) for factor in factors])
    tokens = torch.tensor([size - 1 if expert in unknown else 3 * size for expert in range(site.experts)])
    return SecondMoment(matrix, MomentInfo("", "", LAYER, 1000, "", experts=site.experts), tokens)


def metric_for(moment, name="second_moment", weight=1.0):
    return make_metric(name, moment, weight=weight, ridge=10.0, threshold=1.0)


def measure(model, site):
    with torch.no_grad(), capture_columns(site, 1, slice(COLUMN, COLUMN + 1)) as seen:
        model(IDS)
    return seen["input"][0], seen["output"][0]


def reached(site, key):
    return key.reshape(site.experts, -1).any(1)


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def asserted(site, seed=1, experts=(0, 2)):
    """An assertion whose key reaches some experts."""
    key = random(1, site.experts, site.d_key // site.experts, seed=seed)
    key[:, [expert for expert in range(site.experts) if expert not in experts]] = 0
    key = key.flatten(1)
    return Assertion(shape=key, at=key, value=3 * random(1, site.d_value, seed=seed + 100))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_give_the_value_at_the_key_and_nothing_but_the_picked_ones_changes(family):
    model = tiny_model(family)
    site, before = find_site(model, LAYER), snapshot(model)
    key, output = measure(model, site)
    value = output + random(*output.shape, seed=3)
    edited = EditedWeight(site, metric_for(moment_for(site)))
    written = edited.write(["a"], Assertion(shape=key, at=key, value=value))
    edited.commit()

    key_after, output_after = measure(model, site)
    assert torch.equal(key_after, key)
    assert float((output_after - value).norm() / value.norm()) < 1e-12
    assert written.realised == (pytest.approx(1, abs=1e-9),)
    after = model.state_dict()
    assert [name for name in before if not torch.equal(bits(after[name]), bits(before[name]))] == [site.name]
    changed = (after[site.name] != before[site.name]).flatten(1).any(1)
    assert torch.equal(changed, reached(site, key))
    assert int(changed.sum()) == 2

    edited.remove(["a"])
    assert all(torch.equal(bits(tensor), bits(before[name])) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_in_bfloat16_the_others_keep_their_bits(family):
    model = tiny_model(family, torch.bfloat16)
    site, before = find_site(model, LAYER), snapshot(model)
    key, output = measure(model, site)
    EditedWeight(site, metric_for(moment_for(site))).write(["a"], Assertion(key, key, 2 * output))
    for expert, hit in enumerate(reached(site, key).tolist()):
        assert torch.equal(bits(site.weight[expert].detach()), bits(before[site.name][expert])) != hit
    got = measure(model, site)[1].double()
    assert float((got - 2 * output.double()).norm() / (2 * output.double()).norm()) < 0.05


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_write_is_shared_as_least_disturbs_the_experts_text(family):
    """ΔW_e = δ g_e (C_e⁻¹ k_e)ᵀ / Σ_j g_j² k_jᵀ C_j⁻¹ k_j, the g in the parts of the key."""
    model = tiny_model(family)
    site = find_site(model, LAYER)
    moment, before = moment_for(site), site.weight.detach().clone()
    key, output = measure(model, site)
    delta = random(*output.shape, seed=3)
    EditedWeight(site, metric_for(moment)).write(["a"], Assertion(key, key, output + delta))
    parts = key.reshape(site.experts, -1)
    ridged = [one + RIDGE * one.diagonal().mean() * torch.eye(len(one)) for one in moment.matrix]
    solved = [torch.linalg.inv(one) @ part for one, part in zip(ridged, parts, strict=True)]
    total = sum(part @ one for part, one in zip(parts, solved, strict=True))
    for expert, one in enumerate(solved):
        change = (site.weight - before)[expert].detach()
        expected = torch.outer(delta[0], one / total)
        torch.testing.assert_close(change.T if site.transposed else change, expected, rtol=1e-8, atol=1e-11)

    # No other change that does the same disturbs the text less.
    def disturbance(change):
        blocks = change.reshape(site.d_value, site.experts, -1)
        return float(torch.einsum("vei,eij,vej->", blocks, torch.stack(ridged), blocks))

    change = site.matrix(site.weight.detach() - before)
    for seed in range(5):
        away = random(*change.shape, seed=seed)
        away -= torch.outer(away @ key[0], key[0]) / (key[0] @ key[0])
        assert disturbance(change + 1e-3 * away) > disturbance(change)


@pytest.mark.parametrize("name", ["second_moment", "past_keys"])
def test_metrics_of_experts_are_one_metric_of_a_dense_layer_with_blocks(name):
    site = find_site(tiny_model("mixtral"), LAYER)
    moment = moment_for(site)
    edited = EditedWeight(site, metric_for(moment, name, 20.0))
    matrix, weight = 20 * moment.matrix, site.matrix(site.weight.detach()).double()
    matrix += 20 * RIDGE * moment.matrix.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(48)
    for seed, experts in enumerate([(0, 2), (0, 1), (3, 2), (0, 2)]):
        assertion = asserted(site, seed, experts)
        edited.write([str(seed)], assertion)
        edited.commit()
        direction = torch.linalg.solve(torch.block_diag(*matrix), assertion.at[0])
        residual = assertion.value[0] - weight @ assertion.at[0]
        weight = weight + torch.outer(residual, direction / (direction @ assertion.at[0]))
        torch.testing.assert_close(site.matrix(site.weight.detach()), weight, rtol=1e-8, atol=1e-9)
        if name == "past_keys":
            parts = assertion.at.reshape(site.experts, -1)
            matrix = matrix + torch.einsum("ei,ej->eij", parts, parts)
    # Undone and replayed, the past keys are those of the edits that remain.
    edited.remove(["1"])
    again = EditedWeight(find_site(tiny_model("mixtral"), LAYER), metric_for(moment, name, 20.0))
    for seed, experts in ((0, (0, 2)), (2, (3, 2)), (3, (0, 2))):
        again.write([str(seed)], asserted(site, seed, experts))
        again.commit()
    assert torch.equal(edited.site.weight, again.site.weight)


def test_in_a_null_space_of_experts_only_those_that_have_one_are_written_into():
    site = find_site(tiny_model("mixtral"), LAYER)
    moment, before = moment_for(site), site.weight.detach().clone()
    moment.matrix[1] += 5 * torch.eye(48)
    known = SecondMoment(moment.matrix, moment.info, torch.tensor([144, 0, 144, 144]))
    edited = EditedWeight(site, metric_for(known, "null_space"))
    assertion = asserted(site, 1, (0, 1))
    edited.write(["a"], assertion)
    assert (site.weight != before).flatten(1).any(1).tolist() == [True, False, False, False]
    torch.testing.assert_close(assertion.at @ site.matrix(site.weight.detach()).T, assertion.value)


def test_experts_with_too_little_text_take_no_part_and_the_value_still_holds():
    site = find_site(tiny_model("mixtral"), LAYER)
    before, assertion = site.weight.detach().clone(), asserted(site, 1, (0, 2))
    edited = EditedWeight(site, metric_for(moment_for(site, unknown=[2])))
    edited.write(["a"], assertion)
    assert (site.weight != before).flatten(1).any(1).tolist() == [True, False, False, False]
    torch.testing.assert_close(assertion.at @ site.matrix(site.weight.detach()).T, assertion.value)


@pytest.mark.parametrize("joint", [False, True])
def test_where_no_picked_expert_has_enough_text_the_edit_is_refused(joint):
    site = find_site(tiny_model("mixtral"), LAYER)
    before = site.weight.detach().clone()
    edited = EditedWeight(site, metric_for(moment_for(site, unknown=[0, 2])))
    assertions = [asserted(site, 2, (1, 2))] * joint + [asserted(site, 1, (0, 2))]
    with pytest.raises(DisablingEditError, match="too little text for a second moment") as caught:
        edited.write(["a", "b"][: len(assertions)], Assertion.joint(assertions))
    assert caught.value.row == int(joint)
    assert torch.equal(site.weight, before)


def test_edits_written_jointly_all_hold_and_are_undone_one_by_one():
    model = tiny_model("gpt_oss")
    site = find_site(model, LAYER)
    before = site.weight.detach().clone()
    edited = EditedWeight(site, metric_for(moment_for(site)))
    assertions = [asserted(site, seed, experts) for seed, experts in ((1, (0, 1)), (2, (1, 2)), (3, (3, 0)))]
    edited.write(["a", "b", "c"], Assertion.joint(assertions))
    edited.commit()
    for one in assertions:
        torch.testing.assert_close(one.at @ site.matrix(site.weight.detach()).T, one.value, rtol=1e-8, atol=1e-8)
    edited.remove(["b"])
    alone = EditedWeight(find_site(tiny_model("gpt_oss"), LAYER), metric_for(moment_for(site)))
    alone.write(["a", "c"], Assertion.joint([assertions[0], assertions[2]]))
    assert torch.equal(site.weight, alone.site.weight)
    edited.remove(["a", "c"])
    assert torch.equal(bits(site.weight.detach()), bits(before))
