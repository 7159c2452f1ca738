import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rome_pl.second_moments.second_moment import (
    NULL_SPACE,
    RIDGE,
    MomentInfo,
    SecondMoment,
    Spectrum,
    StatisticsError,
    pack_upper,
    unpack_upper,
)
from rome_pl.utils.environment import library_versions
from tests.disk import no_room_on_disk

INFO = MomentInfo(weights="w" * 64, tokenizer="t", layer=3, count=500, corpus="c", model="tiny")


@pytest.fixture
def keys():
    return torch.randn(3000, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def moment(keys):
    return SecondMoment(keys.T @ keys / len(keys), INFO)


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


def test_solve_takes_and_gives_keys_of_any_number_and_precision(moment, keys):
    assert moment.solve(keys[:0]).shape == (0, 12)
    assert moment.solve(keys[:3].float()).dtype == torch.float64
    torch.testing.assert_close(moment.solve(2 * keys[:3]), 2 * moment.solve(keys[:3]), rtol=1e-12, atol=0)


def test_a_singular_matrix_is_solved_by_its_ridge():
    direction = torch.nn.functional.normalize(torch.arange(1.0, 5.0, dtype=torch.float64), dim=0)
    singular = SecondMoment(torch.outer(direction, direction), INFO)
    torch.testing.assert_close(
        singular.solve(direction.unsqueeze(0))[0], direction / (1 + RIDGE / 4), rtol=1e-9, atol=1e-9
    )


# ---- files


def test_a_description_is_read_without_the_matrix(moment, tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    info = MomentInfo(**{**vars(INFO), "source": "corpus.txt", "agreement": 0.97, "date": "2030-01-01T00:00:00+00:00"})
    SecondMoment(moment.matrix, info).save(path)
    monkeypatch.setattr("rome_pl.second_moments.second_moment.unpack_upper", pytest.fail)
    assert SecondMoment.read_info(path) == info


@pytest.mark.parametrize("content", [None, b"", b"text", "truncated", "foreign"])
def test_reading_a_description_refuses_what_loading_refuses(content, moment, tmp_path):
    path = tmp_path / "c.safetensors"
    if content == "truncated":
        moment.save(path)
        path.write_bytes(path.read_bytes()[:-1])
    elif content == "foreign":
        save_file({"other": torch.zeros(6)}, path, metadata={"rome_pl": "{}"})
    elif content is not None:
        path.write_bytes(content)
    for read in (SecondMoment.read_info, SecondMoment.load):
        with pytest.raises(StatisticsError, match=r"c\.safetensors"):
            read(path)


def test_artefacts_of_earlier_versions_still_load(moment, tmp_path):
    old = {name: getattr(INFO, name) for name in ("weights", "tokenizer", "layer", "count", "corpus", "model")}
    path = tmp_path / "c.safetensors"
    save_file({"second_moment": pack_upper(moment.matrix).float()}, path, metadata={"rome_pl": json.dumps(old)})
    assert SecondMoment.load(path).info == INFO
    assert SecondMoment.read_info(path) == INFO


def test_the_shipped_artefacts_load():
    paths = Path(str(files("rome_pl") / "assets")).glob("*.safetensors")
    moments = sorted((SecondMoment.load(path) for path in paths), key=lambda moment: moment.info.layer)
    assert [moment.info.layer for moment in moments] == [0, 1, 2, 3, 4]
    for moment in moments:
        assert len(moment.matrix) == 1536
        assert moment.info.count > 100 * 1536
        assert moment.solve(torch.ones(1, 1536)).isfinite().all()


def test_a_full_disk_leaves_the_older_artefact(moment, tmp_path):
    path = tmp_path / "c.safetensors"
    moment.save(path)
    large = torch.eye(200, dtype=torch.float64)
    with no_room_on_disk(), pytest.raises(OSError, match=r"nothing was changed.*c\.safetensors"):
        SecondMoment(large, INFO).save(path)
    assert len(SecondMoment.load(path).matrix) == 12
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_the_symmetric_half_is_what_is_stored(tmp_path):
    path = tmp_path / "c.safetensors"
    SecondMoment(torch.eye(200, dtype=torch.float64), INFO).save(path)
    assert path.stat().st_size < 200 * 201 // 2 * 4 + 2000


@pytest.mark.parametrize("size", [1, 2, 3, 30])
def test_a_symmetric_matrix_is_packed_and_unpacked(size):
    half = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = half + half.T
    packed = pack_upper(matrix)
    assert packed.shape == (size * (size + 1) // 2,)
    assert packed.tolist() == [float(matrix[row, column]) for row in range(size) for column in range(row, size)]
    assert torch.equal(unpack_upper(packed), matrix)
    assert unpack_upper(packed.float()).dtype == torch.float64


@pytest.mark.parametrize("length", [2, 4, 5, 7, 1000])
def test_other_lengths_are_no_symmetric_half(length):
    with pytest.raises(ValueError, match="no symmetric half"):
        unpack_upper(torch.zeros(length))


# ---- spectrum


def rotated(eigenvalues):
    """A symmetric matrix with these eigenvalues, and their vectors."""
    size = len(eigenvalues)
    vectors = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[
        0
    ]
    return vectors @ torch.diag(eigenvalues) @ vectors.T, vectors


VALUES = torch.tensor([5.0, 2.0, 1.0, 0.5, NULL_SPACE * 1.01, NULL_SPACE * 0.99, 1e-4, 0.0], dtype=torch.float64)


def test_the_spectrum_is_that_of_the_matrix_falling():
    spectrum = SecondMoment(rotated(VALUES)[0], INFO).spectrum()
    torch.testing.assert_close(spectrum.eigenvalues, VALUES, rtol=0, atol=1e-12)
    assert spectrum.ridge == pytest.approx(RIDGE * float(VALUES.mean()))
    assert spectrum.null_dimensions == 3


def test_the_condition_is_that_of_the_matrix_that_solves_use(moment):
    ridged = moment.matrix + RIDGE * moment.matrix.diagonal().mean() * torch.eye(12)
    assert moment.spectrum().condition == pytest.approx(float(torch.linalg.cond(ridged)), rel=1e-9)
    torch.testing.assert_close(moment._factor @ moment._factor.T, ridged, rtol=1e-12, atol=1e-12)


def test_the_ridge_bounds_the_condition():
    singular = torch.tensor([1.0, *[-1e-7] * 7], dtype=torch.float64)  # as rounding in float32 leaves them
    assert Spectrum(singular).condition == pytest.approx(1e6 * 8, rel=1e-5)


def test_effective_rank_counts_the_directions_that_share_the_energy():
    assert SecondMoment(3 * torch.eye(7, dtype=torch.float64), INFO).spectrum().effective_rank == pytest.approx(7)
    assert Spectrum(torch.tensor([4.0, 0.0, 0.0])).effective_rank == pytest.approx(1)
    assert Spectrum(torch.tensor([2.0, 2.0, 0.0])).effective_rank == pytest.approx(2)
    assert 1 < Spectrum(VALUES).effective_rank < 3


def test_versions_name_what_results_depend_on():
    versions = library_versions()
    assert versions["torch"] == torch.__version__
    assert json.loads(json.dumps(versions)) == versions
