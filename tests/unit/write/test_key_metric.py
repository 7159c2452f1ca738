"""The presets' metrics against their published formulae, computed plainly with explicit inverses."""

import numpy as np
import pytest
import torch
from torch import nn

from rome_pl.errors import OptionError
from rome_pl.model.architecture import RewriteSite
from rome_pl.second_moments.second_moment import RIDGE, MomentInfo, SecondMoment
from rome_pl.write.closed_form import Assertion
from rome_pl.write.edited_weight import EditedWeight
from rome_pl.write.key_metric import NullSpace, PastKeys, PlainMetric, make_metric
from rome_pl.write.presets import PRESETS

D_KEY, D_VALUE, STREAM = 24, 10, 6
L2, THRESHOLD = 10.0, 0.3


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def moment():
    samples = random(200, D_KEY, seed=1) * torch.linspace(0.2, 2, D_KEY, dtype=torch.float64)
    return SecondMoment(samples.T @ samples / 200, MomentInfo("", "", 1, 200, ""))


def site():
    linear = nn.Linear(D_KEY, D_VALUE, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(random(D_VALUE, D_KEY, seed=2))
        linear.bias.copy_(random(D_VALUE, seed=3))
    return RewriteSite(1, "weight", linear, False)


def metric_for(name, moment):
    preset = PRESETS[name]
    return make_metric(preset.metric, moment, weight=preset.mom2_update_weight, ridge=L2, threshold=THRESHOLD)


def residuals(weight, bias, keys, values):
    return values - (weight @ keys + bias[:, None])


def ridged(moment):
    matrix = moment.matrix.numpy()
    return matrix + RIDGE * np.trace(matrix) / D_KEY * np.eye(D_KEY)


def emmet(weight, bias, moment, keys, values, past):
    """Gupta et al. 2024, Eq. 10, with λ = 0.1 and C for 1,000 keys."""
    inverse = np.linalg.inv(1000 * ridged(moment))
    inner = keys.T @ inverse @ keys + 0.1 * np.eye(keys.shape[1])
    return residuals(weight, bias, keys, values) @ np.linalg.inv(inner) @ keys.T @ inverse


def memit(weight, bias, moment, keys, values, past):
    """Meng et al. 2023, Eq. 14: R K^T (λ C + K K^T)^-1."""
    whole = 15000 * ridged(moment) + keys @ keys.T
    return residuals(weight, bias, keys, values) @ keys.T @ np.linalg.inv(whole)


def accumulated(weight, bias, moment, keys, values, past):
    """Least squares with the values at these keys as equalities, text and past keys weighing alike."""
    inverse = np.linalg.inv(1000 * ridged(moment) + past @ past.T)
    return residuals(weight, bias, keys, values) @ np.linalg.inv(keys.T @ inverse @ keys) @ keys.T @ inverse


def alphaedit(weight, bias, moment, keys, values, past):
    """Fang et al. 2025, Eq. 14: R K^T P (K_p K_p^T P + K K^T P + L2 I)^-1."""
    numbers, vectors = np.linalg.eigh(moment.matrix.numpy())
    kept = vectors[:, numbers < THRESHOLD]
    projector = kept @ kept.T
    inner = past @ past.T @ projector + keys @ keys.T @ projector + L2 * np.eye(D_KEY)
    return residuals(weight, bias, keys, values) @ keys.T @ projector @ np.linalg.inv(inner)


FORMULAE = {"emmet": emmet, "memit": memit, "accumulated": accumulated, "lifelong": accumulated, "alphaedit": alphaedit}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", FORMULAE)
def test_a_stream_equals_the_published_formula(name, size, moment):
    weight = EditedWeight(site(), metric_for(name, moment))
    expected = weight.site.weight.detach().numpy().copy()
    bias = weight.site.bias.detach().numpy()
    past = np.zeros((D_KEY, 0))
    for step in range(STREAM // size):
        keys, values = random(size, D_KEY, seed=10 + step), random(size, D_VALUE, seed=50 + step)
        weight.write([f"{step}.{row}" for row in range(size)], Assertion(keys, keys, values, PRESETS[name].ridge))
        weight.commit()
        k, v = keys.numpy().T, values.numpy().T
        expected = expected + FORMULAE[name](expected, bias, moment, k, v, past)
        past = np.concatenate([past, k], axis=1)
        np.testing.assert_allclose(weight.site.weight.detach().numpy(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["accumulated", "lifelong", "alphaedit"])
def test_what_was_taken_back_is_not_remembered(name, moment):
    def written(revert):
        weight = EditedWeight(site(), metric_for(name, moment))
        for step in range(4):
            keys, values = random(1, D_KEY, seed=10 + step), random(1, D_VALUE, seed=50 + step)
            if revert and step == 2:
                other = random(1, D_KEY, seed=99)
                weight.write(["other"], Assertion(other, other, values, PRESETS[name].ridge))
                weight.revert()
            weight.write([str(step)], Assertion(keys, keys, values, PRESETS[name].ridge))
            weight.commit()
        return weight.site.weight.detach().clone()

    assert torch.equal(written(True), written(False))


@pytest.mark.parametrize("name", ["accumulated", "alphaedit", "memit", "emmet"])
def test_undoing_replays_the_metric_too(name, moment):
    def write(weight, steps):
        for step in steps:
            keys, values = random(1, D_KEY, seed=10 + step), random(1, D_VALUE, seed=50 + step)
            weight.write([str(step)], Assertion(keys, keys, values, PRESETS[name].ridge))
            weight.commit()

    undone, never = (EditedWeight(site(), metric_for(name, moment)) for _ in range(2))
    write(undone, range(6))
    undone.remove(["1", "4"])
    write(never, [0, 2, 3, 5])
    torch.testing.assert_close(undone.site.weight, never.site.weight, rtol=1e-12, atol=1e-12)
    write(undone, [7])
    write(never, [7])
    torch.testing.assert_close(undone.site.weight, never.site.weight, rtol=1e-12, atol=1e-12)


def test_past_keys_are_hardly_disturbed(moment):
    """After a stream the first values hold better where the metric knows of them."""
    errors = {}
    for name, metric in (("without", moment.solve), ("with", PastKeys(moment, 1.0))):
        weight = EditedWeight(site(), metric)
        first = random(1, D_KEY, seed=10), random(1, D_VALUE, seed=50)
        for step in range(STREAM):
            keys, values = random(1, D_KEY, seed=10 + step), random(1, D_VALUE, seed=50 + step)
            weight.write([str(step)], Assertion(keys, keys, values))
            weight.commit()
        with torch.no_grad():
            errors[name] = float((weight.site.projection(first[0]) - first[1]).norm())
    assert errors["with"] < 0.5 * errors["without"]


def test_alphaedit_changes_nothing_on_what_text_uses(moment):
    weight = EditedWeight(site(), metric_for("alphaedit", moment))
    before = weight.site.weight.detach().clone()
    keys, values = random(1, D_KEY, seed=10), random(1, D_VALUE, seed=50)
    weight.write(["a"], Assertion(keys, keys, values, 1.0))
    numbers, vectors = torch.linalg.eigh(moment.matrix)
    used = vectors[:, numbers >= THRESHOLD]
    torch.testing.assert_close(weight.site.weight @ used, before @ used, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(weight.site.weight, before)


def test_the_metric_without_edits_stays_as_it_was(moment):
    probe = random(3, D_KEY, seed=7)
    for metric in (PastKeys(moment, 1000.0), NullSpace(moment, L2, THRESHOLD), PlainMetric(moment.solve)):
        before = metric(probe)
        metric.remember(random(2, D_KEY, seed=8))
        torch.testing.assert_close(metric.fixed(probe), before, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(metric.afresh()(probe), before, rtol=1e-12, atol=1e-12)


def test_presets_that_need_a_second_moment_say_so():
    for name in ("accumulated", "lifelong", "alphaedit"):
        with pytest.raises(OptionError, match="cannot do without"):
            metric_for(name, None)


def test_a_null_space_without_dimensions_is_refused(moment):
    with pytest.raises(OptionError, match="no eigenvalue of the second moment is below 1e-09"):
        NullSpace(moment, L2, 1e-9)
