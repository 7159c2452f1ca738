"""Which models go on from a cached prefix, which run whole rows, and which are refused."""

import inspect
import logging
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rome_pl.encoding.encoded_rows import EncodedRow
from rome_pl.forward.hooks import add_at_column
from rome_pl.forward.prefix_pass import run_prefix
from rome_pl.forward.suffix_engine import SuffixEngine
from rome_pl.forward.unpadded_pass import run_unpadded
from rome_pl.model.architecture import UnsupportedModelError, decoder_layers, find_site
from rome_pl.model.language_model import LanguageModel
from tests import tiny
from tests.integration.helpers import REQUESTS, run_edits
from tests.tiny import FAMILIES, KeepFloat64, byte_level_tokenizer, tiny_language_model, tiny_model

ROWS = (
    EncodedRow((40, 41, 42, 43, 44, 45, 46), 2, (47,), 6),
    EncodedRow((50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60), 9, (61,), 10),
    EncodedRow((62, 63, 64, 65, 66), 4, (), 4),
    EncodedRow((67, 68, 69, 70), 0, (71,), 3),
)
NO_PREFIX = [ROWS[3]]

MIXER = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
FALLING_BACK = {  # at a layer with attention
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "bamba": MIXER | {"attn_layer_indices": [1]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 8,
        "expert_layer_offset": 7,
        "num_experts": 1,
    },
    "granitemoehybrid": MIXER
    | {"layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 0, "shared_intermediate_size": 48},
    "qwen3_next": LINEAR | {"mlp_only_layers": [0, 1, 2], "head_dim": 8},
    "qwen3_5_text": LINEAR | {"head_dim": 8},
    "olmo_hybrid": LINEAR,
    "xlstm": {},
    "openai-gpt": {},
}
RECURRENT_GEMMA = {
    "lru_width": 32,
    "attention_window_size": 16,
    "block_types": ["recurrent", "attention", "recurrent"],
    "head_dim": 8,
}


def hybrid(family, dtype=torch.float64, **options):
    """A tiny random model of a family that has more than attention."""
    known = AutoConfig.for_model(family)
    sizes = {name: value for name, value in tiny._SIZES.items() if hasattr(known, name)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**sizes, **options})
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.08)
    return model.eval()


class ForgetfulCache(nn.Module):
    """A tiny Llama that takes a cache and does not use it, as a family with layers of its own kind might."""

    def __init__(self, heedless_of_padding=False):
        super().__init__()
        self.inner, self.heedless = tiny_model("llama"), heedless_of_padding
        self.config = self.inner.config

    @property
    def device(self):
        return self.inner.device

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def generate(self, **options):
        return self.inner.generate(**options)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        if past_key_values is not None:
            shape = (len(input_ids), 1, input_ids.shape[1], 1)
            for layer in range(self.config.num_hidden_layers):
                past_key_values.update(torch.zeros(shape), torch.zeros(shape), layer)
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        if self.heedless:
            attention_mask = torch.ones_like(input_ids)
        return self.inner(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )


def engine_of(model, layer=1, **options):
    return SuffixEngine(model, find_site(model, layer), pad_id=0, **options)


def answers(run, seed=1):
    """Logits from each row's lookup token on under a random offset, and the offset's gradient."""
    rows = run.rows.source
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(len(rows), run.site.d_value, generator=generator, dtype=torch.float64).requires_grad_()
    pairs = [(i, run.rows.prefix + step) for i, row in enumerate(rows) for step in range(len(row.ids) - row.lookup)]
    index, column = torch.tensor(pairs).T
    logits = run.logits(delta, (index, column))
    (gradient,) = torch.autograd.grad(logits.square().sum(), delta)
    return logits.detach(), gradient


def plain_answers(model, site, rows, seed=1):
    """The same from forwards of each row alone."""
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(len(rows), site.d_value, generator=generator, dtype=torch.float64).requires_grad_()
    logits = []
    for index, row in enumerate(rows):
        with add_at_column(site.projection, delta[index : index + 1], row.lookup):
            logits.append(model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, row.lookup :])
    (gradient,) = torch.autograd.grad(torch.cat(logits).square().sum(), delta)
    return torch.cat(logits).detach(), gradient


def assert_right(engine, rows=ROWS, tolerance=1e-9):
    for got, expected in zip(answers(engine.run(rows)), plain_answers(engine.model, engine.site, rows), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def warnings_of(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("rome_pl") and record.levelno >= logging.WARNING
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_attention_alone_go_on_from_the_cache(family, caplog):
    engine = engine_of(tiny_model(family))
    run = engine.run(ROWS)
    assert engine.whole_rows is False
    assert run.start == run.rows.prefix == 9
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "falcon"])
def test_rounding_is_no_reason_to_run_whole_rows(family, dtype, caplog):
    engine = engine_of(tiny_model(family, dtype))
    engine.run(ROWS)
    assert engine.whole_rows is False
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("family", FALLING_BACK)
def test_other_families_run_whole_rows_with_a_warning(family, caplog):
    model = hybrid(family, **FALLING_BACK[family])
    engine = engine_of(model)
    # Scans compute in float32 whatever the model's dtype.
    with KeepFloat64() if family != "xlstm" else nullcontext():
        engine.run(ROWS)
        assert engine.whole_rows is True
        assert_right(engine, tolerance=1e-5 if family in ("xlstm", "bamba", "granitemoehybrid") else 1e-9)
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"{type(model).__name__} cannot continue from a cached prefix (")
    assert warning.endswith("every step runs whole rows, which is slower")


