from contextlib import contextmanager

import pytest
import torch
from torch import nn

from rome_pl.forward.hooks import add_at_column, add_rank_one, capture_columns, capture_input, clean_padding, head_on
from rome_pl.forward.partial import layer_answer, run_from_layer, stopped_after
from rome_pl.model.architecture import decoder_layers, find_site
from rome_pl.utils.hashing import hash_seed
from rome_pl.utils.restored_state import frozen, seeded
from tests.tiny import FAMILIES, tiny_model

IDS = torch.arange(3, 19).reshape(2, 8)


def hooks_of(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


@contextmanager
def raising():
    with pytest.raises(RuntimeError, match="inside"):
        yield


def fail():
    raise RuntimeError("inside")


@pytest.fixture
def mixed_model():
    """A model in which every other module trains and every third parameter is frozen."""
    model = tiny_model("gpt2")
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    return model


def state_of(model):
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("raises", [False, True])
def test_frozen_restores_every_mode_and_flag(mixed_model, raises):
    before = state_of(mixed_model)
    assert {True, False} == set(before[0]) == set(before[1])
    with raising() if raises else frozen(mixed_model), frozen(mixed_model):
        assert not any(m.training for m in mixed_model.modules())
        assert not any(p.requires_grad for p in mixed_model.parameters())
        if raises:
            fail()
    assert state_of(mixed_model) == before


def test_frozen_keeps_gradients_that_parameters_already_have():
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.grad.clone()
    with frozen(model):
        offset = torch.ones(1, 2, requires_grad=True)
        model(offset).sum().backward()
    assert offset.grad.norm() > 0
    assert torch.equal(model.weight.grad, before)


@pytest.mark.parametrize("raises", [False, True])
def test_seeded_is_deterministic_inside_and_leaves_the_global_state(raises):
    def draw():
        with seeded(11, torch.device("cpu")):
            return torch.rand(4)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = draw()
    if raises:
        with raising(), seeded(11, torch.device("cpu")):
            torch.rand(1)
            fail()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)  # wherever the global generator stands, the draw is the same
    assert torch.equal(draw(), first)
    with seeded(12, torch.device("cpu")):
        assert not torch.equal(torch.rand(4), first)


def test_hash_seed_depends_on_every_part_and_their_order():
    seeds = {hash_seed(*parts) for parts in [(1, "a"), (2, "a"), (1, "b"), ("a", 1), ("1", "a"), (1,), ()]}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_hash_seed_is_what_it_was():
    """Contexts, noise, samples and generated text follow from it: with other seeds no earlier run could be resumed."""
    assert hash_seed(7, 5, "The") == 803429988
    assert hash_seed(0, "new target", "a", "b") == 668363484


@pytest.mark.parametrize("columns", [slice(2, 3), slice(1, None), slice(None)])
def test_capture_columns_reads_flattened_inputs_like_any_other(columns):
    projection = nn.Linear(3, 5, dtype=torch.float64)
    inputs = torch.randn(2, 4, 3, dtype=torch.float64)
    with capture_columns(projection, 2, columns) as kept:
        projection(inputs)
    with capture_columns(projection, 2, columns) as kept_flat:
        projection(inputs.reshape(8, 3))
    assert torch.equal(kept["input"], inputs[:, columns])
    torch.testing.assert_close(kept["output"], projection(inputs)[:, columns], rtol=1e-12, atol=1e-12)
    assert torch.equal(kept_flat["input"], kept["input"])
    torch.testing.assert_close(kept_flat["output"], kept["output"], rtol=1e-12, atol=1e-12)
    assert not kept["output"].requires_grad


