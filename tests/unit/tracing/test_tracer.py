import random
from functools import cache

import numpy as np
import pytest
import torch

from rome_pl.model.architecture import UnsupportedModelError, decoder_layers, find_attention_output
from rome_pl.tracing.noise import default_window, draw_noise, embedding_deviation
from rome_pl.tracing.trace import Fact
from rome_pl.tracing.tracer import Tracer
from rome_pl.utils.flops import count_flops
from tests.tiny import (
    FAMILIES,
    LAYERS,
    MIXTURES,
    KeepFloat64,
    byte_level_tokenizer,
    tiny_model,
    with_unreadable_experts,
)

# Read off each family's modelling file.
ATTENTION = {
    "gpt2": "transformer.h.{}.attn.c_proj",
    "gptj": "transformer.h.{}.attn.out_proj",
    "gpt_neo": "transformer.h.{}.attn.attention.out_proj",
    "gpt_neox": "gpt_neox.layers.{}.attention.dense",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
    "bloom": "transformer.h.{}.self_attention.dense",
    "falcon": "transformer.h.{}.self_attention.dense",
    "phi": "model.layers.{}.self_attn.dense",
}
MLP = {
    "gpt2": "transformer.h.{}.mlp",
    "gpt_neox": "gpt_neox.layers.{}.mlp",
    "llama": "model.layers.{}.mlp",
    "gemma2": "model.layers.{}.mlp",
    "phi": "model.layers.{}.mlp",
}
IDS, SUBJECT, ANSWER, SAMPLES = (5, 77, 12, 301, 44, 9), (1, 3), 23, 3


@pytest.fixture(autouse=True)
def float64_everywhere():
    with KeepFloat64():
        yield


@cache
def shared_model(family):
    return tiny_model(family)


def noise_for(model, subject=SUBJECT, samples=SAMPLES):
    width = model.get_input_embeddings().weight.shape[1]
    return draw_noise(samples, subject[1] - subject[0], width, 0.5, 0, "a fact")


def attention_name(family):
    return ATTENTION.get(family, "model.layers.{}.self_attn.o_proj")


def plain(model, fact, noise, restored):
    """A whole forward of all samples, with hooks: P(answer) with clean outputs of ``(module name, token)`` put back."""
    modules = {name: model.get_submodule(name) for name, _ in restored}
    clean = {}

    def keep(name):
        def hook(_, __, output):
            clean[name] = (output[0] if isinstance(output, tuple) else output).clone().reshape(len(fact.ids), -1)

        return hook

    ids = torch.tensor([fact.ids])
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()

    def put_back(name):
        def hook(_, __, output):
            states = (output[0] if isinstance(output, tuple) else output).clone()
            flat = states.reshape(len(noise), len(fact.ids), -1)
            for other, token in restored:
                if other == name:
                    flat[:, token] = clean[name][token]
            states = flat.reshape(states.shape)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return hook

    def corrupt(_, __, embedded):
        embedded = embedded.clone()
        embedded[:, fact.subject[0] : fact.subject[1]] += noise
        return embedded

    handles = [module.register_forward_hook(put_back(name)) for name, module in modules.items()]
    handles.append(model.get_input_embeddings().register_forward_hook(corrupt))
    with torch.no_grad():
        logits = model(ids.expand(len(noise), -1), use_cache=False).logits[:, -1]
    for handle in handles:
        handle.remove()
    return float(logits.softmax(-1)[:, fact.answer].mean())


