"""A tiny GGUF file, written on the spot."""

import json

import numpy as np
from gguf import GGUFWriter

from tests.tiny import LAYERS, VOCABULARY, byte_level_tokenizer


def write_gguf(path, seed=0):
    """A random Llama with the byte-level tokenizer."""
    writer = GGUFWriter(str(path), "llama")
    for name, value in {"block_count": LAYERS, "context_length": 128, "embedding_length": 32, "head_count": 4}.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_feed_forward_length(48)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(VOCABULARY)
    content = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in content["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(seed)

    def add(name, *shape):
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.1, shape).astype(np.float32))

    add("token_embd", VOCABULARY, 32)
    add("output", VOCABULARY, 32)
    add("output_norm", 32)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm", 32)
        add(f"{block}.ffn_norm", 32)
        for part, rows, columns in (
            ("attn_q", 32, 32), ("attn_k", 16, 32), ("attn_v", 16, 32), ("attn_output", 32, 32),
            ("ffn_gate", 48, 32), ("ffn_up", 48, 32), ("ffn_down", 32, 48),
        ):  # fmt: skip
            add(f"{block}.{part}", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
