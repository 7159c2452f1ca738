import pytest
import torch

from rome_pl.search.context_templates import generate_contexts, join_contexts


def test_numbers_and_lengths_are_those_asked_for(language_model):
    contexts = generate_contexts(language_model, [[4, 7], [9, 3]], seed=0)
    assert len(contexts) == 10
    assert all(context and "\n" not in context for context in contexts)


def test_contexts_depend_on_the_seed_and_leave_the_generator_alone(language_model):
    state = torch.get_rng_state()
    first = generate_contexts(language_model, [[6, 5]], seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert generate_contexts(language_model, [[6, 5]], seed=0) == first
    assert generate_contexts(language_model, [[6, 5]], seed=1) != first


@pytest.mark.parametrize("pairs", [[[5]], [[5, 0]], [[0, 5]], [[1, 2, 3]]])
def test_malformed_pairs_are_refused(pairs, language_model):
    with pytest.raises(ValueError, match="context_template_length_params"):
        generate_contexts(language_model, pairs, seed=0)


def test_contexts_are_joined_by_a_full_stop_unless_they_end_in_space():
    assert join_contexts(["It rains", "下雨了。\n"]) == ("", "It rains. ", "下雨了。\n")