def plain_trace(model, family, fact, noise, window, kinds=("hidden", "mlp", "attention")):
    layers_name = decoder_layers(model)[0]
    tables = {}
    for kind in kinds:
        tables[kind] = torch.empty(len(fact.ids), LAYERS, dtype=torch.float64)
        for token in range(len(fact.ids)):
            for layer in range(LAYERS):
                if kind == "hidden":
                    names = [f"{layers_name}.{layer}"]
                else:
                    name = MLP[family] if kind == "mlp" else attention_name(family)
                    low, high = max(0, layer - window // 2), min(LAYERS, layer - (-window // 2))
                    names = [name.format(number) for number in range(low, high)]
                tables[kind][token, layer] = plain(model, fact, noise, [(name, token) for name in names])
    return tables


@pytest.mark.parametrize(("family", "window"), [*((family, 2) for family in sorted(MLP)), ("llama", 1), ("llama", 3)])
def test_effects_are_those_of_whole_forwards_with_one_restoration_each(family, window):
    model = shared_model(family)
    fact, noise = Fact(IDS, SUBJECT, ANSWER), noise_for(model)
    found = Tracer(model, window).trace(fact, noise)
    assert found.corrupted == pytest.approx(plain(model, fact, noise, []), rel=1e-9)
    for kind, table in plain_trace(model, family, fact, noise, window).items():
        torch.testing.assert_close(found.restored[kind], table, rtol=1e-9, atol=1e-12, msg=f"{family}, {kind}")
    with torch.no_grad():
        clean = model(torch.tensor([IDS])).logits[0, -1].softmax(-1)[ANSWER]
    assert found.clean == pytest.approx(float(clean), rel=1e-9)
    torch.testing.assert_close(found.effect("mlp"), found.restored["mlp"] - found.corrupted)
    assert found.total_effect == found.clean - found.corrupted


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MLP])
def test_every_family_gives_what_whole_forwards_give(family):
    model = shared_model(family)
    fact, noise = Fact(IDS, SUBJECT, ANSWER), noise_for(model, samples=1)
    found = Tracer(model, 1).trace(fact, noise)
    expected = plain_trace(model, family, fact, noise, 1, ("hidden", "attention"))
    for kind, table in expected.items():
        torch.testing.assert_close(found.restored[kind], table, rtol=1e-9, atol=1e-12, msg=f"{family}, {kind}")


@pytest.mark.parametrize("subject", [(0, 2), (4, 6), (2, 3)])
def test_a_subject_may_open_or_end_the_prompt(subject):
    model = shared_model("llama")
    fact, noise = Fact(IDS, subject, ANSWER), noise_for(model, subject)
    found = Tracer(model, 2).trace(fact, noise)
    for kind, table in plain_trace(model, "llama", fact, noise, 2).items():
        torch.testing.assert_close(found.restored[kind], table, rtol=1e-9, atol=1e-12)
    assert bool((found.effect("hidden")[: subject[0]] == 0).all())
    assert found.restored["hidden"][-1, -1] == found.clean


def test_a_whole_window_of_mlps_and_the_last_state_restore_what_they_must():
    model = shared_model("gpt2")
    fact, noise = Fact(IDS, (5, 6), ANSWER), noise_for(model, (5, 6))  # the subject is the last token
    found = Tracer(model, 2 * LAYERS).trace(fact, noise)
    # All windows are the whole model, and so the same.
    torch.testing.assert_close(found.restored["mlp"][:, :1].expand(-1, LAYERS), found.restored["mlp"])
    torch.testing.assert_close(found.restored["hidden"][-1], torch.full((LAYERS,), found.clean, dtype=torch.float64))


def test_groups_of_any_size_give_the_same(monkeypatch):
    model = shared_model("llama")
    fact, noise = Fact(IDS, SUBJECT, ANSWER), noise_for(model)
    together = Tracer(model, 2).trace(fact, noise)
    monkeypatch.setattr("rome_pl.tracing.tracer.TOKENS_PER_FORWARD", 1)
    alone = Tracer(model, 2).trace(fact, noise)
    for kind in together.restored:
        torch.testing.assert_close(together.restored[kind], alone.restored[kind], rtol=1e-12, atol=1e-14)


def test_samples_are_averaged():
    model = shared_model("llama")
    fact, noise = Fact(IDS, SUBJECT, ANSWER), noise_for(model)
    tracer = Tracer(model, 2)
    single = [tracer.trace(fact, noise[index : index + 1]) for index in range(SAMPLES)]
    together = tracer.trace(fact, noise)
    mean = torch.stack([one.restored["hidden"] for one in single]).mean(0)
    torch.testing.assert_close(together.restored["hidden"], mean, rtol=1e-10, atol=1e-12)


def test_a_model_whose_cache_cannot_be_cut_runs_whole_rows_with_a_warning(monkeypatch, caplog):
    model = shared_model("llama")
    fact, noise = Fact(IDS, SUBJECT, ANSWER), noise_for(model)
    expected = Tracer(model, 2).trace(fact, noise)

    def broken(*_):
        raise AttributeError("no such cache")

    monkeypatch.setattr("rome_pl.tracing.tracer.cache_of", broken)
    found = Tracer(model, 2).trace(fact, noise)
    assert "no such cache" in caplog.text
    for kind in expected.restored:
        torch.testing.assert_close(found.restored[kind], expected.restored[kind], rtol=1e-9, atol=1e-12)


