import pytest
import torch

from rome_pl.export.low_rank import low_rank
from rome_pl.write.closed_form import Update

SIZES = {"few edits": (5, 24, 36), "more edits than the weight has rows": (50, 24, 36), "one edit": (1, 24, 36)}


def made(n, d_value, d_key, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return Update(
        torch.randn(n, d_value, generator=chance, dtype=torch.float64),
        torch.randn(n, d_key, generator=chance, dtype=torch.float64),
    )


def change(update):
    return update.left.T @ update.right


def measured(found, update):
    whole = change(update)
    return float((found.up.double() @ found.down.double() - whole).norm() / whole.norm())


@pytest.mark.parametrize("name", SIZES)
def test_a_change_in_as_many_factors_as_its_rank(name):
    update = made(*SIZES[name])
    found = low_rank(update)
    n, d_value, d_key = SIZES[name]
    assert found.rank == found.full_rank == min(n, d_value, d_key)
    assert (found.down.shape, found.up.shape) == ((found.rank, d_key), (d_value, found.rank))
    assert (found.down.dtype, found.up.dtype) == (torch.float32, torch.float32)
    assert found.error == pytest.approx(measured(found, update), rel=1e-6)
    assert found.error < 1e-6


def test_edits_of_one_key_share_a_factor():
    update = made(6, 24, 36)
    update = Update(update.left, update.right[[0, 0, 0, 1, 1, 2]])
    assert low_rank(update).rank == 3


@pytest.mark.parametrize("rank", [1, 3, 8, 24, 100])
def test_a_smaller_rank_lacks_the_least_possible_and_says_how_much(rank):
    update = made(50, 24, 36)
    found = low_rank(update, rank)
    sizes = torch.linalg.svdvals(change(update))
    best = float(sizes[rank:].norm() / sizes.norm())
    assert (found.rank, found.full_rank) == (min(rank, 24), 24)
    assert found.error == pytest.approx(measured(found, update), rel=1e-6)
    assert found.error == pytest.approx(best, abs=1e-6)


def test_no_change_has_no_factors():
    found = low_rank(Update(torch.zeros(2, 5, dtype=torch.float64), made(2, 5, 7).right))
    assert (found.rank, found.full_rank, found.error) == (0, 0, 0.0)
    assert found.up.shape == (5, 0)


def test_factors_of_very_different_sizes_lose_none():
    update = made(4, 24, 36)
    scale = torch.tensor([1e-3, 1.0, 10.0, 300.0], dtype=torch.float64).unsqueeze(1)
    update = Update(update.left * scale, update.right)
    assert low_rank(update).rank == 4