def test_capture_columns_keeps_what_is_later_changed_in_place():
    projection = nn.Linear(3, 5)
    with capture_columns(projection, 1, slice(None)) as kept, torch.no_grad():
        output = projection(torch.randn(1, 4, 3))
        before = output.clone()
        output += 1
    assert torch.equal(kept["output"], before)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_capture_input_finds_hidden_states_given_by_position_or_keyword(by_keyword):
    class Layer(nn.Module):
        def forward(self, hidden_states, scale=1.0):
            return hidden_states * scale

    layer, hidden = Layer(), torch.randn(2, 5, 3)
    with capture_input(layer, slice(2, None)) as kept:
        layer(hidden_states=hidden, scale=2.0) if by_keyword else layer(hidden, scale=2.0)
    assert torch.equal(kept["hidden"], hidden[:, 2:])


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("column", [0, 2, 3])
def test_add_at_column_moves_that_column_only(flattened, column):
    projection = nn.Linear(3, 5, dtype=torch.float64)
    inputs = torch.randn(2, 4, 3, dtype=torch.float64)
    inputs = inputs.reshape(8, 3) if flattened else inputs
    delta = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    plain = projection(inputs)
    with add_at_column(projection, delta, column):
        moved = projection(inputs)
    assert moved.shape == plain.shape
    difference = (moved - plain).reshape(2, 4, 5)
    others = [index for index in range(4) if index != column]
    assert (difference[:, others] == 0).all()
    torch.testing.assert_close(difference[:, column], delta, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad((moved.reshape(2, 4, 5) * torch.arange(4).reshape(1, 4, 1)).sum(), delta)
    assert (gradient == column).all()
    assert torch.equal(projection(inputs), plain)


def test_add_at_column_keeps_the_models_dtype():
    projection = nn.Linear(3, 5, dtype=torch.bfloat16)
    inputs, delta = torch.randn(1, 4, 3, dtype=torch.bfloat16), torch.ones(1, 5, requires_grad=True)
    with add_at_column(projection, delta):
        moved = projection(inputs)
    assert moved.dtype == torch.bfloat16
    moved.float().sum().backward()
    assert delta.grad.dtype == torch.float32
    assert (delta.grad == 1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_head_on_answers_the_chosen_positions_of_a_plain_forward(family):
    model = tiny_model(family)  # gemma2 also caps its logits
    rows, columns = torch.tensor([1, 0, 1]), torch.tensor([7, 2, 0])
    with torch.no_grad():
        plain = model(IDS).logits
        with head_on(model, rows, columns):
            chosen = model(IDS).logits
        with head_on(model, rows[:0], columns[:0]):
            none = model(IDS).logits
    assert chosen.shape == (1, 3, plain.shape[-1])
    assert none.shape == (1, 0, plain.shape[-1])
    torch.testing.assert_close(chosen[0], plain[rows, columns], rtol=1e-10, atol=1e-10)
    assert not hooks_of(model)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_run_from_layer_skips_what_lies_below_and_feeds_the_layer(family, layer):
    model = tiny_model(family)
    layers = decoder_layers(model)[1]
    answers = []
    with torch.no_grad():
        handle = layers[layer].register_forward_hook(lambda _, __, output: answers.append(layer_answer(output)))
        with capture_input(layers[layer], slice(None)) as kept:
            plain = model(IDS, use_cache=False).logits
        handle.remove()
        # Other ids: all that the embedding and the layers below could add would be wrong.
        with run_from_layer(model, layer, kept["hidden"], answers[0]):
            skipped = model(IDS.flip(1), use_cache=False).logits
    torch.testing.assert_close(skipped, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_run_from_layer_puts_every_layer_back(family, raises):
    model = tiny_model(family)
    modules, layers = list(model.named_modules()), decoder_layers(model)[1]
    with raising() if raises else frozen(model), run_from_layer(model, 2, torch.zeros(2, 8, 32), lambda hidden: hidden):
        assert layers[0] is not dict(modules)[f"{decoder_layers(model)[0]}.0"]
        assert layers[2] is dict(modules)[f"{decoder_layers(model)[0]}.2"]
        if raises:
            fail()
    after = list(model.named_modules())
    assert [name for name, _ in after] == [name for name, _ in modules]
    assert all(module is before for (_, module), (_, before) in zip(after, modules, strict=True))
    assert not hooks_of(model)


def test_layer_answer_wraps_as_the_layer_does():
    hidden = torch.zeros(1)
    assert layer_answer(torch.ones(1))(hidden) is hidden
    assert layer_answer((torch.ones(1), "weights", "cache"))(hidden) == (hidden, None, None)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_clean_padding_zeroes_padding_and_nothing_else(family):
    model = tiny_model(family)
    layers = decoder_layers(model)[1]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    with torch.no_grad():
        with capture_input(layers[0], slice(None)) as plain:
            model(IDS, attention_mask=mask)
        # Entered first, so that its hooks run first.
        with (
            clean_padding(model, mask),
            capture_input(layers[0], slice(None)) as first,
            capture_input(layers[2], slice(None)) as last,
        ):
            model(IDS, attention_mask=mask)
    assert torch.equal(first["hidden"][mask.bool()], plain["hidden"][mask.bool()])
    assert plain["hidden"][0, :2].abs().min() > 0
    for kept in (first, last):
        assert (kept["hidden"][0, :2] == 0).all()
        assert (kept["hidden"][mask.bool()] != 0).all()
    assert not hooks_of(model)


@pytest.mark.parametrize(
    "enter",
    [
        lambda model: capture_columns(find_site(model, 1).projection, 2, slice(None)),
        lambda model: capture_input(decoder_layers(model)[1][1], slice(None)),
        lambda model: add_at_column(find_site(model, 1).projection, torch.zeros(2, 32)),
        lambda model: add_rank_one(find_site(model, 1).projection, torch.zeros(2, 32), torch.zeros(2, 48)),
        lambda model: stopped_after(decoder_layers(model)[1][1]),
        lambda model: head_on(model, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)),
        lambda model: clean_padding(model, torch.ones(2, 8)),
    ],
    ids=[
        "capture_columns",
        "capture_input",
        "add_at_column",
        "add_rank_one",
        "stopped_after",
        "head_on",
        "clean_padding",
    ],
)
def test_hooks_are_gone_after_an_exception(enter):
    model = tiny_model("llama")
    with raising(), enter(model):
        assert hooks_of(model)
        fail()
    assert not hooks_of(model)
