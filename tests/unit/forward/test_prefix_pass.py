from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from rome_pl.encoding.encoded_rows import EncodedRow
from rome_pl.forward.prefix_pass import run_prefix
from rome_pl.model.architecture import decoder_layers, find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest
from rome_pl.utils.restored_state import frozen
from tests import tiny
from tests.tiny import FAMILIES, LAYERS, KeepFloat64, byte_level_tokenizer, tiny_language_model, tiny_model

CONTEXTS = ("", "It rains. ", "A much longer opening text. ")
REQUEST = EditRequest(
    prompt="The mother tongue of Danielle Darrieux is", subject="Danielle Darrieux", target_new="English"
)
AT_THE_START = EditRequest(prompt="Rome is the capital of", subject="Rome", target_new="France")
# Families with a window in the tiny models, and a layer that has it.
SLIDING = {"mistral": 1, "gemma2": 0, "gemma3_text": 1, "starcoder2": 2, "phi3": 1, "gpt_neo": 1}


@pytest.fixture(autouse=True)
def float64_everywhere():
    with KeepFloat64():
        yield


@cache
def shared_model(family):
    """A model that tests only read."""
    return tiny_language_model(family)


def rows_of(language_model, request=REQUEST, contexts=CONTEXTS):
    encoded = language_model.encoder.edit(request, contexts, kl_position="last")  # a row that goes on after the lookup
    return [*encoded.rows, encoded.kl_row]


def from_lookup_on(rows):
    """Row and column of every token from the lookup token on, columns counted in the aligned rows."""
    prefix = max(row.lookup for row in rows)
    pairs = [
        (index, prefix + step - row.lookup)
        for index, row in enumerate(rows)
        for step in range(row.lookup, len(row.ids))
    ]
    return tuple(torch.tensor(pairs).T)


def plain_forward(model, site, row, delta=None):
    """One unpadded row through the whole model; delta joins the projection's output at the lookup token."""
    seen = {}

    def hook(_, inputs, output):
        seen["key"], seen["output"] = inputs[0].reshape(-1, site.d_key)[row.lookup], output.reshape(-1, site.d_value)
        seen["output"] = seen["output"][row.lookup].clone()
        if delta is None:
            return None
        offset = torch.zeros_like(output).reshape(-1, site.d_value)
        offset = offset.index_put((torch.tensor(row.lookup),), delta)
        return output + offset.reshape(output.shape)

    handle = site.projection.register_forward_hook(hook)
    try:
        logits = model(torch.tensor([row.ids]), use_cache=False).logits[0, row.lookup :]
    finally:
        handle.remove()
    return logits, seen["key"].detach(), seen["output"].detach()


def plain_logits(model, site, rows, delta):
    return torch.cat([plain_forward(model, site, row, offset)[0] for row, offset in zip(rows, delta, strict=True)])


def random_delta(rows, site, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(rows), site.d_value, generator=generator, dtype=torch.float64)


def assert_equals_plain_forward(language_model, layer, rows, pad_id=0):
    """Logits, keys, outputs and the gradient of the suffix forward are those of plain forwards of each row."""
    model = language_model.model
    site = find_site(model, layer)
    run, positions = run_prefix(model, site, rows, pad_id), from_lookup_on(rows)

    with torch.no_grad():
        plain = [plain_forward(model, site, row) for row in rows]
        at_zero = run.logits(torch.zeros(len(rows), site.d_value, dtype=torch.float64), positions)
    torch.testing.assert_close(at_zero, torch.cat([logits for logits, _, _ in plain]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run.keys, torch.stack([key for _, key, _ in plain]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run.outputs, torch.stack([output for _, _, output in plain]), rtol=1e-9, atol=1e-9)

    delta = random_delta(rows, site).requires_grad_()
    moved, expected = run.logits(delta, positions), plain_logits(model, site, rows, delta)
    assert (expected - at_zero).abs().max() > 1e-3  # the offset matters, so equality below says something
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((moved * weights).sum(), delta)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), delta)
    assert (expected_gradient.norm(dim=1) > 1e-3).all()
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", FAMILIES)
def test_suffix_forward_equals_plain_forward(family, layer):
    language_model = shared_model(family)
    rows = rows_of(language_model)
    assert len({row.lookup for row in rows}) > 2  # left padding
    assert len({len(row.ids) - row.lookup for row in rows}) > 1  # right padding
    assert_equals_plain_forward(language_model, layer, rows)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", FAMILIES)
