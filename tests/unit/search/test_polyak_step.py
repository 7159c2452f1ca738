import math

import pytest
import torch

from rome_pl import PolyakStep


def parameter_with_gradient(*gradient, dtype=torch.float64):
    parameter = torch.nn.Parameter(torch.zeros(len(gradient), dtype=dtype))
    parameter.grad = torch.tensor(gradient, dtype=dtype)
    return parameter


def stepped(optimizer, loss, scale):
    """One step of an optimiser of a single parameter."""
    group = optimizer.param_groups[0]
    group["loss"], group["scale"] = torch.tensor(loss, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)
    optimizer.step()
    return group["params"][0].detach()


def test_a_step_by_hand():
    """L = 2 and ∇L = (3, 4) of norm 5: p = e⁻², z = ln(p / (1 - p)), and the step has length (z* - z)(1 - p) / 5."""
    p = math.exp(-2)
    length = (math.log(0.99 / 0.01) - math.log(p / (1 - p))) * (1 - p) / 5
    assert length == pytest.approx(1.11536, rel=1e-4)
    moved = stepped(PolyakStep([parameter_with_gradient(3.0, 4.0)]), loss=2.0, scale=100.0)
    torch.testing.assert_close(moved, torch.tensor([-0.6, -0.8], dtype=torch.float64) * length, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_the_rate_is_a_fraction_of_the_step(rate):
    whole = stepped(PolyakStep([parameter_with_gradient(3.0, 4.0)]), 2.0, 100.0)
    part = stepped(PolyakStep([parameter_with_gradient(3.0, 4.0)], lr=rate), 2.0, 100.0)
    torch.testing.assert_close(part, rate * whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("radius", "scale"), [(1.0, 0.3), (0.1, 3.0), (0.01, 0.01)])
def test_a_long_step_is_capped_at_the_radius(radius, scale):
    moved = stepped(PolyakStep([parameter_with_gradient(3.0, 4.0)], radius=radius), 2.0, scale)
    expected = torch.tensor([-0.6, -0.8], dtype=torch.float64) * radius * scale
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=0)


