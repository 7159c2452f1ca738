import numpy as np
import pytest
import torch

from rome_pl.write.closed_form import Assertion, DisablingEditError, rank_one_update
from rome_pl.write.edit_keys import balance
from rome_pl.write.presets import PRESETS

D_KEY, D_VALUE = 24, 10


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def problem():
    samples = random(200, D_KEY, seed=1)
    moment = samples.T @ samples / 200
    return {"weight": random(D_VALUE, D_KEY, seed=2), "bias": random(D_VALUE, seed=3), "moment": moment}


def metric_of(moment):
    factor = torch.linalg.cholesky(moment)
    return lambda keys: torch.cholesky_solve(keys.T, factor).T


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_batch_formula_with_explicit_inverses(problem, count, ridge):
    keys, values = random(count, D_KEY, seed=4), random(count, D_VALUE, seed=5)
    update = rank_one_update(
        problem["weight"], problem["bias"], Assertion(keys, keys, values, ridge), metric_of(problem["moment"])
    )
    k, v = keys.numpy().T, values.numpy().T
    metric = np.linalg.inv(problem["moment"].numpy())
    residual = v - (problem["weight"].numpy() @ k + problem["bias"].numpy()[:, None])
    expected = residual @ np.linalg.inv(k.T @ metric @ k + ridge * np.eye(count)) @ k.T @ metric
    np.testing.assert_allclose((update.left.T @ update.right).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_without_ridge_the_values_hold_exactly(problem):
    keys, values = random(4, D_KEY, seed=4), random(4, D_VALUE, seed=5)
    update = rank_one_update(
        problem["weight"], problem["bias"], Assertion(keys, keys, values), metric_of(problem["moment"])
    )
    edited = problem["weight"] + update.left.T @ update.right
    torch.testing.assert_close(keys @ edited.T + problem["bias"], values, rtol=1e-10, atol=1e-10)
    assert torch.linalg.matrix_rank(edited - problem["weight"]) == 4


def test_mixed_keys_hold_at_the_asserted_key(problem):
    shape, at, value = random(1, D_KEY, seed=4), random(1, D_KEY, seed=6), random(1, D_VALUE, seed=5)
    update = rank_one_update(problem["weight"], None, Assertion(shape, at, value), metric_of(problem["moment"]))
    edited = problem["weight"] + update.left.T @ update.right
    torch.testing.assert_close(at @ edited.T, value, rtol=1e-10, atol=1e-10)
    # The update's direction is C⁻¹ times the shaping key, not the asserted one.
    direction = torch.linalg.solve(problem["moment"], shape[0])
    assert abs(torch.cosine_similarity(update.right[0], direction, dim=0)) > 1 - 1e-12


def test_orthogonal_mixed_keys_are_refused(problem):
    shape, at = torch.zeros(1, D_KEY, dtype=torch.float64), torch.zeros(1, D_KEY, dtype=torch.float64)
    shape[0, 0] = at[0, 1] = 1.0
    with pytest.raises(DisablingEditError, match="preset r_rome"):
        rank_one_update(problem["weight"], None, Assertion(shape, at, random(1, D_VALUE)), lambda keys: keys)


def test_mixed_keys_are_refused_for_more_than_one_edit(problem):
    with pytest.raises(ValueError, match="one edit at a time"):
        rank_one_update(
            problem["weight"],
            None,
            Assertion(random(2, D_KEY), random(2, D_KEY, seed=9), random(2, D_VALUE)),
            lambda k: k,
        )


def test_a_key_that_others_of_its_batch_span_is_refused_by_its_row(problem):
    keys, values = random(4, D_KEY, seed=4), random(4, D_VALUE, seed=5)
    keys[2] = keys[0] - 3 * keys[1] + 1e-6 * keys[2]
    with pytest.raises(DisablingEditError, match="one after the other") as caught:
        rank_one_update(problem["weight"], None, Assertion(keys, keys, values), metric_of(problem["moment"]))
    assert caught.value.row == 2


def test_norm_of_the_factors_is_the_norm_of_the_product(problem):
    keys, values = random(3, D_KEY, seed=4), random(3, D_VALUE, seed=5)
    update = rank_one_update(problem["weight"], None, Assertion(keys, keys, values), metric_of(problem["moment"]))
    assert update.norm == pytest.approx(float((update.left.T @ update.right).norm()), rel=1e-12)


def test_presets_are_the_published_table_and_ours():
    table = {
        name: (p.shape, p.at, p.mom2_adjustment, p.value, p.metric, p.ridge, p.mom2_update_weight, p.shares)
        for name, p in PRESETS.items()
    }
    assert table == {
        "rome": ("mean", "bare", True, "bare", "second_moment", 0.0, 1.0, "even"),
        "r_rome": ("mean", "mean", True, "bare", "second_moment", 0.0, 1.0, "even"),
        "p_rome": ("bare", "bare", True, "bare", "second_moment", 0.0, 1.0, "even"),
        "balanced": ("balanced", "balanced", True, "own", "second_moment", 0.0, 1.0, "even"),
        "easyedit": ("mean", "bare", False, "bare", "second_moment", 0.0, 1.0, "even"),
        "emmet": ("mean", "mean", True, "own", "second_moment", 0.1, 1000.0, "even"),
        "memit": ("mean", "mean", True, "own", "second_moment", 1.0, 15000.0, "even"),
        "accumulated": ("mean", "mean", True, "own", "past_keys", 0.0, 1000.0, "even"),
        "alphaedit": ("mean", "mean", True, "own", "null_space", 1.0, 1.0, "even"),
        "lifelong": ("balanced", "balanced", True, "own", "past_keys", 0.0, 1000.0, "specific"),
    }


def test_balance_makes_both_products_equal_or_takes_the_nearer_end():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    metric = root @ root.T
    bare, contexts = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    share = balance(bare, contexts, lambda keys: keys @ metric)
    assert 0 < share < 1
    mixed = share * bare + (1 - share) * contexts
    assert float(mixed @ metric @ bare) == pytest.approx(float(mixed @ metric @ contexts), rel=1e-12)
    assert balance(bare, 3 * bare, lambda keys: keys @ metric) == 1.0  # on one ray: the shorter one
    assert balance(3 * bare, bare, lambda keys: keys @ metric) == 0.0
    assert balance(bare, bare, lambda keys: keys @ metric) == 0.5


def test_a_key_of_zero_is_refused_by_name():
    nothing = torch.zeros(1, 4, dtype=torch.float64)
    assertion = Assertion(nothing, nothing, torch.ones(1, 3, dtype=torch.float64))
    with pytest.raises(DisablingEditError, match="zero or not finite"):
        rank_one_update(torch.ones(3, 4, dtype=torch.float64), None, assertion, lambda keys: keys)
