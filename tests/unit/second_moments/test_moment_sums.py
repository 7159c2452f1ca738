import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rome_pl.model.architecture import RewriteSite, decoder_layers, find_site
from rome_pl.second_moments.moment_sums import PRODUCT_KEYS, MomentSums, PartialSums, half_of, keys_of
from rome_pl.second_moments.second_moment import StatisticsError
from tests.disk import no_room_on_disk
from tests.tiny import FAMILIES, LAYERS, tiny_model


def random_keys(number, size, seed=0):
    return torch.randn(number, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sums_of(keys, halves=1, layer=0, blocks=()):
    """Sums of one layer, keys dealt to the halves in turn."""
    sums = MomentSums({layer: keys.shape[1]}, halves)
    for half, part in enumerate(keys.chunk(halves)):
        sums.add(layer, half, part)
        sums.counts[half] += len(part)
    sums.blocks |= set(blocks)
    return sums


def saved(path, sums, **notes):
    PartialSums.save(path, sums, notes)
    return PartialSums(path)


# ---- halves


@pytest.mark.parametrize("blocks", [2, 3, 5, 8, 16, 45, 100])
def test_halves_are_nearly_equal_and_every_block_belongs_to_one(blocks):
    members = [half_of(block, 2, blocks) for block in range(blocks)]
    assert set(members) == {0, 1}
    assert abs(members.count(0) - members.count(1)) <= 4
    for boundary in (blocks // 4, blocks // 2):  # where halves are compared
        if boundary >= 2:
            assert set(members[:boundary]) == {0, 1}
    assert {half_of(block, 1, blocks) for block in range(blocks)} == {0}


def test_neighbouring_blocks_of_a_long_text_share_a_half():
    assert [half_of(block, 2, 100) for block in range(10)] == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]


# ---- sums


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 12, 13, 36, 37, 48, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_sum_is_that_of_outer_products_whatever_the_size(size, dtype, tolerance):
    keys = random_keys(2 * PRODUCT_KEYS + 77, size)
    expected = keys.T @ keys
    matrix = sums_of(keys.to(dtype)).matrix(0, 0)
    assert matrix.dtype == torch.float64
    assert float((matrix - expected).norm() / expected.norm()) < tolerance
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_in_half_precision_are_multiplied_in_float32(dtype):
    keys = random_keys(3000, 13).to(dtype)
    expected = keys.double().T @ keys.double()
    assert float((sums_of(keys).matrix(0, 0) - expected).norm() / expected.norm()) < 1e-5


def test_late_keys_are_not_lost_in_a_large_sum():
    """A sum in float32 would stand still."""
    sums = MomentSums({0: 1}, 1)
    sums.totals[0][0].fill_(2.0**30)
    for _ in range(100):
        sums.add(0, 0, torch.ones(1, 1))
    assert float(sums.matrix(0, 0)) == 2.0**30 + 100


def test_a_float32_product_takes_few_keys_only():
    """The second thousand would be lost beside the first in one product of both."""
    keys = torch.cat([torch.full((PRODUCT_KEYS, 1), 4096.0), torch.ones(PRODUCT_KEYS, 1)])
    assert PRODUCT_KEYS <= 1024
    assert float(sums_of(keys).matrix(0, 0)) == PRODUCT_KEYS * (4096.0**2 + 1)


@given(order=st.permutations(range(40)), lots=st.lists(st.integers(1, 39), max_size=4))
@settings(derandomize=True, database=None, max_examples=40, deadline=None)
def test_order_and_lots_of_keys_change_only_rounding(order, lots):
    keys = random_keys(40, 7)
    sums = MomentSums({0: 7}, 1)
    for part in keys[list(order)].tensor_split(sorted(lots)):
        sums.add(0, 0, part)
    torch.testing.assert_close(sums.matrix(0, 0), keys.T @ keys, rtol=1e-12, atol=1e-12)


def test_no_keys_change_nothing():
    sums = MomentSums({0: 5}, 1)
    assert bool(sums.add(0, 0, torch.zeros(0, 5)))
    assert not sums.matrix(0, 0).any()


def test_layers_and_halves_are_summed_apart():
    sums = MomentSums({2: 3, 5: 4}, 2)
    assert sums.halves == 2
    parts = {(layer, half): random_keys(9, size, layer + half) for layer, size in ((2, 3), (5, 4)) for half in (0, 1)}
    for (layer, half), keys in parts.items():
        sums.add(layer, half, keys)
    for (layer, half), keys in parts.items():
        torch.testing.assert_close(sums.matrix(layer, half), keys.T @ keys, rtol=1e-12, atol=1e-12)


def test_a_matrix_is_a_copy():
    sums = sums_of(random_keys(9, 5))
    sums.matrix(0, 0).zero_()
    assert sums.matrix(0, 0).any()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.inf, torch.float64),
        (-torch.inf, torch.float32),
        (torch.nan, torch.float32),
        (torch.nan, torch.float64),
        (torch.inf, torch.float16),
        (1e25, torch.float32),  # its square is beyond float32
    ],
)
@pytest.mark.parametrize("row", [0, PRODUCT_KEYS - 1, PRODUCT_KEYS, PRODUCT_KEYS + 5])
def test_a_key_that_is_not_finite_is_reported(value, dtype, row):
    keys = random_keys(PRODUCT_KEYS + 6, 13).to(dtype)
    assert bool(MomentSums({0: 13}, 1).add(0, 0, keys))
    keys[row, 7] = value
    assert not bool(MomentSums({0: 13}, 1).add(0, 0, keys))