def test_a_layer_that_padding_disturbs_runs_rows_of_one_length_at_a_time(caplog):
    """RecurrentGemma's convolution reads what its projection's bias makes of padding."""
    engine = engine_of(hybrid("recurrent_gemma", **RECURRENT_GEMMA))
    with KeepFloat64():
        run = engine.run(ROWS)
        assert engine.unpadded
        assert_right(engine, tolerance=1e-6)
        assert_right(engine, ROWS[2:], tolerance=1e-6)
        whole, _ = answers(run)
        part, _ = answers(run.select([0, 1, 2, 3]))
        torch.testing.assert_close(part, whole)
    (warning,) = warnings_of(caplog)
    assert warning.startswith("RecurrentGemmaForCausalLM gives other results for rows that are padded on the left (")


@pytest.mark.parametrize("rows", [[2, 0], [3], [1, 3, 2, 0], [0, 0, 2]])
def test_rows_without_padding_are_selected_in_any_order(rows):
    model = tiny_model("llama")
    passes = [
        run(model, find_site(model, 1), ROWS, 0, below=[find_site(model, 0)])
        for run in (run_unpadded, partial(run_prefix, whole_rows=True))
    ]
    unpadded, padded = (made.select(rows) for made in passes)
    for got, expected in zip(answers(unpadded), answers(padded), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(unpadded.keys, padded.keys)
    torch.testing.assert_close(unpadded.outputs, padded.outputs)
    sites = [find_site(model, layer) for layer in (0, 1)]
    for got, expected in zip(*(made.below[0].select(rows).through(sites) for made in passes), strict=True):
        for name in ("keys", "outputs", "hidden"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-9, atol=1e-9)


def test_a_layer_that_runs_twice_for_a_token_is_refused():
    model = tiny_model("llama")
    layers = decoder_layers(model)[1]
    once = layers[1].mlp.forward
    layers[1].mlp.forward = lambda hidden: once(once(hidden))
    with pytest.raises(UnsupportedModelError, match="runs layer 1 2 times for each token"):
        engine_of(model).run(ROWS)


def test_a_cache_that_is_not_used_is_found_out(caplog):
    model = ForgetfulCache()
    engine = engine_of(model)
    with KeepFloat64():
        run = engine.run(ROWS)
        assert engine.whole_rows is True
        assert (run.start, run.rows.prefix) == (0, 9)
        assert_right(engine)
    (warning,) = warnings_of(caplog)
    assert "ForgetfulCache cannot continue from a cached prefix (logits are off by" in warning


def test_edits_on_whole_rows_are_those_on_a_cache(tmp_path, caplog):
    with KeepFloat64():
        cached = run_edits(tiny_language_model("llama"), tmp_path)
        assert not [text for text in warnings_of(caplog) if "whole rows" in text]
        whole = run_edits(LanguageModel(ForgetfulCache(), byte_level_tokenizer()), tmp_path)
    assert [text for text in warnings_of(caplog) if "whole rows" in text]
    assert whole.contexts == cached.contexts
    for edit, expected in zip(whole.edits, cached.edits, strict=True):
        assert expected.search.delta.norm() > 0.1
        torch.testing.assert_close(
            edit.search.delta, expected.search.delta, rtol=0, atol=1e-9 * float(expected.search.delta.norm())
        )
        torch.testing.assert_close(edit.search.keys.mean, expected.search.keys.mean, rtol=1e-9, atol=1e-12)
        assert edit.after == pytest.approx(expected.after, rel=1e-9)
    assert len(whole.edits) == len(REQUESTS)


def test_a_model_that_no_way_serves_is_refused(monkeypatch):
    # Its layers know whether they run for a batch.
    model = tiny_model("llama")
    forward = decoder_layers(model)[1][2].forward
    monkeypatch.setattr(
        decoder_layers(model)[1][2], "forward", lambda hidden, **kwargs: forward(hidden * (1 + len(runs)), **kwargs)
    )
    runs: list[None] = []
    monkeypatch.setattr(SuffixEngine, "_plain", _counted(SuffixEngine._plain, runs))
    with pytest.raises(UnsupportedModelError) as caught:
        engine_of(model).run(ROWS)
    message = str(caught.value)
    assert message.startswith("LlamaForCausalLM gives other results for rows in a batch than for single rows (")
    assert message.count("logits are off by") == 3


def _counted(plain, runs):
    def counted(self, row, delta):
        runs.append(None)
        return plain(self, row, delta)

    return counted


def test_a_model_that_raises_every_way_is_refused_with_what_it_raised(monkeypatch):
    model = tiny_model("llama")

    def fail(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(decoder_layers(model)[1][2], "forward", fail)
    with pytest.raises(UnsupportedModelError, match=r"(RuntimeError: no such kernel; ){2}RuntimeError: no such kernel"):
        engine_of(model).run(ROWS)


@pytest.mark.parametrize("make", [lambda: tiny_model("llama"), ForgetfulCache])
def test_the_choice_is_made_once(make, monkeypatch):
    engine, calls = engine_of(make()), []
    error = SuffixEngine._error
    monkeypatch.setattr(SuffixEngine, "_error", lambda self, *args: calls.append(args) or error(self, *args))
    engine.run(ROWS)
    chosen, made = engine.whole_rows, len(calls)
    assert made == (2 if chosen else 1)
    engine.run(ROWS[:2])
    assert (engine.whole_rows, len(calls)) == (chosen, made)


def test_the_choice_leaves_nothing_behind():
    model = tiny_model("llama").train()
    modules, state = [id(module) for module in model.modules()], torch.get_rng_state()
    engine_of(model).run(ROWS)
    assert torch.equal(torch.get_rng_state(), state)
    assert [id(module) for module in model.modules()] == modules
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_rows_that_need_no_cache_decide_nothing():
    engine = engine_of(ForgetfulCache())
    with KeepFloat64():
        engine.run(NO_PREFIX)
        assert_right(engine)


def test_whole_rows_without_a_prefix_need_no_cache():
    """As of a batch of edits whose prompts all open with their subject, where there is no BOS."""
    engine = engine_of(hybrid("lfm2", **FALLING_BACK["lfm2"]))
    run = engine.run(ROWS)
    assert engine.whole_rows is True
    with KeepFloat64():
        expected = plain_answers(engine.model, engine.site, NO_PREFIX)
        for made in (run.select([3]), engine.run(NO_PREFIX)):
            for got, wanted in zip(answers(made), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_padding_is_tried_even_if_the_first_rows_need_none():
    engine = engine_of(hybrid("recurrent_gemma", **RECURRENT_GEMMA))
    engine.run(ROWS[:1])
    assert engine.unpadded


@pytest.mark.parametrize(
    ("family", "options", "name"),
    [
        ("lfm2", FALLING_BACK["lfm2"], "feed_forward.w2"),
        ("qwen3_next", FALLING_BACK["qwen3_next"], "mlp.down_proj"),
        ("bamba", FALLING_BACK["bamba"], "feed_forward.down_proj"),
        (
            "falcon_h1",
            MIXER | {"mamba_d_ssm": 32, "mamba_n_heads": 4},
            "feed_forward.down_proj",
        ),
    ],
)
def test_a_layer_with_a_convolution_has_a_dense_mlp_all_the_same(family, options, name):
    site = find_site(hybrid(family, **options), 0)
    assert site.name == f"model.layers.0.{name}.weight"


# --- compiled layers --------------------------------------------------------------------------------------------------


class Recorded(nn.Module):
    """What torch.compile gives in the tests that do not compile."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.layer(*args, **kwargs)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_compiled_layers_stand_in_above_the_site_only_while_a_suffix_runs(layer, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(Recorded(module)) or compiled[-1])
    model = tiny_model("llama")
    before = [(name, id(module)) for name, module in model.named_modules()]
    engine = engine_of(model, layer, compiled=True)
    layers = list(decoder_layers(model)[1])
    assert [id(stand_in.layer) for stand_in in compiled] == [id(module) for module in layers[layer + 1 :]]
    run = engine.run(ROWS)
    assert [stand_in.calls for stand_in in compiled] == [0] * (2 - layer)
    got = answers(run)
    assert [stand_in.calls for stand_in in compiled] == [1] * (2 - layer)
    answers(run.select([1, 0]))
    assert [stand_in.calls for stand_in in compiled] == [2] * (2 - layer)
    for value, expected in zip(got, answers(engine_of(model, layer).run(ROWS)), strict=True):
        assert torch.equal(value, expected)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    hooked = [*model.modules(), *(module for stand_in in compiled for module in stand_in.modules())]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hooked)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_steps_equal_eager_ones():
    model = tiny_model("llama")
    before = [(name, id(module)) for name, module in model.named_modules()]
    expected = answers(engine_of(model).run(ROWS))
    engine = engine_of(model, compiled=True)
    try:
        for got, wanted in zip(answers(engine.run(ROWS)), expected, strict=True):
            # Llama's norms are float32 ones whatever the model's dtype, and fused they round elsewhere.
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    finally:
        torch.compiler.reset()
    assert isinstance(engine._stand_ins[2], torch._dynamo.eval_frame.OptimizedModule)
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_masks_are_those_the_model_s_forward_names():
    """Guards the models of this file, whose forward the engine reads."""
    assert "position_ids" in inspect.signature(ForgetfulCache().forward).parameters
