import types

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from rome_pl.forward.hooks import add_rank_one, capture_columns
from rome_pl.model.architecture import UnsupportedModelError, find_site
from rome_pl.model.mixtures import MixtureSite
from tests.tiny import MIXTURES, tiny_model
from tests.variants import slow

LAYER, ROWS, COLUMNS = 1, 2, slice(3, 9)
IDS = torch.arange(3, 23).reshape(ROWS, 10)

QUICK = ("mixtral", "gpt_oss", "deepseek_v3")
"""A family of each kind: plain; matrices stored the other way round and biases; a shared expert."""

FAMILIES = [family if family in QUICK else slow(family) for family in MIXTURES]


def experts_of(model):
    return next(m for name, m in model.model.layers[LAYER].named_modules() if name.endswith("experts"))


def called(model):
    """What the experts are called with, and what they return, in a forward of the model."""
    seen = {}
    handle = experts_of(model).register_forward_hook(lambda _, args, output: seen.update(args=args, output=output))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return seen["args"], seen["output"]


def by_hand(family, experts, expert, hidden):
    """The key of one expert, its matrix ``[out, in]`` and its bias, by the formula of the family."""
    if family == "gpt_oss":
        both = hidden @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
        key = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        return key, experts.down_proj[expert].T, experts.down_proj_bias[expert]
    gate, up = (experts.gate_up_proj[expert] @ hidden).chunk(2)
    return silu(gate) * up, experts.down_proj[expert], torch.zeros(32, dtype=hidden.dtype)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_key_holds_the_parts_of_the_picked_experts_by_the_routers_weights(family):
    model = tiny_model(family)
    site, experts = find_site(model, LAYER), experts_of(model)
    (hidden, index, gates), output = called(model)
    with capture_columns(site, ROWS, slice(None)) as kept:
        model(IDS)
    keys, values = kept["input"].flatten(0, 1), kept["output"].flatten(0, 1)
    for token, picked in enumerate(index):
        expected = torch.zeros(site.experts, site.d_key // site.experts, dtype=keys.dtype)
        biases = torch.zeros(32, dtype=keys.dtype)
        for place, expert in enumerate(picked):
            key, matrix, bias = by_hand(family, experts, expert, hidden[token])
            expected[expert] = gates[token, place] * key
            biases += gates[token, place] * bias
            part = site.matrix(site.weight).reshape(32, site.experts, -1)[:, expert]
            assert torch.equal(part, matrix)
        torch.testing.assert_close(keys[token], expected.flatten(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(values[token], output[token] - biases, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(values[token], site.matrix(site.weight) @ keys[token], rtol=1e-9, atol=1e-12)
    assert (site.bias, site.picked, site.d_value) == (None, 2, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_fit_the_products_that_transformers_puts_in_place_of_the_experts_code(family, dtype):
    model = tiny_model(family, dtype)
    assert model.config._experts_implementation == "grouped_mm"
    site = find_site(model, LAYER)
    with capture_columns(site, ROWS, COLUMNS) as kept, torch.no_grad():
        model(IDS)
    given = kept["input"].double() @ site.matrix(site.weight.detach()).double().T
    error = (given - kept["output"].double()).norm() / given.norm()
    assert float(error) < {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_matrix_is_stored_as_it_was_read(family):
    site = find_site(tiny_model(family), LAYER)
    assert site.matrix(site.weight).shape == (site.d_value, site.d_key)
    assert torch.equal(site.stored(site.matrix(site.weight)), site.weight)
    assert (site.transposed, site.experts) == (family == "gpt_oss", 4)
    assert site.least_text == site.d_key // 2


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_an_unwritten_change_acts_like_a_written_one(family):
    model = tiny_model(family)
    site = find_site(model, LAYER)
    left, right = torch.randn(1, site.d_value).double(), torch.randn(1, site.d_key).double()
    with add_rank_one(site, left.expand(ROWS, -1), right.expand(ROWS, -1)):
        unwritten = model(IDS).logits
    site.weight.copy_(site.stored(site.matrix(site.weight) + left.T @ right))
    torch.testing.assert_close(unwritten, model(IDS).logits, rtol=1e-9, atol=1e-9)


class Square(nn.Module):
    """Experts whose matrices are square, so that their shape does not say how they are used."""

    def __init__(self, straight):
        super().__init__()
        self.straight = straight
        self.first = nn.Parameter(torch.randn(4, 32, 32, dtype=torch.float64) / 6)
        self.second = nn.Parameter(torch.randn(4, 32, 32, dtype=torch.float64) / 6)

    def forward(self, hidden, picked, gates):
        made = torch.zeros_like(hidden)
        for expert in picked.unique():
            token, place = torch.where(picked == expert)
            inner = (hidden[token] @ self.first[expert]).relu()
            outer = inner @ self.second[expert] if self.straight else nn.functional.linear(inner, self.second[expert])
            made.index_add_(0, token, outer * gates[token, place, None])
        return made


@pytest.mark.parametrize("straight", [True, False])
def test_how_matrices_lie_is_seen_by_their_use(straight):
    model = tiny_model("mixtral")
    model.model.layers[LAYER].mlp.experts = Square(straight)
    site = find_site(model, LAYER)
    assert (site.parameter, site.transposed) == ("second", straight)
    with capture_columns(site, ROWS, COLUMNS) as kept, torch.no_grad():
        model(IDS)
    torch.testing.assert_close(kept["input"] @ site.matrix(site.weight.detach()).T, kept["output"])


def normed(self, hidden, picked, gates):
    made = Square.forward(self, hidden, picked, gates)
    return made / made.norm(dim=-1, keepdim=True)


def without_picks(self, hidden):
    return torch.bmm(hidden.view(4, -1, 32), self.second).view_as(hidden)


def for_pairs_only(self, hidden, picked, gates):
    if picked.shape[1] == 1:
        raise ValueError("one expert is too few")
    return Square.forward(self, hidden, picked, gates)


def unused(self, hidden, picked, gates):
    return hidden * gates.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (normed, "not the sum of their last products by the router's weights"),
        (without_picks, "does not run with hidden states, picked experts and their weights"),
        (for_pairs_only, r"their keys cannot be read \(one expert is too few\)"),
        (unused, "none of its parameters is multiplied expert by expert"),
    ],
)
def test_experts_of_another_form_are_refused_with_the_reason(forward, reason):
    model = tiny_model("mixtral")
    model.model.layers[LAYER].mlp.experts = type("Other", (Square,), {"forward": forward})(True)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        find_site(model, LAYER)
    assert f"layer {LAYER} of MixtralForCausalLM is a mixture of experts" in str(caught.value)
    assert "choose a layer with a dense MLP" in str(caught.value)


def test_experts_in_modules_of_their_own_are_refused():
    model = tiny_model("mixtral")
    model.model.layers[LAYER].mlp.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
    with pytest.raises(UnsupportedModelError, match="no module with one 3-d parameter"):
        find_site(model, LAYER)


def test_experts_spread_over_modules_are_refused():
    model = tiny_model("mixtral")
    model.model.layers[LAYER].mlp.others = Square(True)
    with pytest.raises(UnsupportedModelError, match=r"spread over 'mlp.experts', 'mlp.others'"):
        find_site(model, LAYER)


def test_quantised_experts_are_refused():
    model = tiny_model("mixtral")
    experts = model.model.layers[LAYER].mlp.experts
    experts.down_proj = nn.Parameter(torch.zeros(4, 32, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="quantised weights: load the model in float32"):
        find_site(model, LAYER)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((torch.ones(3, 32), torch.full((3, 2), 4), torch.ones(3, 2)), "beyond the 4 that are here"),
        ((torch.ones(3, 32),), "with other things than hidden states, the picked experts and their weights"),
        ((torch.ones(3, 32), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 4)), "with other things"),
    ],
)
def test_a_call_with_other_things_is_refused(arguments, reason):
    site = find_site(tiny_model("mixtral", torch.float32), LAYER)
    assert isinstance(site, MixtureSite)
    with pytest.raises(UnsupportedModelError, match=reason):
        site.keys(arguments, {}, lambda tensor: tensor)


def test_the_order_of_arguments_does_not_matter_nor_their_names():
    site = find_site(tiny_model("mixtral"), LAYER)
    hidden, gates = torch.randn(3, 32).double(), torch.rand(3, 2).double()
    picked = torch.tensor([[0, 1], [2, 0], [3, 1]])
    plain = site.keys((hidden, picked, gates), {}, lambda tensor: tensor)
    named = site.keys((hidden,), {"scores": gates, "experts": picked}, lambda tensor: tensor)
    assert torch.equal(plain, named)


def test_finding_a_mixture_leaves_nothing_behind():
    model = tiny_model("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    find_site(model, LAYER)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(vars(m).get("forward"), types.FunctionType) for m in model.modules())
