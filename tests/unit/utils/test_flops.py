import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from rome_pl.forward.hooks import add_at_column
from rome_pl.forward.partial import stopped_after
from rome_pl.model.architecture import decoder_layers, find_site
from rome_pl.utils.flops import count_flops
from rome_pl.utils.restored_state import frozen
from tests.tiny import tiny_model

ROWS, LENGTH = 2, 8
TOKENS = ROWS * LENGTH
IDS = torch.arange(3, 3 + TOKENS).reshape(ROWS, LENGTH)

# m, k, n and a batch: all different, so that no formula is right by taking one for another.
M, K, N, B = 3, 5, 7, 2
PRODUCTS = {
    "mm": (lambda r: r(M, K) @ r(K, N), M * K * N),
    "mm out": (lambda r: torch.mm(r(M, K), r(K, N), out=torch.empty(M, N)), M * K * N),
    "vector mm": (lambda r: r(K) @ r(K, N), K * N),
    "addmm": (lambda r: torch.addmm(r(M, N), r(M, K), r(K, N)), M * K * N),
    "addmm_": (lambda r: r(M, N).addmm_(r(M, K), r(K, N)), M * K * N),
    "addmm out": (lambda r: torch.addmm(r(N), r(M, K), r(K, N), out=torch.empty(M, N)), M * K * N),
    "bmm": (lambda r: torch.bmm(r(B, M, K), r(B, K, N)), B * M * K * N),
    "4d": (lambda r: r(B, 4, M, K) @ r(B, 4, K, N), B * 4 * M * K * N),
    "3d by 2d": (lambda r: r(B, M, K) @ r(K, N), B * M * K * N),
    "einsum": (lambda r: torch.einsum("bmk,bkn->bmn", r(B, M, K), r(B, K, N)), B * M * K * N),
    "baddbmm": (lambda r: torch.baddbmm(r(B, M, N), r(B, M, K), r(B, K, N)), B * M * K * N),
    "baddbmm_": (lambda r: r(B, M, N).baddbmm_(r(B, M, K), r(B, K, N)), B * M * K * N),
    "addbmm": (lambda r: torch.addbmm(r(M, N), r(B, M, K), r(B, K, N)), B * M * K * N),
    "addbmm_": (lambda r: r(M, N).addbmm_(r(B, M, K), r(B, K, N)), B * M * K * N),
    "mv": (lambda r: r(M, K) @ r(K), M * K),
    "addmv": (lambda r: torch.addmv(r(M), r(M, K), r(K)), M * K),
    "addmv_": (lambda r: r(M).addmv_(r(M, K), r(K)), M * K),
    "dot": (lambda r: r(K) @ r(K), K),
    "vdot": (lambda r: torch.vdot(r(K), r(K)), K),
    "addr": (lambda r: torch.addr(r(M, N), r(M), r(N)), M * N),
    "addr_": (lambda r: r(M, N).addr_(r(M), r(N)), M * N),
    "linear": (lambda r: functional.linear(r(B, M, K), r(N, K)), B * M * K * N),
    "linear and bias": (lambda r: functional.linear(r(B, M, K), r(N, K), r(N)), B * M * K * N),
    "linear of a vector": (lambda r: functional.linear(r(K), r(N, K), r(N)), K * N),
    "linear of a transpose": (lambda r: functional.linear(r(M, B, K).transpose(0, 1), r(N, K), r(N)), B * M * K * N),
    "elementwise": (lambda r: torch.outer(r(M), r(N)).exp().sum() + r(M, N) * r(M, N), 0),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("run", "multiplications"), PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_costs_two_operations_per_multiplication(run, multiplications, mode):
    with mode(), count_flops() as counted:
        run(torch.randn)
    assert counted.total == 2 * multiplications
    assert type(counted.total) is int


@pytest.mark.parametrize(
    "name", ["mm", "addmm", "bmm", "baddbmm", "einsum", "4d", "3d by 2d", "linear", "linear and bias"]
)
def test_the_backward_of_a_product_costs_two_more(name):
    run, multiplications = PRODUCTS[name]
    with count_flops() as counted:
        run(lambda *shape: torch.randn(shape, requires_grad=True)).sum().backward()
    assert counted.total == 3 * 2 * multiplications


def test_an_overload_that_names_the_type_of_its_output():
    left, right = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((B, M, K), (B, K, N)))
    added = torch.empty(M, N, device="meta")
    with count_flops() as counted:
        torch.bmm(left, right, out_dtype=torch.float32)
        torch.mm(left[0], right[0], out_dtype=torch.float32)
        torch.addmm(added, left[0], right[0], out_dtype=torch.float32)
    assert counted.total == 2 * (B + 2) * M * K * N


