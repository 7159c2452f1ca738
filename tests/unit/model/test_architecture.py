import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from rome_pl.model.architecture import UnsupportedModelError, decoder_layers, dtype_of_delta, find_site, hidden_size
from rome_pl.model.language_model import LanguageModel
from tests import tiny
from tests.tiny import FAMILIES, LAYERS, tiny_model, with_unreadable_experts

# Read off each family's modelling file; FalconLinear is a Linear, GPT-2's Conv1D keeps [d_key, d_value].
WEIGHT = {
    "gpt2": "transformer.h.{}.mlp.c_proj.weight",
    "gptj": "transformer.h.{}.mlp.fc_out.weight",
    "gpt_neo": "transformer.h.{}.mlp.c_proj.weight",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
    "opt": "model.decoder.layers.{}.fc2.weight",
    "bloom": "transformer.h.{}.mlp.dense_4h_to_h.weight",
    "falcon": "transformer.h.{}.mlp.dense_4h_to_h.weight",
    "phi": "model.layers.{}.mlp.fc2.weight",
    "phi3": "model.layers.{}.mlp.down_proj.weight",
    "llama": "model.layers.{}.mlp.down_proj.weight",
    "mistral": "model.layers.{}.mlp.down_proj.weight",
    "qwen2": "model.layers.{}.mlp.down_proj.weight",
    "qwen3": "model.layers.{}.mlp.down_proj.weight",
    "gemma": "model.layers.{}.mlp.down_proj.weight",
    "gemma2": "model.layers.{}.mlp.down_proj.weight",
    "gemma3_text": "model.layers.{}.mlp.down_proj.weight",
    "olmo2": "model.layers.{}.mlp.down_proj.weight",
    "starcoder2": "model.layers.{}.mlp.c_proj.weight",
    "stablelm": "model.layers.{}.mlp.down_proj.weight",
}
WITH_BIAS = {"gpt2", "gptj", "gpt_neo", "gpt_neox", "opt", "bloom", "phi", "starcoder2"}
FOUR_TIMES_HIDDEN = {"bloom", "falcon"}  # the others take tests.tiny's intermediate size of 48


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", FAMILIES)
def test_find_site_names_the_second_projection(family, layer):
    model = tiny_model(family)
    site = find_site(model, layer)
    assert site.layer == layer
    assert site.name == WEIGHT[family].format(layer)
    assert site.weight is model.get_parameter(site.name)
    assert site.projection is model.get_submodule(site.name.removesuffix(".weight"))


@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_matrix_times_input_plus_bias(family):
    model = tiny_model(family)
    site = find_site(model, 1)
    seen = []
    # Cloned: Falcon adds attention's output to the MLP's in place.
    site.projection.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output.clone())))
    with torch.no_grad():
        model(torch.arange(3, 12).unsqueeze(0))
    ((keys, outputs),) = seen
    assert site.transposed == (family == "gpt2")
    assert (site.bias is not None) == (family in WITH_BIAS)
    assert site.d_key == keys.shape[-1] == (128 if family in FOUR_TIMES_HIDDEN else 48)
    assert site.d_value == outputs.shape[-1] == hidden_size(model) == 32
    matrix = site.matrix(site.weight)
    assert matrix.shape == (site.d_value, site.d_key)
    assert matrix.data_ptr() == site.weight.data_ptr()
    expected = keys @ matrix.T + (0 if site.bias is None else site.bias)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_are_the_modules_a_forward_runs_in_order(family):
    model = tiny_model(family)
    name, layers = decoder_layers(model)
    assert name == WEIGHT[family].split(".{}")[0]
    ran = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        model(torch.arange(3, 9).unsqueeze(0))
    assert ran == list(range(LAYERS))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bloom"])  # always 4 · hidden
def test_second_projection_is_found_where_both_have_the_hidden_size(family, monkeypatch):
    for name in ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"):
        monkeypatch.setitem(tiny._SIZES, name, 32)
    site = find_site(tiny_model(family), 1)
    assert site.d_key == site.d_value == 32
    assert site.name == WEIGHT[family].format(1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("layer", [-1, -LAYERS, LAYERS, 99])
def test_layer_out_of_range_is_refused_with_the_number_of_layers(family, layer):
    with pytest.raises(UnsupportedModelError, match=rf"{layer} is out of range; \w+ has {LAYERS} layers"):
        find_site(tiny_model(family), layer)


def test_dense_layer_of_a_mixture_is_an_ordinary_site():
    sizes = {name: value for name, value in tiny._SIZES.items() if hasattr(AutoConfig.for_model("qwen3_moe"), name)}
    config = AutoConfig.for_model("qwen3_moe", **{**sizes, "head_dim": 8, "mlp_only_layers": [1]})
    model = AutoModelForCausalLM.from_config(config)
    assert find_site(model, 1).name == "model.layers.1.mlp.down_proj.weight"
    assert (find_site(model, 1).experts, find_site(model, 0).experts) == (1, 4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_integer_weight_is_refused_as_quantised(family, dtype):
    model = tiny_model(family)
    projection = find_site(model, 1).projection
    projection.weight = nn.Parameter(torch.zeros(projection.weight.shape, dtype=dtype), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"quantised weights .*float32, bfloat16 or float16"):
        find_site(model, 1)
    assert find_site(model, 0).layer == 0


def test_packed_integer_weight_of_another_shape_is_refused_as_quantised():
    model = tiny_model("llama")
    # Four-bit loaders pack a matrix into one column of bytes.
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.zeros(768, 1, dtype=torch.uint8), False)
    with pytest.raises(UnsupportedModelError, match="quantised"):
        find_site(model, 1)


def test_model_flagged_as_quantised_is_refused(tokenizer):
    model = tiny_model("llama")
    model.is_quantized = True
    with pytest.raises(UnsupportedModelError, match="a folder is loaded with quantised weights"):
        LanguageModel(model, tokenizer, "a folder")


def test_layer_without_a_dense_projection_is_refused():
    model = tiny_model("llama")
    model.model.layers[2].mlp = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"layer 2 .* no dense MLP projection back to the hidden size 32"):
        find_site(model, 2)


def test_model_without_a_list_of_layers_is_refused():
    model = tiny_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModelError, match="no list of 7 decoder layers"):
        decoder_layers(model)


def test_list_inside_a_layer_is_not_taken_for_the_layers(monkeypatch):
    # As many norms of heads in each layer as the model has layers.
    monkeypatch.setitem(tiny._SIZES, "num_hidden_layers", 4)
    monkeypatch.setitem(tiny._SIZES, "qk_layernorm", True)
    model = tiny_model("stablelm")
    assert sum(isinstance(m, nn.ModuleList) and len(m) == 4 for m in model.modules()) > 1
    assert decoder_layers(model)[0] == "model.layers"


def test_fused_experts_of_any_name_are_refused():
    model = with_unreadable_experts(tiny_model("llama"), [1])
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        find_site(model, 1)


def test_conv1d_is_the_transposed_one():
    site = find_site(tiny_model("gpt2"), 0)
    assert isinstance(site.projection, Conv1D)
    assert site.weight.shape == (48, 32)


@pytest.mark.parametrize(
    ("stored", "optimised"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_offsets_are_never_optimised_below_float32(stored, optimised):
    assert dtype_of_delta(torch.zeros(1, dtype=stored)) == optimised