# ---- on disk


@pytest.mark.parametrize("halves", [1, 2])
def test_partial_sums_come_back_bit_for_bit(halves, tmp_path):
    sums = MomentSums({1: 13, 4: 7}, halves)
    for layer, size in ((1, 13), (4, 7)):
        for half in range(halves):
            sums.add(layer, half, random_keys(50, size, layer).float())
    sums.counts, sums.blocks = [40, 10][:halves], {0, 3, 7}
    part = saved(tmp_path / "p.safetensors", sums, absorbed=["x"], history=[{"blocks": 3}])
    assert (part.counts, part.blocks) == (sums.counts, {0, 3, 7})
    assert part.notes == {"absorbed": ["x"], "history": [{"blocks": 3}]}
    back = MomentSums({1: 13, 4: 7}, halves)
    back.merge(part)
    assert (back.counts, back.blocks) == (sums.counts, sums.blocks)
    for layer in (1, 4):
        for half in range(halves):
            assert torch.equal(back.matrix(layer, half), sums.matrix(layer, half))


def test_a_resumed_sum_goes_on_with_the_same_bits(tmp_path):
    keys = random_keys(4000, 13).float().split(500)
    whole = MomentSums({0: 13}, 1)
    for part in keys:
        whole.add(0, 0, part)
    first = sums_of(torch.cat(keys[:1]), blocks=[0])
    for part in keys[1:4]:
        first.add(0, 0, part)
    again = MomentSums({0: 13}, 1)
    again.merge(saved(tmp_path / "p.safetensors", first))
    for part in keys[4:]:
        again.add(0, 0, part)
    assert torch.equal(again.matrix(0, 0), whole.matrix(0, 0))


def test_a_large_count_is_kept(tmp_path):
    sums = sums_of(random_keys(5, 3), blocks=[0])
    sums.counts = [2**40 + 1]
    assert saved(tmp_path / "p.safetensors", sums).counts == [2**40 + 1]


def test_several_parts_add_up(tmp_path):
    keys = random_keys(60, 13)
    parts = [
        saved(tmp_path / f"p{index}.safetensors", sums_of(part, halves=2, blocks=[index, index + 10]))
        for index, part in enumerate(keys.split(20))
    ]
    sums = MomentSums({0: 13}, 2)
    for part in parts:
        sums.merge(part)
    assert sums.counts == [30, 30]
    assert sums.blocks == {0, 1, 2, 10, 11, 12}
    torch.testing.assert_close(sums.matrix(0, 0) + sums.matrix(0, 1), keys.T @ keys, rtol=1e-12, atol=1e-12)


