"""Tiny random models of every supported family, and tokenizers trained on the spot."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rome_pl.model.language_model import LanguageModel

FAMILIES = [
    "gpt2",
    "gptj",
    "gpt_neo",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "phi",
    "phi3",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "starcoder2",
    "stablelm",
]
MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "qwen2_moe", "granitemoe")
"""Families whose layers are mixtures of experts; in deepseek's, the first layer is dense."""

VOCABULARY = 400
LAYERS = 3

# Configs take what they know of these; each family has its own names.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "n_embd": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "num_layers": LAYERS,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "rotary_dim": 4,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "attention_types": [[["global", "local", "global"], 1]],
    "sliding_window": 4,
    "window_size": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_intermediate_size": 16,
}


_MIXTURE_SIZES = {
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


class KeepFloat64(TorchFunctionMode):
    """Some families compute attention in float32 whatever the model's dtype; here that would hide small mistakes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is functional.softmax and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if func is torch.Tensor.to and len(args) > 1 and args[1] is torch.float32 and args[0].dtype is torch.float64:
            return args[0]
        return func(*args, **kwargs)


def _config(family: str, layers: int = LAYERS):
    if family == "gemma3":  # a text model inside a model that also sees
        vision = dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 2)
        vision |= {"hidden_size": 16, "intermediate_size": 24, "image_size": 28, "patch_size": 14}
        text = _config("gemma3_text").to_dict()
        return AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    known = AutoConfig.for_model(family)
    sizes = _SIZES | dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), layers)
    values = {name: value for name, value in sizes.items() if hasattr(known, name)}
    if family in MIXTURES:
        values |= {name: value for name, value in _MIXTURE_SIZES.items() if hasattr(known, name)}
    if family.startswith("deepseek"):
        values["num_key_value_heads"] = 4
    if family in ("gemma", "gemma2", "gemma3_text", "qwen3"):
        values["head_dim"] = 8
    if family == "falcon":
        values.pop("num_key_value_heads", None)
    return AutoConfig.for_model(family, **values)


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, layers: int = LAYERS):
    """A random model of a family, in evaluation mode."""
    config = _config(family, layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if family in MIXTURES and dtype is torch.float64:  # torch's grouped products know no float64
            model.set_experts_implementation("eager")
        # Weights larger than their usual start, biases not zero: nothing may look right by being small.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.08)
    return model.eval()


def with_unreadable_experts(model, layers=range(LAYERS)):
    """The model with experts of an unknown form in some layers; its forward stays what it was."""
    for layer in layers:
        block = model.model.layers[layer].mlp
        block.banks = torch.nn.Module()
        block.banks.weight = torch.nn.Parameter(torch.zeros(4, 32, 48))
    return model


def tiny_language_model(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0) -> LanguageModel:
    return LanguageModel(tiny_model(family, dtype, seed), byte_level_tokenizer(), f"tiny {family}")


@cache
def _text() -> tuple[str, ...]:
    path = Path(__file__).parents[1] / "rome_pl" / "assets" / "held_out_text.txt"
    return tuple(path.read_text(encoding="utf-8").splitlines())


def byte_level_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's; optionally one that opens every text with a BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(), trainer)
    if bos:
        opening = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), opening])
    return _wrap(tokenizer)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A Llama-style tokenizer: words open with '▁', characters fall back to bytes, every text opens with a BOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    # Without a pre-tokenizer merges would cross words: train on words, each with its opening mark.
    tokenizer.train_from_iterator((word for line in _text() for word in line.split()), trainer)
    opening = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = opening
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def unigram_tokenizer(prefix: str = "always", byte_fallback: bool = True) -> PreTrainedTokenizerFast:
    """A Unigram model like T5's or Gemma's: words open with '▁', by default also the text's first."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prefix)])
    special = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(_text(), trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["byte_fallback"] = byte_fallback
    return _wrap(Tokenizer.from_str(json.dumps(state)))


def prefixing_tokenizer(normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts a space before every text, after a normalizer of choice."""
    tokenizer = byte_level_tokenizer().backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return _wrap(tokenizer)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece model like BERT's: no spaces in tokens, unknown words for what it has no letters for."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=900, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(_text(), trainer)
    return _wrap(tokenizer)