def grouped(left, right, ends=None):
    aten = torch.ops.aten._grouped_mm
    return aten(left, right, None if ends is None else torch.tensor(ends, dtype=torch.int32))


def test_grouped_products_of_experts():
    def r(*shape):
        return torch.randn(shape, dtype=torch.bfloat16)

    rows, wide, narrow, experts = 24, 32, 16, 3
    for left, right, ends, expected in [
        (r(rows, wide), r(experts, wide, narrow), [8, 8, 24], rows * wide * narrow),  # what each expert gives
        (r(wide, rows), r(rows, narrow), [8, 16, 24], wide * rows * narrow),  # the gradient of each expert's weight
        (r(experts, rows, wide), r(wide, 48), [16, 32, 48], rows * wide * 48),
        (r(experts, rows, wide), r(experts, wide, narrow), None, experts * rows * wide * narrow),
    ]:
        with count_flops() as counted:
            grouped(left, right, ends)
        assert counted.total == 2 * expected


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("input_needs", "weight_needs", "passes"), [(True, False, 2), (False, True, 2), (True, True, 3)]
)
def test_a_linear_layer_costs_one_product_per_gradient(bias, input_needs, weight_needs, passes):
    layer = nn.Linear(K, N, bias=bias).requires_grad_(weight_needs)
    x = torch.randn(B, M, K, requires_grad=input_needs)
    with count_flops() as counted:
        layer(x).sum().backward()
    assert counted.total == (1 + input_needs + weight_needs) * 2 * B * M * K * N


QUERIES, KEYS, HEADS, WIDTH = 6, 9, 4, 8
ONE_PRODUCT = 2 * ROWS * HEADS * QUERIES * KEYS * WIDTH


def attention_inputs(kv_heads, needs_grad, keys=KEYS):
    shapes = (HEADS, QUERIES), (kv_heads, keys), (kv_heads, keys)
    return [torch.randn(ROWS, heads, length, WIDTH, requires_grad=needs_grad) for heads, length in shapes]


def by_hand(query, key, value, attn_mask=None, enable_gqa=False):
    key, value = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) / WIDTH**0.5
    return (scores if attn_mask is None else scores + attn_mask).softmax(dim=-1) @ value


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", ["fused", "math", "by hand"])
def test_attention_costs_two_products_forward_and_four_backward(kernel, masked, kv_heads, mode):
    attention = by_hand if kernel == "by hand" else functional.scaled_dot_product_attention
    choice = {"fused": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}.get(kernel)
    mask = torch.zeros(ROWS, 1, QUERIES, KEYS) if masked else None
    inputs = attention_inputs(kv_heads, needs_grad=mode is torch.enable_grad)
    with mode(), sdpa_kernel(choice) if choice else nullcontext(), count_flops() as counted:
        output = attention(*inputs, attn_mask=mask, enable_gqa=kv_heads != HEADS)
        assert counted.total == 2 * ONE_PRODUCT
        if output.requires_grad:
            output.sum().backward()
            assert counted.total == 6 * ONE_PRODUCT


def test_causal_attention_counts_every_score():
    inputs = attention_inputs(HEADS, needs_grad=True, keys=QUERIES)
    with count_flops() as counted:
        functional.scaled_dot_product_attention(*inputs, is_causal=True).sum().backward()
    assert counted.total == 6 * ONE_PRODUCT * QUERIES // KEYS


