import numpy
import pytest
import torch

from rome_pl.interop.npz_statistics import export_npz, import_npz
from rome_pl.model.architecture import find_site
from rome_pl.second_moments.second_moment import MomentInfo, SecondMoment, StatisticsError
from tests.disk import no_room_on_disk
from tests.tiny import tiny_language_model

COUNT = 700


@pytest.fixture(scope="module")
def gpt2():
    return tiny_language_model("gpt2")


@pytest.fixture(scope="module")
def site(gpt2):
    return find_site(gpt2.model, 1)


@pytest.fixture
def moment(gpt2, site):
    keys = torch.randn(COUNT, site.d_key, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    info = MomentInfo(gpt2.fingerprint_below(site), gpt2.tokenizer_fingerprint, 1, COUNT, "corpus")
    return SecondMoment(keys.T @ keys / COUNT, info)


def published(path, **changes):
    """A file as kmeng01/rome's running statistics write it."""
    arrays = {
        "mom2.constructor": numpy.array("util.runningstats.SecondMoment()"),
        "mom2.count": numpy.array(COUNT),
        "mom2.mom2": numpy.eye(48, dtype=numpy.float32),
        "sample_size": numpy.array(COUNT),
        **changes,
    }
    numpy.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_a_file_is_named_and_filled_as_the_published_ones_are(moment, site, tmp_path):
    path = export_npz(moment, tmp_path / "gpt2" / "wikipedia_stats", site)
    assert path == tmp_path / "gpt2" / "wikipedia_stats" / f"transformer.h.1.mlp.c_proj_float32_mom2_{COUNT}.npz"
    assert list(path.parent.iterdir()) == [path]
    with numpy.load(path, allow_pickle=False) as file:
        content = {name: file[name] for name in file}
    assert int(content["mom2.count"]) == COUNT
    assert content["sample_size"] == COUNT  # what their loader compares with what it was asked for
    assert content["mom2.constructor"].item() == "util.runningstats.SecondMoment()"
    assert content["mom2.mom2"].dtype == numpy.float32
    # A sum, not a mean: their loader divides by the count.
    torch.testing.assert_close(
        torch.from_numpy(content["mom2.mom2"]) / COUNT, moment.matrix.float(), rtol=1e-5, atol=1e-6
    )


def test_what_was_exported_is_imported_again(moment, gpt2, site, tmp_path):
    path = export_npz(moment, tmp_path, site)
    again = import_npz(path, gpt2, site)
    torch.testing.assert_close(again.matrix, moment.matrix, rtol=1e-6, atol=1e-7)
    assert again.matrix.dtype == torch.float64
    assert torch.equal(again.matrix, again.matrix.T)
    assert (again.info.layer, again.info.count, again.info.source) == (1, COUNT, path.name)
    again.check(weights=gpt2.fingerprint_below(site), layer=1, where="here")
    again.save(tmp_path / "c.safetensors")
    assert SecondMoment.load(tmp_path / "c.safetensors").info == again.info


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float64])
def test_a_published_sum_is_imported_as_a_mean(dtype, gpt2, site, tmp_path):
    path = published(tmp_path / "p.npz", **{"mom2.mom2": 1400 * numpy.eye(48, dtype=dtype)})
    assert torch.equal(import_npz(path, gpt2, site).matrix, 2 * torch.eye(48, dtype=torch.float64))


def test_sums_that_rounding_left_unsymmetric_become_symmetric(gpt2, site, tmp_path):
    total = numpy.eye(48, dtype=numpy.float32)
    total[0, 1], total[1, 0] = 0.5, 0.25
    matrix = import_npz(published(tmp_path / "p.npz", **{"mom2.mom2": total}), gpt2, site).matrix
    assert torch.equal(matrix, matrix.T)
    assert float(matrix[0, 1]) == pytest.approx(0.375 / COUNT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mom2.mom2": numpy.eye(47)},
            r"a matrix \(47, 47\), but keys of layer 1 have length 48; it is of another model",
        ),
        ({"mom2.mom2": numpy.ones((48, 47))}, "of another model"),
        ({"mom2.mom2": numpy.ones(48)}, "of another model"),
        ({"mom2.count": numpy.array(0)}, "sums 0 keys"),
        ({"mom2.mom2": numpy.full((48, 48), numpy.nan)}, "not finite"),
        ({"mom2.mom2": None}, "no statistics in the published form"),
        ({"mom2.count": None}, "no statistics in the published form"),
        ({"mom2.count": numpy.array([1, 2])}, "no statistics in the published form"),
        ({"mom2.mom2": numpy.array([["a"] * 48] * 48)}, "no statistics in the published form"),
    ],
)
def test_a_file_of_another_shape_or_form_is_refused(changes, message, gpt2, site, tmp_path):
    with pytest.raises(StatisticsError, match=rf"p\.npz: .*{message}"):
        import_npz(published(tmp_path / "p.npz", **changes), gpt2, site)


def test_pickled_objects_are_refused_and_not_run(gpt2, site, tmp_path):
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return ran.touch, ()

    for name in ("mom2.mom2", "mom2.count"):
        path = published(tmp_path / "p.npz", **{name: numpy.array([[Trap()]], dtype=object)})
        with pytest.raises(StatisticsError, match="no statistics in the published form"):
            import_npz(path, gpt2, site)
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "npy", "truncated", "corrupted", "folder"])
def test_what_is_no_such_file_is_refused(kind, gpt2, site, tmp_path):
    path = published(tmp_path / "p.npz")
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "npy":
        with path.open("wb") as file:
            numpy.save(file, numpy.eye(48))
    elif kind != "missing":
        middle = len(content) // 2
        path.write_bytes(
            {
                "empty": b"",
                "text": b"nothing of the kind",
                "truncated": content[:middle],
                "corrupted": content[:middle] + bytes(100) + b"\1" + content[middle + 101 :],
            }[kind]
        )
    with pytest.raises(StatisticsError, match=r"p\.npz: no statistics in the published form"):
        import_npz(path, gpt2, site)


def test_a_full_disk_leaves_an_older_export(moment, site, tmp_path):
    path = export_npz(moment, tmp_path, site)
    before = path.read_bytes()
    with no_room_on_disk(), pytest.raises(OSError, match=r"nothing was changed.*\.npz"):
        export_npz(moment, tmp_path, site)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
