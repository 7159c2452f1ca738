"""Models that no edit can be right in are refused, however they were made."""

import accelerate
import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from rome_pl.encoding.encoded_rows import EncodedRow
from rome_pl.export.run_export import save_checkpoint
from rome_pl.forward.generation import end_ids
from rome_pl.metrics.probes import measure_targets
from rome_pl.model.architecture import UnsupportedModelError, embedded_tokens, find_attention_output, find_site
from rome_pl.model.language_model import LanguageModel
from tests import tiny
from tests.tiny import LAYERS, VOCABULARY, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def config(family, **options):
    known = AutoConfig.for_model(family)
    sizes = {name: value for name, value in tiny._SIZES.items() if hasattr(known, name)}
    return AutoConfig.for_model(family, **sizes | options)


def refused(model, tokenizer, reason):
    with pytest.raises(UnsupportedModelError, match=reason) as error:
        LanguageModel(model, tokenizer, "some model")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "xlm", "camembert"])
def test_a_model_that_reads_in_both_directions_is_refused_in_any_precision(family, dtype, tokenizer):
    model = AutoModelForCausalLM.from_config(config(family), dtype=dtype).eval()
    refused(model, tokenizer, "some model: .* reads in both directions")


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_masked_language_models_are_refused(family, tokenizer):
    refused(AutoModelForMaskedLM.from_config(config(family)).eval(), tokenizer, "reads in both directions")


def test_attention_that_sees_a_prefix_whole_is_refused(tokenizer):
    model = tiny_model("llama")
    attend = model.model.layers[1].self_attn.forward

    def whole(**given):
        length = given["hidden_states"].shape[1]
        return attend(**given | {"attention_mask": torch.zeros(1, 1, length, length, dtype=torch.float64)})

    model.model.layers[1].self_attn.forward = whole
    refused(model, tokenizer, "reads in both directions")


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_the_same_family_as_a_decoder_is_taken(family, tokenizer):
    model = AutoModelForCausalLM.from_config(config(family, is_decoder=True)).eval()
    assert LanguageModel(model, tokenizer).encoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_round_otherwise_in_other_batches_are_no_second_direction(dtype, tokenizer):
    assert LanguageModel(tiny_model("mixtral", dtype), tokenizer).encoder


def test_encoder_decoders_are_refused(tokenizer):
    sizes = {"d_model": 32, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2}
    for family in ("t5", "bart"):
        model = AutoModelForSeq2SeqLM.from_config(config(family, **sizes))
        refused(model, tokenizer, "is an encoder-decoder")


def test_models_without_a_row_of_logits_for_each_token_are_refused(tokenizer):
    refused(AutoModel.from_config(tiny._config("llama")), tokenizer, "cannot read 4 tokens.*AutoModelForCausalLM")
    classifier = AutoModelForSequenceClassification.from_config(tiny._config("llama"))
    refused(classifier, tokenizer, "no language model")


def test_what_is_no_model_is_refused(tokenizer):
    for thing in (None, "gpt2", tokenizer):
        refused(thing, tokenizer, "expected a causal language model of transformers")
    refused(torch.nn.Linear(3, 3), tokenizer, "has no configuration of transformers")
    model = tiny_model("llama")
    object.__setattr__(model.config, "num_hidden_layers", None)
    refused(model, tokenizer, "num_hidden_layers None")


def compiled_within():
    model = tiny_model("llama")
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


def compiled_in_place():
    model = tiny_model("llama")
    model.compile()
    return model


def compiled_forward():
    model = tiny_model("llama")
    model.forward = torch.compile(model.forward)
    return model


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, on Python 3.11
@pytest.mark.parametrize(
    "make", [lambda: torch.compile(tiny_model("llama")), compiled_within, compiled_in_place, compiled_forward]
)
def test_compiled_models_are_refused(make, tokenizer):
    refused(make(), tokenizer, "is compiled")


def test_wrapped_models_are_refused(tokenizer):
    refused(torch.nn.DataParallel(tiny_model("llama")), tokenizer, r"wrapped in DataParallel.*model\.module")


def test_weights_that_are_not_in_memory_are_refused(tokenizer, tmp_path):
    with torch.device("meta"):
        refused(
            AutoModelForCausalLM.from_config(tiny._config("llama")), tokenizer, "30 of 30 weights are not in memory"
        )
    for offload in (accelerate.cpu_offload, lambda model: accelerate.disk_offload(model, tmp_path / "disk")):
        model = tiny_model("llama")
        offload(model)
        refused(model, tokenizer, "not in memory")
    with torch.inference_mode():
        model = tiny_model("llama")
    refused(model, tokenizer, r"made inside torch\.inference_mode")