def test_nothing_moves_beyond_the_target_probability():
    for probability in (0.991, 0.9999, 1.0):
        loss = -math.log(probability)
        assert stepped(PolyakStep([parameter_with_gradient(3.0, 4.0)]), loss, 1.0).norm() == 0
    assert stepped(PolyakStep([parameter_with_gradient(3.0, 4.0)]), -math.log(0.989), 1.0).norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_gradient_nothing_moves(dtype):
    zero = parameter_with_gradient(0.0, 0.0, dtype=dtype)
    assert stepped(PolyakStep([zero]), 2.0, 1.0).tolist() == [0.0, 0.0]
    none = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    assert stepped(PolyakStep([none]), 2.0, 1.0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_gradient_nothing_moves_however_large_the_value(dtype):
    assert stepped(PolyakStep([parameter_with_gradient(0.0, 0.0, dtype=dtype)]), 2.0, 30.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("loss", [700.0, 40.0, 1e-3, 1e-14])
def test_extreme_losses_give_finite_steps(loss):
    for dtype in (torch.float32, torch.float64):
        optimizer = PolyakStep([parameter_with_gradient(3.0, 4.0, dtype=dtype)], target_probability=1 - 1e-6)
        moved = stepped(optimizer, loss, 2.0)
        assert moved.isfinite().all()
        assert (moved.norm() > 0) == (loss > 1e-6)
        assert moved.norm() <= 2.0 * (1 + 1e-6)


def logistic(weight, bias, x):
    """-log p with p = sigmoid(w·x + b): the log-odds are linear."""
    return torch.nn.functional.softplus(-(weight @ x + bias))


@pytest.mark.parametrize("target", [0.5, 0.95, 0.9999])
@pytest.mark.parametrize("start", [-12.0, -3.0, -0.5])
def test_one_step_lands_on_the_target_where_log_odds_are_linear(start, target):
    weight = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
    optimizer = PolyakStep([x], target_probability=target, radius=1e6)
    loss = logistic(weight, start, x)
    loss.backward()
    moved = stepped(optimizer, loss.item(), 1.0)
    assert torch.sigmoid(weight @ moved + start).item() == pytest.approx(target, rel=1e-9)
    # The shortest such step is along the weight.
    assert torch.cosine_similarity(moved, weight, dim=0) == pytest.approx(1.0, rel=1e-12)


def test_half_the_rate_halves_the_distance_in_log_odds():
    weight = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
    loss = logistic(weight, -3.0, x)
    loss.backward()
    moved = stepped(PolyakStep([x], lr=0.5, radius=1e6), loss.item(), 1.0)
    wanted = math.log(0.99 / 0.01)
    assert (weight @ moved - 3.0).item() == pytest.approx((wanted - 3.0) / 2, rel=1e-9)


def test_each_group_has_a_step_of_its_own():
    parameters = [parameter_with_gradient(3.0, 4.0), parameter_with_gradient(0.0, -1.0)]
    optimizer = PolyakStep([{"params": [parameter]} for parameter in parameters])
    for group, loss, scale in zip(optimizer.param_groups, (2.0, 0.5), (0.2, 100.0), strict=True):
        group["loss"], group["scale"] = torch.tensor(loss), torch.tensor(scale)
    optimizer.step()
    first = stepped(PolyakStep([parameter_with_gradient(3.0, 4.0)]), 2.0, 0.2)
    second = stepped(PolyakStep([parameter_with_gradient(0.0, -1.0)]), 0.5, 100.0)
    torch.testing.assert_close(parameters[0].detach(), first, rtol=1e-6, atol=0)
    torch.testing.assert_close(parameters[1].detach(), second, rtol=1e-6, atol=0)
    assert second[1] > 0
    assert optimizer.state == {}


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    x = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64)
    optimizer = PolyakStep([x])
    optimizer.param_groups[0] |= {"loss": torch.tensor(math.log(2)), "scale": torch.tensor(10.0)}

    def closure():
        optimizer.zero_grad()
        loss = logistic(weight, 0.0, x)
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(math.log(2))
    assert torch.sigmoid(weight @ x).item() == pytest.approx(0.99, rel=1e-6)


@pytest.mark.parametrize("missing", ["loss", "scale"])
def test_a_group_without_loss_or_scale_says_who_gives_them(missing):
    optimizer = PolyakStep([parameter_with_gradient(3.0, 4.0)])
    optimizer.param_groups[0] |= {name: torch.tensor(1.0) for name in ("loss", "scale") if name != missing}
    with pytest.raises(RuntimeError, match="'loss' and 'scale'; RomeModule gives them"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_probability": 0.0}, r"target_probability: expected a number in \(0, 1\), got 0"),
        ({"target_probability": 1.0}, "target_probability"),
        ({"target_probability": math.nan}, "target_probability"),
        ({"radius": 0.0}, "radius: expected a positive number, got 0"),
        ({"radius": -1.0}, "radius"),
        ({"radius": math.nan}, "radius"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PolyakStep([parameter_with_gradient(1.0)], **options)


def bent(x):
    """A curved level set: log-odds that rise with the first coordinate and fall with the square of the others."""
    return torch.nn.functional.softplus(-(2 * x[0] + 0.5 * x[1] - 0.2 * (x[1:] ** 2).sum() - 3.0))


def search(shorten, steps=40, start=(0.0, 3.0, -2.0)):
    """An offset that has gone astray, brought to the target; its log-odds' distance and its norm."""
    x = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = PolyakStep([x], target_probability=0.9, shorten=shorten, radius=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = bent(x)
        loss.backward()
        optimizer.param_groups[0] |= {"loss": loss.detach(), "scale": torch.tensor(1.0)}
        optimizer.step()
    return torch.exp(-bent(x)).item(), x.detach()


def test_shortening_finds_the_shortest_offset_that_reaches_the_target():
    (reached, plain), (also, short) = search(0.0), search(0.3, steps=200)
    assert reached == pytest.approx(0.9, abs=1e-3)
    assert also == pytest.approx(0.9, abs=1e-2)
    assert short.norm() < 0.8 * plain.norm()
    # Optimality: at the shortest offset there is nothing across the gradient.
    at = short.clone().requires_grad_()
    bent(at).backward()
    assert torch.cosine_similarity(short, -at.grad, dim=0) > 0.98


def test_nothing_is_taken_off_before_a_step_has_brought_the_target_nearer():
    x = torch.nn.Parameter(torch.tensor([0.0, 5.0], dtype=torch.float64))
    optimizer = PolyakStep([x], shorten=0.5, radius=1e-9)
    offsets = []
    for loss in (2.0, 2.0, 1.0):  # the first, one without progress, one with
        x.grad = torch.tensor([1.0, 0.0], dtype=torch.float64)
        offsets.append(stepped(optimizer, loss, 1.0)[1].item())
    assert offsets == pytest.approx([5.0, 5.0, 2.5])


@pytest.mark.parametrize("shorten", [-0.1, 1.1, math.nan])
def test_a_fraction_that_is_none_is_refused(shorten):
    with pytest.raises(ValueError, match=r"shorten: expected a number in \[0, 1\]"):
        PolyakStep([parameter_with_gradient(1.0)], shorten=shorten)
