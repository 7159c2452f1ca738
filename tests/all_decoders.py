"""A tiny random model of every type that transformers can build as a decoder, and one edit of each.

Configs are shrunk by the names of their fields, so a new type mostly needs nothing here. Run as a module, it pins the
verdicts.
"""

import contextlib
import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from rome_pl.editor import KnowledgeEditor
from rome_pl.encoding.encoded_rows import EncodedRow
from rome_pl.forward.hooks import add_at_column, capture_columns
from rome_pl.forward.suffix_engine import SuffixEngine
from rome_pl.model.architecture import RewriteSite, UnsupportedModelError, decoder_layers, find_site
from rome_pl.model.language_model import LanguageModel
from tests import tiny
from tests.tiny import LAYERS

TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
"""Every type of the two mappings."""

VERDICTS = Path(__file__).with_name("decoders.json")
"""The expected verdict of every type. ``python -m tests.all_decoders`` writes it."""

LARGEST = 30_000_000
"""Most parameters of a tiny model. A larger one has a size that :data:`SIZES` does not know, and is not built."""

SECONDS = 180
"""Longest time that one model may take."""

SIZES = tiny._SIZES | {
    "is_decoder": True,
    # names of widths and depths
    **dict.fromkeys(("d_model", "dim", "dim_model", "embed_dim", "emb_dim"), 32),
    **dict.fromkeys(("d_ff", "dim_ff", "feed_forward_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_dim"), 48),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "n_layers", "depth"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 2),  # a decoder's layers are not to be counted by them
    **dict.fromkeys(("n_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    "kv_heads": 2,
    # heads
    **dict.fromkeys(("head_dim", "dim_head", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "qk_head_dim"), 8),
    **dict.fromkeys(("kv_channels", "swa_head_dim", "global_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("index_n_heads", "o_groups"), 2),
    "index_topk": 64,
    "laurel_rank": 8,
    "max_target_positions": 128,
    "max_source_positions": 128,
    # experts: no more are picked than there are
    **dict.fromkeys(("n_routed_experts", "moe_num_experts", "num_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts"), 1),
    **dict.fromkeys(
        ("shared_expert_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 16
    ),
    "first_k_dense_replace": 1,
    # other mixers
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_d_head", "mamba_head_dim", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_ssm"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    # pictures and sound
    **dict.fromkeys(("out_hidden_size", "projection_dim", "text_hidden_size", "vision_hidden_size"), 32),
    **dict.fromkeys(("projector_hidden_size", "vision_output_dim"), 32),
    **dict.fromkeys(("image_size",), 28),
    **dict.fromkeys(("patch_size",), 14),
}

_HYBRID = {
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "num_hidden_layers": 4,
    "layer_types": ...,
}
_SHARED_KEYS = {
    "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": tiny.VOCABULARY,
    "global_head_dim": 8,
    "intermediate_size": 48,
}
_PICTURES = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
}
_DENSE = {"num_experts": 1, "num_experts_per_tok": 1}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
_NOTE = {
    "num_key_value_heads": 4, "head_dim": 16, "per_layer_config": {}, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_qk_rope_head_dim": 8,
    "swa_v_head_dim": 8, "swa_kv_lora_rank": 16, "swa_q_lora_rank": 16,
}  # fmt: skip
_ROPES = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}

SPECIAL: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "chameleon": {"vocabulary_map": {"<image>": 5, "IMGIMGBZ": 6, "IMGIMGBA": 7}},
    "cohere_compass": {"text_config": {"rope_parameters": _ROPES}},
    "cohere_compass_text": {"rope_parameters": _ROPES},
    "ctrl": {"dff": 48},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]}},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "jamba": _DENSE
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 8, "expert_layer_offset": 7},
    "ernie4_5_vl_moe": _PICTURES,
    **dict.fromkeys(("glm4v", "glm46v", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl"), _PICTURES),
    "glmga": {
        "text_config": {"rope_parameters": _PICTURES["text_config"]["rope_parameters"] | {"partial_rotary_factor": 1.0}}
    },
    "glm_ocr": {
        "text_config": {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]},
        }
    },
    "qwen2_5_omni_thinker": _PICTURES | {"vision_start_token_id": 5},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "xlstm": {"chunk_size": ..., "hidden_size": 128, "embedding_dim": 128},
    "longcat_flash": {"qk_head_dim": 16, "head_dim": 8, "num_hidden_layers": 6},
    "mistral4": {"head_dim": 16},
    "hunyuan_vl": _PICTURES,
    "glm4v_moe": {"text_config": _PICTURES["text_config"] | {"head_dim": 16}},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 0},
    "nemotron_h": {"layer_types": ["linear_attention", "mlp", "full_attention"]},
    "dots3_note_text": _NOTE,
    "dots3_note": {"text_config": _NOTE},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 48}},
    "gemma3n_text": _SHARED_KEYS,
    "gemma4": {"text_config": _SHARED_KEYS},
    "gemma4_text": _SHARED_KEYS,
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "florence2": {"vision_config": {"depths": (1, 1), "embed_dim": (16, 32), "num_heads": (2, 2), "num_groups": (2, 2),
        "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1), "patch_prenorm": (False, True)}},
    "gemma4_unified": {"text_config": {"global_head_dim": 8}},
    "gemma4_unified_text": {"global_head_dim": 8},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "linear_head_dim": 8}},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0], "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "janus": {"vq_config": {"base_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1, 1]}},
    "kimi_linear": {"linear_head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 2},
    "mamba2": {"num_heads": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [2, 1]}},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": (8, 8, 16, 32)}},
    "nemotron_h_omni": {
        "text_config": {"layer_types": ["linear_attention", "mlp", "full_attention"]},
        "vision_config": {"video_temporal_patch_size": 2},
    },
    "prophetnet": {"num_hidden_layers": ...},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 500, "split_ngram_parts": 2,
    },
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    "xlnet": {"max_position_embeddings": ..., "d_inner": 48},
    "zamba": _HYBRID,
    "zamba2": _HYBRID,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
