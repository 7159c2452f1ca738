"""Folders of models that are broken in one way each, made from a whole one."""

import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def config(**changes):
    """Settings put into ``config.json``; ``...`` takes one out."""

    def change(folder):
        content = json.loads((folder / CONFIG).read_text())
        content |= changes
        content = {name: value for name, value in content.items() if value is not ...}
        (folder / CONFIG).write_text(json.dumps(content))

    return change


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def without(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def cut(name, share):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return change


def flipped(name, at):
    def change(folder):
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 0xFF
        (folder / name).write_bytes(bytes(content))

    return change


def replaced(name, make):
    """Something else than a file in its place."""

    def change(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def weights(change_tensors):
    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        change_tensors(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})

    return change


DOWN = "model.layers.1.mlp.down_proj.weight"


def _put(name, value):
    def change(tensors):
        tensors[name].view(-1)[0] = value

    return weights(change)


def _layer_more(tensors):
    for name in [name for name in tensors if ".layers.2." in name]:
        tensors[name.replace(".layers.2.", ".layers.3.")] = tensors[name].clone()


def _tokenizer(**changes):
    def change(folder):
        content = json.loads((folder / TOKENIZER).read_text())
        content |= changes
        (folder / TOKENIZER).write_text(json.dumps(content))

    return change


def _index(content):
    def change(folder):
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return change


BROKEN = {
    # config.json
    "no config": without(CONFIG),
    "empty config": written(CONFIG, b""),
    "config cut": cut(CONFIG, 0.5),
    "config of bytes": written(CONFIG, bytes(range(256))),
    "config is a list": written(CONFIG, b"[]"),
    "config is null": written(CONFIG, b"null"),
    "config is a number": written(CONFIG, b"3"),
    "config is an empty object": written(CONFIG, b"{}"),
    "config is deep": written(CONFIG, b'{"a":' * 20000 + b"1" + b"}" * 20000),
    "config with a number without end": written(
        CONFIG, b'{"model_type": "llama", "hidden_size": ' + b"9" * 6000 + b"}"
    ),
    "config is a folder": replaced(CONFIG, os.mkdir),
    "config is a pipe": replaced(CONFIG, os.mkfifo),
    "config leads nowhere": replaced(CONFIG, lambda path: path.symlink_to("absent")),
    "config leads to itself": replaced(CONFIG, lambda path: path.symlink_to(path)),
    "config leads to a device": replaced(CONFIG, lambda path: path.symlink_to("/dev/zero")),
    "unknown kind": config(model_type="of_its_own"),
    "no kind": config(model_type=...),
    "kind is a number": config(model_type=7),
    "kind of another family": config(model_type="gpt2"),
    "an encoder-decoder": config(model_type="t5"),
    "said to be an encoder-decoder": config(is_encoder_decoder=True),
    "number as text": config(hidden_size="32"),
    "number as nonsense": config(hidden_size="wide"),
    "number as a list": config(hidden_size=[32]),
    "number is null": config(intermediate_size=None),
    "number is not finite": written(CONFIG, b'{"model_type": "llama", "hidden_size": NaN, "num_hidden_layers": 3}'),
    "number is a fraction": config(hidden_size=32.5),
    "another width": config(hidden_size=64),
    "another inner width": config(intermediate_size=96),
    "another vocabulary": config(vocab_size=500),
    "vocabulary of none": config(vocab_size=0),
    "vocabulary below none": config(vocab_size=-400),
    "a huge vocabulary": config(vocab_size=10**13),
    "a huge width": config(hidden_size=10**12),
    "more layers": config(num_hidden_layers=5),
    "fewer layers": config(num_hidden_layers=2),
    "no layers": config(num_hidden_layers=0),
    "layers below none": config(num_hidden_layers=-3),
    "layers without end": config(num_hidden_layers=10**9),
    "heads that do not divide": config(num_attention_heads=5, head_dim=...),
    "no heads": config(num_attention_heads=0, head_dim=...),
    "heads below none": config(num_attention_heads=-4, head_dim=...),
    "other heads": config(num_attention_heads=8, head_dim=8),
    "no keys": config(num_key_value_heads=0),
    "an unknown activation": config(hidden_act="of_its_own"),
    "unknown positions": config(rope_parameters={"rope_type": "of_its_own", "rope_theta": 1e4}),
    "unknown positions, older": config(rope_parameters=..., rope_scaling={"type": "of_its_own", "factor": 2.0}),
    "positions without factor": config(rope_parameters={"rope_type": "yarn"}),
    "positions as text": config(rope_parameters="linear"),
    "context of none": config(max_position_embeddings=-1),
    "context as text": config(max_position_embeddings="long"),
    "bitsandbytes": config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "GPTQ": config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "AWQ": config(quantization_config={"quant_method": "awq", "bits": 4}),
    "fp8": config(quantization_config={"quant_method": "fp8"}),
    "quantised, of no name": config(quantization_config={"bits": 3}),
    "quantised, no mapping": config(quantization_config="8bit"),
    "a kernel of the hub": config(attn_implementation="someone/kernel"),
    "a kernel of the hub by function": config(attn_implementation="someone/kernel@v1:attend"),
    "a kernel in a part": config(text_config={"attn_implementation": "someone/kernel"}),
    "kernels by part": config(attn_implementation={"": "someone/kernel"}),
    "a kernel under its private name": config(_attn_implementation="someone/kernel"),
    "attention is a number": config(attn_implementation=7),
    "code of its own": config(model_type="own", auto_map={"AutoConfig": "own.A", "AutoModelForCausalLM": "own.B"}),
    "an unknown precision": config(dtype="float13"),
    # weights
    "no weights": without(WEIGHTS),
    "empty weights": written(WEIGHTS, b""),
    "header cut": cut(WEIGHTS, 0.01),
    "weights cut": cut(WEIGHTS, 0.9),
    "another header length": flipped(WEIGHTS, 7),
    "header damaged": flipped(WEIGHTS, 9),
    "a large file's place holder": written(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\nsize 1\n"),
    "weights are a folder": replaced(WEIGHTS, os.mkdir),
    "weights are a pipe": replaced(WEIGHTS, os.mkfifo),
    "a weight missing": weights(lambda tensors: tensors.pop(DOWN)),
    "all weights missing": weights(lambda tensors: tensors.clear()),
    "a weight of another shape": weights(lambda tensors: tensors.update({DOWN: torch.zeros(32, 47)})),
    "a weight of no shape": weights(lambda tensors: tensors.update({DOWN: torch.tensor(1.0)})),
    "weights of more layers": weights(_layer_more),
    "a weight is not a number": _put(DOWN, float("nan")),
    "a weight without end": _put("model.embed_tokens.weight", float("inf")),
    "an index of nothing": _index({}),
    "an index that is a list": _index([]),
    "an index to files that are absent": _index({"metadata": {}, "weight_map": {DOWN: "absent.safetensors"}}),
    "an index that leads out": _index({"metadata": {}, "weight_map": {DOWN: "../../absent.safetensors"}}),
    # tokenizer
    "no tokenizer": without(TOKENIZER, "tokenizer_config.json"),
    "empty tokenizer": written(TOKENIZER, b""),
    "tokenizer cut": cut(TOKENIZER, 0.5),
    "tokenizer is a list": written(TOKENIZER, b"[]"),
    "tokenizer without a model": _tokenizer(model=None),
    "tokenizer of an unknown model": _tokenizer(model={"type": "Own"}),
    "tokenizer of an unknown step": _tokenizer(pre_tokenizer={"type": "Own"}),
    "tokenizer is a pipe": replaced(TOKENIZER, os.mkfifo),
    "tokenizer is a folder": replaced(TOKENIZER, os.mkdir),
    "tokenizer's settings cut": cut("tokenizer_config.json", 0.5),
    "tokenizer's settings are a list": written("tokenizer_config.json", b"[]"),
    # other files
    "an adapter": written("adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "/absent"}'),
    "an adapter that is empty": written("adapter_config.json", b""),
    "some pipe": replaced("README.md", os.mkfifo),
    "a pipe among templates": lambda folder: (
        (folder / "additional_chat_templates").mkdir(),
        os.mkfifo(folder / "additional_chat_templates" / "tool.jinja"),
    ),
}
"""Name of the fault, and what makes it."""


def broken(whole, folder, name):
    """A copy of a whole model's folder with one fault."""
    shutil.copytree(whole, folder)
    BROKEN[name](folder)
    return folder
