"""The second moment of a mixture of experts: one matrix for each expert."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rome_pl.second_moments.moment_sums import MomentSums, PartialSums
from rome_pl.second_moments.second_moment import RIDGE, MomentInfo, SecondMoment, StatisticsError, per_expert
from rome_pl.utils.distributed import Peers

EXPERTS, SIZE, TOKENS = 4, 6, 400


def keys_of_text(seed=0, tokens=TOKENS):
    """Keys of tokens that each reach two experts; the last expert gets five of them."""
    chance = torch.Generator().manual_seed(seed)
    keys = torch.zeros(tokens, EXPERTS, SIZE, dtype=torch.float64)
    for token in range(tokens):
        picked = torch.randperm(3, generator=chance)[:2]
        if token < 5:
            picked[0] = 3
        keys[token, picked] = torch.randn(2, SIZE, generator=chance, dtype=torch.float64) * (1 + picked).unsqueeze(1)
    return keys.flatten(1)


@pytest.fixture
def moment():
    keys = keys_of_text()
    parts = keys.reshape(-1, EXPERTS, SIZE)
    info = MomentInfo("w", "t", 1, TOKENS, "c", experts=EXPERTS)
    return SecondMoment(torch.einsum("tei,tej->eij", parts, parts) / TOKENS, info, parts.any(2).sum(0))


def whole(moment):
    """The second moment as one matrix."""
    return torch.block_diag(*moment.matrix)


def test_sums_of_experts_are_blocks_of_the_sum_of_all():
    keys = keys_of_text()
    sums, plain = MomentSums({0: EXPERTS * SIZE}, 1, experts={0: EXPERTS}), MomentSums({0: EXPERTS * SIZE}, 1)
    for some in keys.split(150):
        assert bool(sums.add(0, 0, some))
        plain.add(0, 0, some)
    dense = plain.matrix(0, 0).reshape(EXPERTS, SIZE, EXPERTS, SIZE)
    for expert in range(EXPERTS):
        torch.testing.assert_close(sums.matrix(0, 0)[expert], dense[expert, :, expert], rtol=1e-6, atol=1e-6)
    assert torch.equal(sums.tokens_of_all(Peers())[0][0], keys.reshape(-1, EXPERTS, SIZE).any(2).sum(0))
    assert plain.tokens_of_all(Peers()) == {}


def test_a_key_that_is_not_finite_is_noticed():
    keys = keys_of_text(tokens=9)
    keys[4, keys[4].nonzero()[0]] = torch.inf
    assert not bool(MomentSums({0: EXPERTS * SIZE}, 1, experts={0: EXPERTS}).add(0, 0, keys))


def test_unfinished_sums_of_experts_are_taken_over_bit_for_bit(tmp_path):
    sums = MomentSums({0: EXPERTS * SIZE, 1: 5}, 2, experts={0: EXPERTS})
    sums.add(0, 0, keys_of_text()), sums.add(0, 1, keys_of_text(1)), sums.add(1, 0, torch.randn(9, 5))
    sums.counts, sums.blocks = [9, 9], {0, 1}
    PartialSums.save(tmp_path / "process-0.safetensors", sums, {})
    again = MomentSums({0: EXPERTS * SIZE, 1: 5}, 2, experts={0: EXPERTS})
    again.merge(PartialSums(tmp_path / "process-0.safetensors"))
    for layer, half in ((0, 0), (0, 1), (1, 0)):
        assert torch.equal(again.matrix(layer, half), sums.matrix(layer, half))
    assert all(torch.equal(*pair) for pair in zip(again.tokens[0], sums.tokens[0], strict=True))


def test_solves_are_those_of_each_expert_by_itself(moment):
    keys = keys_of_text(7, tokens=20)
    matrix = whole(moment)
    for expert, one in enumerate(moment.matrix):
        part = slice(expert * SIZE, (expert + 1) * SIZE)
        matrix[part, part] += RIDGE * one.diagonal().mean() * torch.eye(SIZE)
    expected = torch.linalg.solve(matrix, keys.T).T
    expected[:, 3 * SIZE :] = 0  # it got five tokens for six dimensions
    found = moment.solve(keys)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(moment.apply(keys), keys @ whole(moment), rtol=1e-12, atol=1e-12)
    assert moment.typical_norm == pytest.approx(float(whole(moment).trace().sqrt()))
    expected = torch.linalg.eigvalsh(whole(moment)).flip(0)
    torch.testing.assert_close(moment.spectrum().eigenvalues, expected, rtol=1e-9, atol=1e-9)


def test_only_experts_that_a_key_reaches_are_factorised(moment):
    keys = torch.zeros(1, EXPERTS * SIZE, dtype=torch.float64)
    keys[0, SIZE : 2 * SIZE] = 1
    moment.solve(keys)
    assert [known is not None and "_factor" in vars(known) for known in moment.known] == [False, True, False, False]


def test_parts_that_are_zero_stay_zero_and_their_functions_are_not_called():
    keys = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = per_expert(keys, [lambda part: part + 1, pytest.fail])
    assert found.tolist() == [[2.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_a_saved_moment_is_read_as_it_was(moment, tmp_path):
    moment.save(tmp_path / "a.safetensors")
    found = SecondMoment.load(tmp_path / "a.safetensors")
    torch.testing.assert_close(found.matrix, moment.matrix, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.tokens, moment.tokens)
    assert found.info == SecondMoment.read_info(tmp_path / "a.safetensors") == moment.info
    assert torch.equal(found.to(torch.device("cpu")).tokens, moment.tokens)


@pytest.mark.parametrize("experts", [1, 3, 5])
def test_a_file_with_another_number_of_experts_is_refused(experts, moment, tmp_path):
    path = tmp_path / "a.safetensors"
    replace(moment, info=replace(moment.info, experts=experts)).save(path)
    with pytest.raises(StatisticsError, match=r"experts|hal(f|ves)|fit"):
        SecondMoment.load(path)


def test_changed_numbers_of_tokens_are_noticed(moment, tmp_path):
    path = tmp_path / "a.safetensors"
    moment.save(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
    tensors = load_file(path)
    tensors["tokens"][3] = 1000
    save_file(tensors, path, metadata=notes)
    assert json.loads(notes["rome_pl"])["experts"] == EXPERTS
    with pytest.raises(StatisticsError, match="the checksum of its matrix does not fit"):
        SecondMoment.load(path)