def test_lookup_at_the_very_first_token(family, layer):
    language_model = shared_model(family)
    rows = [
        EncodedRow(row.ids[row.lookup :], 0, row.target, row.first - row.lookup)
        for row in rows_of(language_model, AT_THE_START, ("",))
    ]
    assert run_prefix(language_model.model, find_site(language_model.model, layer), rows, 0).rows.prefix == 0
    assert_equals_plain_forward(language_model, layer, rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_and_without_a_prefix_share_a_batch(family):
    language_model = shared_model(family)
    first = EncodedRow((40, 41, 42, 43), 0, (44,), 3)
    assert_equals_plain_forward(language_model, 1, [first, *rows_of(language_model)])


@pytest.mark.parametrize("family", SLIDING)
def test_tiny_models_that_should_slide_do(family, monkeypatch):
    """Guards the next test: a window that the tiny config ignored would prove nothing."""
    ids = torch.arange(3, 40).unsqueeze(0)
    sliding = tiny_model(family)
    for name in ("sliding_window", "window_size"):
        monkeypatch.setitem(tiny._SIZES, name, 64)
    wide = tiny_model(family)
    with torch.no_grad():
        short = (sliding(ids[:, :3]).logits - wide(ids[:, :3]).logits).abs().max()
        long = (sliding(ids).logits[0, -1] - wide(ids).logits[0, -1]).abs().max()
    assert short < 1e-12
    assert long > 1e-3


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", SLIDING)
def test_rows_longer_than_the_sliding_window(family, layer):
    language_model = shared_model(family)
    generator = torch.Generator().manual_seed(5)
    rows = []
    for length, lookup in ((30, 20), (9, 2), (25, 3), (18, 17), (12, 0)):  # the window is 4
        ids = torch.randint(3, 400, (length,), generator=generator).tolist()
        rows.append(EncodedRow(tuple(ids), lookup, (7,), length - 1))
    assert_equals_plain_forward(language_model, layer, rows)


def variant(family, **options):
    config = AutoConfig.for_model(family)
    values = {name: value for name, value in tiny._SIZES.items() if hasattr(config, name)}
    attention = options.pop("attention", None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **{**values, **options}), dtype=torch.float64, attn_implementation=attention
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.08)
    return LanguageModel(model.eval(), byte_level_tokenizer())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("falcon", {"alibi": True, "num_key_value_heads": 4}),
        ("falcon", {"new_decoder_architecture": True}),
        ("falcon", {"parallel_attn": False, "bias": True, "num_key_value_heads": 4}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
        ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "attention": "eager"}),
        ("llama", {"attention": "eager"}),
        ("mistral", {"attention": "eager"}),
    ],
)
def test_variants_within_a_family(family, options):
    language_model = variant(family, **options)
    assert_equals_plain_forward(language_model, 1, rows_of(language_model))


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_composition_and_pad_id_change_nothing(family):
    language_model = shared_model(family)
    model, rows = language_model.model, rows_of(language_model)
    site, positions, delta = find_site(model, 1), from_lookup_on(rows), random_delta(rows, find_site(model, 1))
    with torch.no_grad():
        together = run_prefix(model, site, rows, 0)
        expected = together.logits(delta, positions)

        other_pad = run_prefix(model, site, rows, 123)
        torch.testing.assert_close(other_pad.logits(delta, positions), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(other_pad.keys, together.keys, rtol=1e-10, atol=1e-10)

        for index, row in enumerate(rows):
            alone = run_prefix(model, site, [row], 0)
            logits = alone.logits(delta[index : index + 1], from_lookup_on([row]))
            torch.testing.assert_close(logits, expected[positions[0] == index], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(alone.keys[0], together.keys[index], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(alone.outputs[0], together.outputs[index], rtol=1e-9, atol=1e-9)

        reversed_logits = run_prefix(model, site, rows[::-1], 0).logits(delta.flip(0), from_lookup_on(rows[::-1]))
        for index in range(len(rows)):
            there = reversed_logits[from_lookup_on(rows[::-1])[0] == len(rows) - 1 - index]
            torch.testing.assert_close(there, expected[positions[0] == index], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_logits_may_be_asked_for_again_and_again(family):
    """One step's offset leaves nothing in the cache or the graph for the next."""
    language_model = shared_model(family)
    model, rows = language_model.model, rows_of(language_model)
    site, positions = find_site(model, 1), from_lookup_on(rows)
    run, delta = run_prefix(model, site, rows, 0), random_delta(rows, site).requires_grad_()
    answers = []
    for seed in (1, 2, 1):
        with torch.no_grad():
            delta.copy_(random_delta(rows, site, seed))
        logits = run.logits(delta, positions)
        answers.append((logits.detach().clone(), torch.autograd.grad(logits.square().sum(), delta)[0]))
    assert torch.equal(answers[0][0], answers[2][0])
    assert torch.equal(answers[0][1], answers[2][1])
    assert not torch.equal(answers[0][0], answers[1][0])


@pytest.mark.parametrize("family", ["gpt2", "gptj", "falcon", "llama", "gemma2"])
def test_only_the_asked_positions_are_answered_in_the_order_asked(family):
    language_model = shared_model(family)
    model, rows = language_model.model, rows_of(language_model)
    site, delta = find_site(model, 1), random_delta(rows, find_site(model, 1))
    run, (row, column) = run_prefix(model, site, rows, 0), from_lookup_on(rows)
    chosen = torch.tensor([5, 0, 3, 3])
    with torch.no_grad():
        few, every = run.logits(delta, (row[chosen], column[chosen])), run.logits(delta, (row, column))
    assert few.shape == (4, 400)
    torch.testing.assert_close(few, every[chosen], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_positions_are_those_of_the_targets(family):
    language_model = shared_model(family)
    model, rows = language_model.model, rows_of(language_model)
    site = find_site(model, 2)
    run = run_prefix(model, site, rows, 0)
    zeros = torch.zeros(len(rows), site.d_value, dtype=torch.float64)
    with torch.no_grad():
        logits = run.logits(zeros, (run.rows.predict_row, run.rows.predict_column))
        plain = [model(torch.tensor([row.ids])).logits[0, row.first :] for row in rows if row.target]
    torch.testing.assert_close(logits, torch.cat(plain), rtol=1e-9, atol=1e-9)
    assert run.rows.labels.tolist() == [token for row in rows for token in row.target]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon", "llama", "gemma3_text"])
def test_kernels_that_answer_nan_where_nothing_is_attended_to(family, monkeypatch):
    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if is_causal else attn_mask
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ value

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    language_model = shared_model(family)
    with torch.no_grad():
        padded = {"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
        assert language_model.model(**padded).logits.isnan().any()
    assert_equals_plain_forward(language_model, 1, rows_of(language_model))


@contextmanager
def nothing_left_behind(model):
    """The same modules in the same places, no hook, and every flag and mode as before."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        module.training = bool(torch.rand(1, generator=generator) < 0.5)
    for parameter in model.parameters():
        parameter.requires_grad_(bool(torch.rand(1, generator=generator) < 0.5))
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    flags = [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert [(name, id(module), module.training) for name, module in model.named_modules()] == modules
    assert [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_behind(family, layer):
    language_model = tiny_language_model(family)
    model, rows = language_model.model, rows_of(language_model)
    site, delta = find_site(model, layer), random_delta(rows, find_site(model, layer)).requires_grad_()
    with nothing_left_behind(model):
        run = run_prefix(model, site, rows, 0)
        run.logits(delta, from_lookup_on(rows)).square().sum().backward()
    assert delta.grad.norm() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_behind_when_the_model_raises(family, monkeypatch):
    language_model = tiny_language_model(family)
    model, rows = language_model.model, rows_of(language_model)
    site = find_site(model, 1)
    delta = random_delta(rows, site)
    run = run_prefix(model, site, rows, 0)
    with torch.no_grad():
        before = run.logits(delta, from_lookup_on(rows))

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    at_the_start = [EncodedRow(row.ids[row.lookup :], 0, (), 0) for row in rows]
    with nothing_left_behind(model), monkeypatch.context() as patch:
        patch.setattr(decoder_layers(model)[1][2], "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run_prefix(model, site, rows, 0)  # on the columns before the lookup column
        with pytest.raises(RuntimeError, match="out of memory"):
            run.logits(delta, from_lookup_on(rows))
        patch.setattr(decoder_layers(model)[1][1], "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run_prefix(model, site, at_the_start, 0)  # on those from it on
    with torch.no_grad(), frozen(model):
        assert torch.equal(run.logits(delta, from_lookup_on(rows)), before)
        assert torch.equal(run_prefix(model, site, rows, 0).logits(delta, from_lookup_on(rows)), before)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_in_training_mode_is_run_without_dropout(family):
    language_model = tiny_language_model(family)
    model, rows = language_model.model, rows_of(language_model)
    site, delta = find_site(model, 1), random_delta(rows, find_site(model, 1))
    with torch.no_grad():
        expected = run_prefix(model, site, rows, 0).logits(delta, from_lookup_on(rows))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        model.train()
        assert torch.equal(run_prefix(model, site, rows, 0).logits(delta, from_lookup_on(rows)), expected)