def test_a_model_that_accelerate_has_put_on_one_device_is_taken(tokenizer):
    assert LanguageModel(accelerate.dispatch_model(tiny_model("llama"), {"": "cpu"}), tokenizer).encoder


def test_weights_that_are_not_numbers_are_refused(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    refused(model, tokenizer, "not finite")


# Adapters


def lora(family, *targets):
    return get_peft_model(
        tiny_model(family),
        LoraConfig(target_modules=list(targets), init_lora_weights=False, r=4, task_type="CAUSAL_LM"),
    )


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_an_adapter_on_the_edited_projection_is_refused(adapter, tokenizer):
    if adapter == "lora":
        model = lora("llama", "q_proj", "up_proj", "down_proj")
    else:
        settings = IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_model("llama"), settings)
    language_model = LanguageModel(model, tokenizer)
    with pytest.raises(UnsupportedModelError, match=r"adapter of PEFT on 'mlp\.down_proj'.*merge_and_unload"):
        find_site(language_model.model, 1)
    assert find_site(model.merge_and_unload(), 1).name == "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("rank", [4, 32])
def test_an_adapter_elsewhere_leaves_the_projection_to_edits(rank):
    targets = ["q_proj", "o_proj", "up_proj"]  # of rank 32 its first map gives back the hidden size
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=targets, r=rank, task_type="CAUSAL_LM"))
    for layer in range(LAYERS):
        assert find_site(model, layer).name == f"base_model.model.model.layers.{layer}.mlp.down_proj.weight"
    # What attention gives includes what its adapter adds.
    assert find_attention_output(model, 1) is model.base_model.model.model.layers[1].self_attn.o_proj


def test_a_model_with_adapters_is_not_saved_without_its_edits(tokenizer, tmp_path, caplog):
    model = lora("llama", "q_proj")
    language_model = LanguageModel(model, tokenizer, "some model")
    (said,) = [record.getMessage() for record in caplog.records if "PEFT" in record.getMessage()]
    assert said.startswith("some model: the model has adapters of PEFT. ")
    assert "model.save_pretrained() saves the adapters alone: the edits would be lost" in said
    assert "(model = model.merge_and_unload()) before you edit" in said
    with pytest.raises(UnsupportedModelError, match=r"the edits would be lost.*model\.merge_and_unload"):
        save_checkpoint(language_model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_adapters_that_transformers_has_attached_are_merged_by_what_can_merge_them(tokenizer, tmp_path, caplog):
    model = tiny_model("llama")
    model.add_adapter(LoraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM"))
    assert not hasattr(model, "merge_and_unload")
    language_model = LanguageModel(model, tokenizer, "some model")
    assert "AutoPeftModelForCausalLM and call merge_and_unload()" in caplog.text
    with pytest.raises(UnsupportedModelError, match="AutoPeftModelForCausalLM"):
        save_checkpoint(language_model, tmp_path / "saved")


@pytest.mark.parametrize("whole", ["down_proj", "mlp"])
def test_a_projection_that_an_adapter_trains_a_copy_of_is_refused(whole, tokenizer):
    """Of several copies only the active one runs, and saving the base model would leave it out."""
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=[whole], r=4, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama"), settings)
    with pytest.raises(UnsupportedModelError, match=r"adapter of PEFT on 'mlp.*merge_and_unload"):
        find_site(LanguageModel(model, tokenizer).model, 1)
    assert find_site(model.merge_and_unload(), 1).name == "model.layers.1.mlp.down_proj.weight"


def test_adapters_on_the_embedding_are_taken(tokenizer):
    language_model = LanguageModel(lora("llama", "embed_tokens"), tokenizer)
    assert language_model.encoder.embedded == embedded_tokens(tiny_model("llama")) == VOCABULARY
    assert end_ids(language_model) == [2]
    assert find_site(language_model.model, 1).layer == 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT mends it by itself
def test_rows_of_a_model_with_adapters_are_read_at_their_own_positions(family, tokenizer):
    """Without positions, which PEFT's own forward does not name, padding on the left would move the rows."""
    model = lora(family, "c_attn" if family == "gpt2" else "q_proj")
    rows = [EncodedRow((5, 6, 7, 8, 9), 3, (10,), 4), EncodedRow((11, 12), 0, (13,), 1)]
    measured = measure_targets(LanguageModel(model, tokenizer), rows)
    for row, found in zip(rows, measured, strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([row.ids])).logits[0, row.first].softmax(-1)
        assert found.probability == pytest.approx(float(alone[row.target[0]]), rel=1e-5)


def test_tokens_that_an_adapter_puts_before_every_text_are_refused(tokenizer):
    model = get_peft_model(tiny_model("llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    refused(model, tokenizer, "puts learnt tokens before every text")