def test_a_mixture_is_traced_at_the_output_of_its_experts():
    model = tiny_model(MIXTURES[0])
    tracer = Tracer(model, LAYERS)
    assert tracer.kinds == ("hidden", "mlp", "attention")
    found = tracer.trace(Fact(IDS, SUBJECT, ANSWER), noise_for(model))
    assert (found.restored["mlp"] != found.corrupted).any()


def test_experts_that_cannot_be_read_are_not_traced_and_this_is_said():
    model = with_unreadable_experts(tiny_model("llama"))
    tracer = Tracer(model, 2)
    assert tracer.kinds == ("hidden", "attention")
    assert "mixture of experts" in tracer.missing["mlp"]
    fact = Fact(IDS, SUBJECT, ANSWER)
    found = tracer.trace(fact, noise_for(model))
    assert set(found.restored) == {"hidden", "attention"}
    assert found.restored["hidden"][-1, -1] == found.clean


def test_tracing_leaves_nothing_behind():
    model = tiny_model("llama").train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    Tracer(model, 2).trace(Fact(IDS, SUBJECT, ANSWER), noise_for(model))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_it_costs_a_fraction_of_whole_forwards():
    model = shared_model("llama")
    fact, noise = Fact(IDS, (2, 4), ANSWER), noise_for(model)
    tracer = Tracer(model, 1)
    tracer.trace(fact, noise)  # pays for the check
    with count_flops() as engine:
        tracer.trace(fact, noise)
    with count_flops() as one:
        plain(model, fact, noise, [])
    # The forward of all samples and, without restorations, of the clean run.
    whole = one.total * 3 * LAYERS * len(IDS)
    assert engine.total < whole / 3


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_ends_in_its_output_projection(family, layer):
    model = shared_model(family)
    assert find_attention_output(model, layer) is model.get_submodule(attention_name(family).format(layer))


def test_a_layer_without_attention_is_said_to_have_none():
    model = tiny_model("llama")
    decoder_layers(model)[1][1].self_attn = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="layer 1 of LlamaForCausalLM has no attention"):
        find_attention_output(model, 1)


def test_noise_is_seeded_and_scaled():
    noise = draw_noise(50, 4, 32, 2.0, 0, "a")
    assert noise.shape == (50, 4, 32)
    assert float(noise.std()) == pytest.approx(2.0, rel=0.05)
    assert torch.equal(noise, draw_noise(50, 4, 32, 2.0, 0, "a"))
    assert not torch.equal(noise, draw_noise(50, 4, 32, 2.0, 0, "b"))


def test_the_deviation_is_of_all_subjects_embeddings_together():
    model = shared_model("llama")
    weight = model.get_input_embeddings().weight.detach()
    expected = torch.cat([weight[5], weight[9], weight[5]]).std()
    assert embedding_deviation(model, [[5, 9], [5]]) == pytest.approx(float(expected))


@pytest.mark.parametrize(("depth", "window"), [(48, 10), (30, 6), (28, 6), (12, 2), (3, 1), (1, 1)])
def test_the_window_is_as_wide_as_gpt2_xl_s(depth, window):
    assert default_window(depth) == window


def test_a_window_of_no_layers_is_refused():
    with pytest.raises(ValueError, match="window: expected a number of layers from 1 on, got 0"):
        Tracer(shared_model("llama"), 0)


def test_the_tokenizer_s_bos_is_no_part_of_a_subject():
    ids = byte_level_tokenizer(bos=True)("Rome is in")["input_ids"]
    model = shared_model("gpt2")
    fact = Fact(tuple(ids), (1, 3), ANSWER)
    noise = noise_for(model, (1, 3))
    found = Tracer(model, 2).trace(fact, noise)
    for kind, table in plain_trace(model, "gpt2", fact, noise, 2).items():
        torch.testing.assert_close(found.restored[kind], table, rtol=1e-9, atol=1e-12)
    assert bool((found.effect("attention")[0] == 0).all())
