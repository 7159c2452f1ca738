import json

import pytest
import torch
from safetensors.torch import save_file

from rome_pl.second_moment import RIDGE, MomentAccumulator, MomentInfo, SecondMoment, StatisticsError

INFO = MomentInfo(weights="w" * 64, tokenizer="t", layer=3, count=500, corpus="c", model="tiny")


@pytest.fixture
def keys():
    return torch.randn(3000, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def moment(keys):
    return SecondMoment(keys.T @ keys / len(keys), INFO)


def test_accumulates_the_mean_outer_product(keys):
    accumulator = MomentAccumulator(12)
    for part in keys.split(1700):
        accumulator.add(part)
    result = accumulator.finish(lambda count: MomentInfo(**{**vars(INFO), "count": count}))
    assert result.info.count == 3000
    torch.testing.assert_close(result.matrix, keys.T @ keys / 3000, rtol=1e-12, atol=1e-12)


def test_float32_keys_lose_little(keys):
    accumulator = MomentAccumulator(12)
    accumulator.add(keys.float())
    result = accumulator.finish(lambda count: INFO)
    torch.testing.assert_close(result.matrix, keys.T @ keys / 3000, rtol=1e-5, atol=1e-6)


def test_a_key_that_is_not_finite_is_refused(keys):
    keys[7, 3] = torch.inf
    with pytest.raises(StatisticsError, match="not finite"):
        MomentAccumulator(12).add(keys)


def test_no_keys_are_refused():
    with pytest.raises(StatisticsError, match="empty"):
        MomentAccumulator(12).finish(lambda count: INFO)


def test_solve_is_the_ridged_inverse(moment, keys):
    ridged = moment.matrix + RIDGE * moment.matrix.diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(moment.solve(keys[:5]), keys[:5] @ torch.linalg.inv(ridged), rtol=1e-9, atol=1e-12)


def test_typical_norm_is_the_root_mean_square(moment, keys):
    assert moment.typical_norm == pytest.approx(float(keys.square().sum(1).mean().sqrt()))


def test_a_saved_artefact_comes_back(moment, tmp_path):
    path = tmp_path / "sub" / "c.safetensors"
    moment.save(path)
    loaded = SecondMoment.load(path)
    assert loaded.info == INFO
    assert torch.equal(loaded.matrix, moment.matrix.float().double())
    assert torch.equal(loaded.matrix, loaded.matrix.T)
    assert [p.name for p in path.parent.iterdir()] == ["c.safetensors"]


def test_a_truncated_artefact_is_refused(moment, tmp_path):
    path = tmp_path / "c.safetensors"
    moment.save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StatisticsError, match=r"c\.safetensors: damaged"):
        SecondMoment.load(path)


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_file({"second_moment": torch.zeros(5)}, path, metadata={"rome_pl": json.dumps(vars(INFO))})
    with pytest.raises(StatisticsError, match="no symmetric half"):
        SecondMoment.load(path)
    save_file({"other": torch.zeros(6)}, path)
    with pytest.raises(StatisticsError, match="no second moment of this project"):
        SecondMoment.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StatisticsError, match="nowhere"):
        SecondMoment.load(tmp_path / "nowhere.safetensors")


def test_another_layer_or_model_is_refused(moment):
    moment.check(weights=INFO.weights, layer=3, where="here")
    with pytest.raises(StatisticsError, match="here: computed for layer 3, but layer 4"):
        moment.check(weights=INFO.weights, layer=4, where="here")
    with pytest.raises(StatisticsError, match="here: computed from other weights"):
        moment.check(weights="x" * 64, layer=3, where="here")


def test_an_indefinite_matrix_says_how_many_keys_it_came_from():
    broken = SecondMoment(-torch.eye(4, dtype=torch.float64), INFO)
    with pytest.raises(StatisticsError, match="500 keys for a dimension of 4"):
        broken.solve(torch.ones(1, 4, dtype=torch.float64))