def test_kernels_of_other_devices_count_the_same():
    query, key, value = (x.to("meta", torch.float16) for x in attention_inputs(2, needs_grad=False))
    sums, seed = torch.empty(ROWS, HEADS, QUERIES, device="meta"), torch.empty((), dtype=torch.long, device="meta")
    lengths = (seed, seed, QUERIES, KEYS)
    inputs, saved = (query, key, value), (query, query, key, value)
    aten = torch.ops.aten
    calls = [
        lambda: aten._scaled_dot_product_flash_attention(*inputs),
        lambda: aten._scaled_dot_product_efficient_attention(*inputs, None, True),
        lambda: aten._scaled_dot_product_cudnn_attention(*inputs, None, True),
        lambda: aten._scaled_dot_product_flash_attention_backward(
            *saved, query, sums, *lengths, 0.0, False, seed, seed
        ),
        lambda: aten._scaled_dot_product_efficient_attention_backward(
            *saved, None, query, sums, seed, seed, 0.0, [True, True, True, False]
        ),
        lambda: aten._scaled_dot_product_cudnn_attention_backward(
            *saved, query, sums, seed, seed, None, *lengths, 0.0, False
        ),
    ]
    costs = []
    for call in calls:
        with count_flops() as counted:
            call()
        costs.append(counted.total // ONE_PRODUCT)
    assert costs == [2, 2, 2, 4, 4, 4]


def layer_costs(family, config):
    """Of one decoder layer's forward over all tokens: its dense maps, and its scores and what they weigh."""
    d, heads = config.hidden_size, config.num_attention_heads
    if family == "gpt2":
        dense = d * 3 * d + d * d + d * config.n_inner + config.n_inner * d
        width = d // heads
    else:
        width = config.head_dim
        dense = d * width * (heads + 2 * config.num_key_value_heads) + heads * width * d
        dense += 3 * d * config.intermediate_size
    return 2 * TOKENS * dense, 2 * 2 * ROWS * heads * LENGTH * LENGTH * width


def head_cost(config):
    return 2 * TOKENS * config.hidden_size * config.vocab_size


def angles_cost(model):
    """Of the rotary angles, once a forward: some releases of transformers take a product for them."""
    if (rotary := getattr(model.base_model, "rotary_emb", None)) is None:
        return 0
    with count_flops() as counted:
        rotary(torch.empty(1), torch.arange(LENGTH)[None])
    return counted.total


@pytest.mark.parametrize("weights_need", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_and_its_backward_to_the_embedding(family, attention, weights_need):
    model = tiny_model(family).requires_grad_(weights_need)
    model.set_attn_implementation(attention)
    config = model.config
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with count_flops() as counted:
        model(inputs_embeds=embedded, attention_mask=torch.ones_like(IDS), use_cache=False).logits.sum().backward()
    assert embedded.grad is not None
    dense, scores = layer_costs(family, config)
    linear = config.num_hidden_layers * dense + head_cost(config)
    expected = linear * (3 if weights_need else 2) + config.num_hidden_layers * scores * 3
    assert counted.total == expected + angles_cost(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_and_its_backward_to_an_offset_behind_one_layer(family, attention):
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    config, layer = model.config, 1
    delta = torch.zeros(ROWS, config.hidden_size, dtype=torch.float64, requires_grad=True)
    projection = find_site(model, layer).projection
    with frozen(model), add_at_column(projection, delta, column=2), count_flops() as counted:
        logits = model(IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
        forward = counted.total
        logits.sum().backward()
    dense, scores = layer_costs(family, config)
    assert delta.grad.abs().sum() > 0
    assert forward == config.num_hidden_layers * (dense + scores) + head_cost(config) + angles_cost(model)
    later = config.num_hidden_layers - 1 - layer
    assert counted.total - forward == later * (dense + 2 * scores) + head_cost(config)


def test_a_forward_that_a_hook_ends_counts_what_ran():
    model = tiny_model("llama")
    with torch.no_grad(), count_flops() as counted:
        for _ in range(2):
            with stopped_after(decoder_layers(model)[1][0]):
                model(IDS, use_cache=False)
    assert counted.total == 2 * (sum(layer_costs("llama", model.config)) + angles_cost(model))


def test_blocks_nest_and_end_with_themselves():
    left, right = torch.randn(M, K), torch.randn(K, N)
    with pytest.raises(RuntimeError, match="inside"), count_flops() as outer:  # noqa: PT012
        left @ right
        with count_flops() as inner:
            left @ right
        raise RuntimeError("inside")
    left @ right
    assert (inner.total, outer.total) == (2 * M * K * N, 4 * M * K * N)
    with count_flops() as fresh:
        pass
    assert fresh.total == 0


def test_counting_changes_nothing_and_prints_nothing(capsys):
    model = tiny_model("llama")
    expected = model(IDS).logits
    with count_flops():
        assert torch.equal(model(IDS).logits, expected)
    assert capsys.readouterr() == ("", "")


def test_a_graph_that_is_dropped_inside_is_freed_inside():
    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    seen = []

    def pack(tensor):
        saved = Saved(tensor.detach())  # with its graph it would keep itself alive
        seen.append(weakref.ref(saved))
        return saved

    layers = nn.Sequential(nn.Linear(K, K), nn.Tanh(), nn.Linear(K, K))
    x = torch.randn(M, K, requires_grad=True)
    with count_flops(), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        output = layers(x)
        assert any(ref() is not None for ref in seen)
        del output
        gc.collect()
        assert all(ref() is None for ref in seen)