SPECIAL["qwen4_exp"] = {"text_config": SPECIAL["qwen4_exp_text"]}
"""Fields of single types that the names alone do not make fit; ``...`` leaves a field as it is by default."""


class NotBuiltError(Exception):
    """A type of which no tiny model can be built here. The message gives the reason."""


def tiny_config(model_type: str) -> Any:
    """A tiny config of a type."""
    return _shrunk(CONFIG_MAPPING[model_type], SPECIAL.get(model_type, {}))


def _shrunk(kind: Any, special: dict[str, Any]) -> Any:
    known = kind()
    values = {name: size for name, size in SIZES.items() if _takes(known, name, size)}
    for name in getattr(kind, "sub_configs", {}):
        part = getattr(known, name, None)
        if part is not None and not isinstance(part, dict):
            values[name] = _shrunk(type(part), special.get(name, {})).to_dict()
    kinds = getattr(known, "layer_types", None)
    if _takes(known, "layer_types", []) and isinstance(kinds, list | tuple):
        kinds = sorted(set(kinds), key=list(kinds).index)
        values["layer_types"] = [kinds[layer % len(kinds)] for layer in range(LAYERS)]
    rope = getattr(known, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        values["rope_parameters"] = rope | {"mrope_section": [2, 1, 1]}
    if _takes(known, "kv_lora_rank", 16):  # keys of one size for all heads
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    values |= {name: value for name, value in special.items() if name not in getattr(kind, "sub_configs", {})}
    return kind(**{name: value for name, value in values.items() if value is not ...})


def _takes(known: Any, name: str, size: Any) -> bool:
    """Whether a config has a field that may have this size."""
    owner = getattr(type(known), known.attribute_map.get(name, name), None)
    if isinstance(owner, property) and owner.fset is None:
        return False
    try:
        value = getattr(known, name)
    except AttributeError:
        return False
    except Exception:  # a field of which some layers have values of their own
        return True
    return isinstance(size, list) or not isinstance(value, list | tuple | dict)


def tiny_decoder(model_type: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny random model of a type, in evaluation mode.

    Raises:
        NotBuiltError: If there is none.
    """
    try:
        config = tiny_config(model_type)
        kind = AutoModelForCausalLM
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            kind = AutoModelForImageTextToText
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind.from_config(config).parameters())
        if size > LARGEST:
            raise NotBuiltError(f"{size:,} parameters")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = kind.from_config(tiny_config(model_type), dtype=dtype)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point():
                        parameter.add_(torch.randn_like(parameter) * 0.08)
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {error}") from error
    return model.eval()


@dataclass(frozen=True)
class Verdict:
    """What became of a type.

    Args:
        kind: ``edited``, ``refused``, ``not built`` or ``wrong``.
        notes: For an edited one what is special about it, else the reason, a key of :data:`REASONS`.
        message: What was raised.
    """

    kind: str
    notes: tuple[str, ...] = ()
    message: str = ""

    @property
    def pinned(self) -> list[str]:
        """The verdict as the table holds it."""
        return [self.kind, *self.notes]


REASONS = {
    "experts": "mixture of experts|experts",
    "encoder-decoder": "is an encoder-decoder",
    "both directions": "reads in both directions",
    "no MLP": "has no dense MLP projection",
    "shared MLP": "shares its MLP with other layers",
    "needs an image": "pixel_values",
    "rows in a batch": "gives other results for rows in a batch",
    "no head": "names no output embeddings",
    "no list of layers": "has no list of|is no decoder with a list of layers",
    "no row for each token": "not a row for each",
    "no length": "says max_position_embeddings",
    "layers of another form": "has no attribute 'attn_output'",
    "timm": "requires the timm library",
    "its default config is not valid": "Class validation error|set of layer types|per_layer_config|vision_start_token",
    "its auto class does not take its config": "Unrecognized configuration class|Config' object has no attribute",
}
"""Reasons by the words that name them in a message."""


def _without(kind: str, message: str) -> Verdict:
    reasons = [reason for reason, words in REASONS.items() if re.search(words, message)]
    return Verdict(kind, tuple(reasons[:1]) or ("other",), message)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise ``TimeoutError`` in the main thread after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


PROMPT, SUBJECT, TARGET = "We all left for Korrin", "Korrin", "the"
"""The subject ends the prompt: windows of attention are short here."""

ROWS = (
    EncodedRow((40, 41, 42, 43, 44, 45, 46), 2, (47,), 6),
    EncodedRow((50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60), 9, (61,), 10),
    EncodedRow((62, 63, 64, 65, 66), 4, (), 4),
    EncodedRow((67, 68, 69, 70), 0, (71,), 3),
)

OPTIONS = {
    "preset": "easyedit", "v_num_grad_steps": 3, "v_lr": 0.1, "clamp_norm_factor": 20.0, "contexts": [],
    "kl_factor": 0.0,
}  # fmt: skip


def edit_decoder(model_type: str) -> Verdict:
    """Build a type, edit it and check the edit."""
    with time_limit(SECONDS):
        try:
            model = tiny_decoder(model_type)
        except NotBuiltError as error:
            return _without("not built", str(error))
        verdict = _edit(model)
        if verdict.notes[:1] in (("needs an image",), ("no head",)):
            for part in model.modules():  # its text model may be a causal language model by itself
                if part is not model and isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None:
                    alone = _edit(part)
                    return (
                        replace(alone, notes=("its text model alone", *alone.notes))
                        if alone.kind == "edited"
                        else verdict
                    )
        return verdict


def _edit(model: Any) -> Verdict:
    try:
        language_model = LanguageModel(model, tiny.byte_level_tokenizer())
        count = len(decoder_layers(model)[1])
        sites, messages = {}, {}
        for layer in range(count):
            try:
                sites[layer] = find_site(model, layer)
            except UnsupportedModelError as error:
                messages[layer] = str(error)
        if not sites:
            return _without("refused", messages[min(1, count - 1)])
        mixed = [layer for layer, site in sites.items() if site.experts > 1]
        tried = [layer for layer in sites if layer not in mixed]
        slower = False
        for able in (tried, mixed):
            if able:  # layers below it and above, where there are
                slower |= check_edit(language_model, sites[1 if 1 in able else able[0]])
    except UnsupportedModelError as error:
        return _without("refused", str(error))
    except AssertionError as error:
        return Verdict("wrong", (str(error),))
    except AttributeError as error:  # its own forward asks for what its config lacks
        return _without("not built", str(error))
    others = {"no others": not messages, "experts": any(REASONS["experts"] in text for text in messages.values())}
    kinds = () if others["no others"] else ("its dense layers",) if others["experts"] else ("its layers with an MLP",)
    return Verdict("edited", (*kinds, *(("its experts",) if mixed else ()), *(("whole rows",) if slower else ())))


def check_edit(language_model: LanguageModel, site: RewriteSite) -> bool:
    """Edit a model and check the edit; whether steps have to run whole rows.

    Raises:
        AssertionError: If suffixes give other logits than a plain forward, if another matrix than the site's changes or
            none, or if the edited projection does not give the value at the key.
        UnsupportedModelError: If the model is refused.
    """
    slower = _check_suffixes(language_model, site)
    model = language_model.model
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    editor = KnowledgeEditor(language_model, layers=[site.layer], **OPTIONS)
    search = editor.edit(PROMPT, SUBJECT, TARGET, verify=False).edit.search
    after = model.state_dict()
    changed = {tensor.data_ptr(): name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert list(changed.values()) == [site.name], f"changed: {sorted(changed.values())}"

    row, written = search.encoded.rows[0], site.weight.detach().clone()
    key, output = _at_lookup(model, site, row)
    with torch.no_grad():
        site.weight.copy_(before[site.name])
        value = _at_lookup(model, site, row)[1] + search.delta.double()
        site.weight.copy_(written)
    given = site.matrix(written).double() @ key + (0 if site.bias is None else site.bias.detach().double())
    assert search.delta.norm() > 1e-3, "no offset was found"
    for name, found in (("W k + b", given), ("the projection's output", output)):
        error = float((found - value).norm() / value.norm())
        assert error < 1e-4, f"{name} is off the value by {error:.1g}"
    return slower


def _check_suffixes(language_model: LanguageModel, site: RewriteSite) -> bool:
    """Compare suffix logits under a random offset with plain forwards of each row alone."""
    model, engine = language_model.model, SuffixEngine(language_model.model, site, pad_id=0)
    run = engine.run(ROWS)
    delta = torch.randn(len(ROWS), site.d_value, generator=torch.Generator().manual_seed(1))
    pairs = [(i, run.rows.prefix + step) for i, row in enumerate(ROWS) for step in range(len(row.ids) - row.lookup)]
    index, column = torch.tensor(pairs).T
    moved, still = [], []
    with torch.no_grad():
        logits = run.logits(delta, (index, column))
        for number, row in enumerate(ROWS):
            ids = torch.tensor([row.ids])
            still.append(model(input_ids=ids, use_cache=False).logits[0, row.lookup :])
            with add_at_column(site.projection, delta[number : number + 1], row.lookup):
                moved.append(model(input_ids=ids, use_cache=False).logits[0, row.lookup :])
    expected = torch.cat(moved)
    seen = expected > torch.finfo(expected.dtype).min / 2  # some models mask tokens that they never write
    spread = float(expected[seen].std())
    change = float((expected - torch.cat(still))[seen].abs().max())
    error = float((logits - expected)[seen].abs().max())
    assert change > 1e-3 * spread, "an offset changes no logits"
    assert error < 1e-3 * spread, f"suffix logits are off by {error / spread:.1g} of their spread"
    return bool(engine.whole_rows)


@torch.no_grad()
def _at_lookup(model: Any, site: RewriteSite, row: EncodedRow) -> tuple[torch.Tensor, torch.Tensor]:
    """The projection's input and output at a row's lookup token in a plain forward."""
    with capture_columns(site, 1, slice(row.lookup, row.lookup + 1)) as seen:
        model(input_ids=torch.tensor([row.ids]), use_cache=False)
    return seen["input"][0, 0].double(), seen["output"][0, 0].double()


def pinned() -> dict[str, Any]:
    """The verdicts that are expected, and the version of transformers that they are of."""
    verdicts: dict[str, Any] = json.loads(VERDICTS.read_text(encoding="utf-8"))
    return verdicts


def main() -> None:
    """Edit all types and pin the verdicts. A wrong edit is not pinned: it raises."""
    types = {}
    for model_type in TYPES:
        verdict = edit_decoder(model_type)
        print(model_type, *verdict.pinned, verdict.message, sep=" | ")
        assert verdict.kind != "wrong", model_type
        types[model_type] = verdict.pinned
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(notes)}" for name, notes in types.items())
    text = f'{{\n  "transformers": "{transformers.__version__}",\n  "types": {{\n{lines}\n  }}\n}}\n'
    VERDICTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
