import json
from importlib.resources import files

import pytest
import torch

from rome_pl.model.architecture import find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.second_moments.split_half import PROBES, agreement_of_halves, keeps_documents_apart, probe_keys
from tests.tiny import FAMILIES, KeepFloat64, byte_level_tokenizer, tiny_language_model, tiny_model

LEAKING = ("opt", "bloom", "falcon")
TEXTS = ("Bread needs time.", "Nobody had seen the keeper since the storm.", "The tide comes in.")


def plain_keys(model, site, **inputs):
    """Keys of a plain forward through the whole model."""
    kept = []
    handle = site.projection.register_forward_hook(lambda _, inputs, __: kept.append(inputs[0].reshape(-1, site.d_key)))
    with torch.no_grad():
        model(use_cache=False, **inputs)
    handle.remove()
    return kept[0]


# ---- agreement


def uneven_keys(number, size=24, seed=0):
    """Keys whose directions differ much in length, as those of models do."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -3, size, dtype=torch.float64)
    return torch.randn(number, size, dtype=torch.float64, generator=generator) * scales


def halves_of(number):
    one, other = uneven_keys(2 * number, seed=number).chunk(2)
    return one.T @ one, other.T @ other


PROBE = uneven_keys(16, seed=99)


def test_equal_halves_agree_fully():
    half, _ = halves_of(500)
    assert agreement_of_halves(half, half.clone(), PROBE) == pytest.approx(1.0, abs=1e-12)


def test_only_directions_count():
    one, other = halves_of(200)
    agreement = agreement_of_halves(one, other, PROBE)
    assert agreement < 0.999
    assert agreement_of_halves(one * 1000, other / 7, PROBE * 3) == pytest.approx(agreement, abs=1e-9)
    assert agreement_of_halves(other, one, PROBE) == pytest.approx(agreement, abs=1e-12)
    half, _ = halves_of(500)
    assert agreement_of_halves(half, half * 1e-4, PROBE) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("empty", [0, 1])
def test_an_empty_half_agrees_with_nothing(empty):
    halves = list(halves_of(100))
    halves[empty].zero_()
    assert agreement_of_halves(*halves, PROBE) == 0.0


def test_agreement_grows_with_the_text():
    agreements = [agreement_of_halves(*halves_of(number), PROBE) for number in (30, 100, 1000, 20000)]
    assert agreements == sorted(agreements)
    assert agreements[0] < 0.95
    assert agreements[-1] > 0.998


def test_agreement_sees_what_norms_do_not():
    """Two matrices that differ only in directions that text hardly has: nearly equal, but not their inverses."""
    half, _ = halves_of(5000)
    values, vectors = torch.linalg.eigh(half)
    bent = half + vectors[:, :8] @ torch.diag(values[:8] * 30) @ vectors[:, :8].T
    assert float((bent - half).norm() / half.norm()) < 1e-2
    assert agreement_of_halves(half, bent, PROBE) < 0.8


def test_too_few_keys_for_the_dimension_still_compare():
    one, other = halves_of(10)
    assert -1 <= agreement_of_halves(one, other, PROBE) < 0.9


# ---- probes


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_probes_are_the_keys_at_the_last_subject_token(family, bos):
    tokenizer = byte_level_tokenizer(bos)
    language_model = LanguageModel(tiny_model(family), tokenizer)
    sites = [find_site(language_model.model, layer) for layer in (0, 2)]
    found = probe_keys(language_model, sites)
    content = (files("rome_pl") / "assets" / "sample_records.json").read_text(encoding="utf-8")
    expected = {0: [], 2: []}
    for record in json.loads(content)[:PROBES]:
        subject, prompt = record["requested_rewrite"]["subject"], record["requested_rewrite"]["prompt"]
        # The prompt up to the subject is the same text whatever follows: no token of these crosses the subject's end.
        encoded = tokenizer(prompt.format(subject), return_offsets_mapping=True)
        end = prompt.index("{}") + len(subject)
        last = next(i for i, (first, after) in enumerate(encoded["offset_mapping"]) if first < end <= after)
        for site in sites:
            keys = plain_keys(language_model.model, site, input_ids=torch.tensor([encoded["input_ids"]]))
            expected[site.layer].append(keys[last])
    assert set(found) == {0, 2}
    for layer, keys in found.items():
        assert keys.dtype == torch.float64
        assert len(keys) == PROBES
        torch.testing.assert_close(keys, torch.stack(expected[layer]).double(), rtol=1e-6, atol=1e-8)


def test_probes_longer_than_the_model_reads_are_left_out():
    language_model = tiny_language_model("llama")
    sites = [find_site(language_model.model, 1)]
    every = probe_keys(language_model, sites)[1]
    language_model.encoder.max_length = 24
    some = probe_keys(language_model, sites)[1]
    assert 0 < len(some) < len(every)
    language_model.encoder.max_length = 2
    assert probe_keys(language_model, sites) == {}


def test_taking_probes_leaves_model_and_generator_alone():
    language_model = tiny_language_model("llama")
    language_model.model.train()
    state = torch.get_rng_state()
    probe_keys(language_model, [find_site(language_model.model, 1)])
    keeps_documents_apart(language_model, find_site(language_model.model, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert language_model.model.training
    assert all(parameter.requires_grad for parameter in language_model.model.parameters())


# ---- documents in one row


def packed_and_alone(language_model, site):
    """Keys of documents in one row, and of each in a forward of its own."""
    pieces = language_model.tokenizer(list(TEXTS))["input_ids"]
    positions = [position for piece in pieces for position in range(len(piece))]
    row = torch.tensor([[token for piece in pieces for token in piece]])
    inputs = {"position_ids": torch.tensor([positions])} if keeps_documents_apart(language_model, site) else {}
    packed = plain_keys(language_model.model, site, input_ids=row, **inputs)
    alone = [plain_keys(language_model.model, site, input_ids=torch.tensor([piece])) for piece in pieces]
    return packed, torch.cat(alone)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in LEAKING])
def test_families_keep_documents_apart_by_positions(family, bos):
    language_model = LanguageModel(tiny_model(family), byte_level_tokenizer(bos))
    site = find_site(language_model.model, 2)
    assert keeps_documents_apart(language_model, site)
    with KeepFloat64():
        packed, alone = packed_and_alone(language_model, site)
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", LEAKING)
def test_families_that_let_documents_leak_are_known(family):
    language_model = tiny_language_model(family)
    site = find_site(language_model.model, 2)
    assert not keeps_documents_apart(language_model, site)
    packed, alone = packed_and_alone(language_model, site)
    assert float((packed - alone).norm() / alone.norm()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_not_taken_for_a_leak(dtype):
    for family in ("llama", "gpt2", "gemma2"):
        language_model = tiny_language_model(family, dtype)
        assert keeps_documents_apart(language_model, find_site(language_model.model, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_is_seen_in_every_precision(dtype):
    for family in LEAKING:
        language_model = tiny_language_model(family, dtype)
        assert not keeps_documents_apart(language_model, find_site(language_model.model, 2))