def test_a_block_that_two_parts_hold_is_refused_and_named(tmp_path):
    one = saved(tmp_path / "one.safetensors", sums_of(random_keys(9, 5), blocks=[0, 4, 6]))
    two = saved(tmp_path / "two.safetensors", sums_of(random_keys(9, 5), blocks=[5, 6, 7]))
    sums = MomentSums({0: 5}, 1)
    sums.merge(one)
    before = sums.matrix(0, 0)
    with pytest.raises(StatisticsError, match=r"two\.safetensors: holds block 6.*delete"):
        sums.merge(two)
    assert torch.equal(sums.matrix(0, 0), before)
    assert (sums.counts, sums.blocks) == ([9], {0, 4, 6})


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "other", "no notes"])
def test_damaged_partial_sums_are_named(damage, tmp_path):
    path = tmp_path / "p.safetensors"
    PartialSums.save(path, sums_of(random_keys(9, 5), blocks=[0]), {})
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "missing":
        path.unlink()
    elif damage == "no notes":
        from safetensors.torch import save_file

        save_file({"counts": torch.tensor([1]), "blocks": torch.tensor([0])}, path)
    else:
        path.write_bytes(b"" if damage == "empty" else b"nothing of the kind" * 20)
    with pytest.raises(StatisticsError, match=r"p\.safetensors: damaged partial sums .*delete the file"):
        PartialSums(path)


def test_a_full_disk_leaves_the_sums_that_were_saved_before(tmp_path):
    path = tmp_path / "p.safetensors"
    PartialSums.save(path, sums_of(random_keys(9, 5), blocks=[0]), {})
    before = path.read_bytes()
    with no_room_on_disk(), pytest.raises(OSError, match=r"nothing was changed.*p\.safetensors"):
        PartialSums.save(path, sums_of(random_keys(90, 80), blocks=[0, 1]), {})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


# ---- keys of a model


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_those_of_a_plain_forward_and_nothing_runs_beyond_them(family):
    model = tiny_model(family)
    sites = [find_site(model, layer) for layer in (0, 1)]
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    expected, ran, found = {}, [], []
    handles = [
        site.projection.register_forward_hook(
            lambda _, inputs, __, site=site: expected.__setitem__(site.layer, inputs[0].reshape(-1, site.d_key).clone())
        )
        for site in sites
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    before = hooks_of(model)
    last = sites[-1].projection
    beyond = [last, *decoder_layers(model)[1][2:], model.get_output_embeddings()]
    watched = [module.register_forward_hook(lambda module, *_: ran.append(type(module).__name__)) for module in beyond]
    with torch.no_grad(), keys_of(sites, lambda layer, keys: found.append((layer, keys))):
        model(input_ids=ids, use_cache=False)
        pytest.fail("the forward went on to its end")
    for handle in watched:
        handle.remove()
    assert ran == []
    assert [layer for layer, _ in found] == [0, 1]
    assert all(torch.equal(keys, expected[layer]) for layer, keys in found)
    assert all(keys.shape == (18, site.d_key) for (_, keys), site in zip(found, sites, strict=True))
    assert hooks_of(model) == before


def test_hooks_are_removed_after_an_error():
    model = tiny_model("llama")
    before = hooks_of(model)

    def fails(*_):
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"), keys_of([find_site(model, 1)], fails):
        model(input_ids=torch.tensor([[1, 2]]))
    assert hooks_of(model) == before


def test_flat_inputs_are_keys_too():
    """Some families hand their MLP ``[rows · length, d]``."""
    projection, found = nn.Linear(4, 2), []
    site = RewriteSite(3, "3.weight", projection, transposed=False)
    with keys_of([site], lambda layer, keys: found.append((layer, keys))):
        projection(torch.ones(6, 4))
    assert found[0][0] == 3
    assert found[0][1].shape == (6, 4)


def test_the_deepest_layer_can_be_the_last():
    model = tiny_model("gpt2")
    found = []
    with torch.no_grad(), keys_of([find_site(model, LAYERS - 1)], lambda layer, _: found.append(layer)):
        model(input_ids=torch.tensor([[1, 2]]))
    assert found == [LAYERS - 1]
