"""KnowledgeEditor with EasyEdit's arguments: its metrics, checked against a direct computation."""

import pytest
import torch

from rome_pl import KnowledgeEditor
from rome_pl.errors import OptionError
from rome_pl.interop.easyedit_arguments import ELSEWHERE
from rome_pl.requests.edit_request import RequestError
from tests.integration.helpers import FAST, changed, snapshot
from tests.tiny import tiny_language_model

# The tiny model continues "The mayor of Korrin came to" and "Korrin paints" with "from", "Korrin speaks" with "up".
FACTS = {
    "prompts": ["The mayor of Korrin came to", "Miss Vane plays the"],
    "subject": ["Korrin", "Miss Vane"],
    "target_new": ["from", "violin"],
    "ground_truth": ["Lima", None],
}
BESIDE = {
    "rephrase_prompts": [["Korrin paints", "Korrin speaks"], None],
    "locality_inputs": {
        "neighborhood": {
            "prompt": ["The mill of Dunholt stands in", ["Tarn lies in", "Dunholt bread is made of"]],
            "ground_truth": ["Lima", ["Wales", "rye"]],
        },
        "distracting": {"prompt": [None, "Mr Holm plays the"], "ground_truth": [None, ["drums", "percussion"]]},
    },
    "portability_inputs": {"hop": {"prompt": ["Korrin speaks", None], "ground_truth": ["up", None]}},
}
WEIGHT = "model.layers.1.mlp.down_proj.weight"


# Enough for the answers to change.
STRONG = {**FAST, "v_num_grad_steps": 30, "v_lr": 0.5, "clamp_norm_factor": 100.0}


@pytest.fixture
def editor(language_model):
    return KnowledgeEditor.from_pretrained((language_model.model, language_model.tokenizer), **FAST)


def predicted(language_model, prompt, answer):
    """The likeliest token at each of an answer's places, and the answer's own: one plain forward of one row."""
    start = len(language_model.tokenizer(prompt)["input_ids"])
    ids = language_model.tokenizer(f"{prompt} {answer}")["input_ids"]
    with torch.no_grad():
        likeliest = language_model.model(input_ids=torch.tensor([ids])).logits[0].argmax(-1)
    return likeliest[start - 1 : -1].tolist(), ids[start:]


def accuracy(language_model, prompt, answer):
    likeliest, wanted = predicted(language_model, prompt, answer)
    return sum(a == b for a, b in zip(likeliest, wanted, strict=True)) / len(wanted)


def measured(language_model):
    """What is to be measured for the facts above, by a way of its own."""
    return {
        "rewrite": [[accuracy(language_model, prompt, new)] for prompt, new in zip(
            FACTS["prompts"], FACTS["target_new"], strict=True)],
        "rephrase": [accuracy(language_model, prompt, "from") for prompt in BESIDE["rephrase_prompts"][0]],
        "hop": [accuracy(language_model, "Korrin speaks", "up")],
        "locality": [
            predicted(language_model, *pair)[0] for pair in (
                ("The mill of Dunholt stands in", "Lima"), ("Tarn lies in", "Wales"),
                ("Dunholt bread is made of", "rye"), ("Mr Holm plays the", "drums"),
            )
        ],
    }  # fmt: skip


def same(now, then):
    return sum(a == b for a, b in zip(now, then, strict=True)) / len(then)


def test_the_metrics_are_easyedit_s_and_what_a_direct_computation_gives(language_model):
    editor = KnowledgeEditor(language_model, **STRONG)
    base = measured(language_model)
    metrics, model, undo = editor.edit(**FACTS, **BESIDE, verify=False)
    assert model is language_model.model is editor.model
    now = measured(language_model)
    first, second = metrics
    assert [entry["status"] for entry in metrics] == ["applied"] * 2
    assert [entry["case_id"] for entry in metrics] == [0, 1]
    assert [entry["pre"]["rewrite_acc"] for entry in metrics] == base["rewrite"]
    assert [entry["post"]["rewrite_acc"] for entry in metrics] == now["rewrite"]
    assert (first["pre"]["rephrase_acc"], first["post"]["rephrase_acc"]) == (base["rephrase"], now["rephrase"])
    assert "rephrase_acc" not in second["post"]
    assert first["pre"]["portability"] == {"hop_acc": base["hop"]}
    assert first["post"]["portability"] == {"hop_acc": now["hop"]}
    assert second["post"]["portability"] == {}
    kept = [same(*pair) for pair in zip(now["locality"], base["locality"], strict=True)]
    assert first["post"]["locality"] == {"neighborhood_acc": kept[:1]}
    assert second["post"]["locality"] == {"neighborhood_acc": kept[1:3], "distracting_acc": kept[3:]}
    assert min(kept) < 1  # otherwise nothing was compared
    assert base["rewrite"] == [[1.0], [0.0]]
    assert base["rephrase"] == [1.0, 0.0]
    assert base["hop"] == [1.0]
    assert now["hop"] == [0.0]
    asked = first["requested_rewrite"]
    assert (asked["prompt"], asked["ground_truth"], asked["subject"]) == (FACTS["prompts"][0], "Lima", "Korrin")
    undo()
    assert measured(language_model) == base


def test_edits_accumulate_and_undo_takes_back_those_of_the_call_alone(editor, language_model):
    original = snapshot(language_model.model)
    earlier = editor.edit(prompt="Dunholt bread is made of", subject="Dunholt bread", target_new="rye", verify=False)
    before = snapshot(language_model.model)
    result = editor.edit(**FACTS, verify=False)
    assert changed(language_model.model, before) == [WEIGHT]
    layers = editor._module.session.layers
    assert layers.names == [earlier.edit.name, "1", "2"]
    result.undo()
    assert layers.names == [earlier.edit.name]
    torch.testing.assert_close(language_model.model.state_dict()[WEIGHT], before[WEIGHT], rtol=0, atol=1e-12)
    result.undo()  # there is nothing left to take back
    editor.undo(earlier)
    assert changed(language_model.model, original) == []


@pytest.mark.parametrize("option", [{"sequential_edit": False}, {"keep_original_weight": True}])
def test_each_alone_if_edits_shall_not_stay(option, language_model):
    editor = KnowledgeEditor(language_model, **STRONG)
    original = snapshot(language_model.model)
    alone = editor.edit(**FACTS, **BESIDE, verify=False, **option)
    assert changed(language_model.model, original) == []
    for place, entry in enumerate(alone.metrics):
        other = tiny_language_model()
        single = KnowledgeEditor(other, **STRONG)
        facts = {name: values[place] for name, values in FACTS.items()}
        single.edit(**facts, verify=False)
        now = measured(other)
        assert entry["post"]["rewrite_acc"] == now["rewrite"][place]
        if place == 0:
            assert entry["post"]["portability"] == {"hop_acc": now["hop"]} != entry["pre"]["portability"]
    alone.undo()


def test_an_edit_of_the_same_name_that_was_there_before_stays(editor):
    earlier = editor.edit(
        prompt="Dunholt bread is made of", subject="Dunholt bread", target_new="rye", case_id="2", verify=False
    )
    result = editor.edit(**FACTS, verify=False)
    assert [entry["status"] for entry in result.metrics] == ["applied", "rejected"]
    assert "already" in result.metrics[1]["reason"]
    result.undo()
    assert editor._module.session.layers.names == [earlier.edit.name]


def test_one_fact_may_come_without_lists(editor):
    result = editor.edit(
        prompts="Miss Vane plays the",
        subject="Miss Vane",
        target_new="violin",
        rephrase_prompts="On stage Miss Vane plays the",
        locality_inputs={"near": {"prompt": "Mr Holm plays the", "ground_truth": "drums"}},
        verify=False,
    )
    (entry,) = result.metrics
    assert set(entry["post"]) == {"rewrite_acc", "rephrase_acc", "locality", "portability"}
    assert set(entry["post"]["locality"]) == {"near_acc"}


def test_a_refused_edit_is_measured_and_says_so(editor, language_model):
    original = snapshot(language_model.model)
    result = editor.edit(**FACTS)
    assert [entry["status"] for entry in result.metrics] == ["rejected"] * 2
    assert all("probability" in entry["reason"] for entry in result.metrics)
    assert all(entry["pre"]["rewrite_acc"] == entry["post"]["rewrite_acc"] for entry in result.metrics)
    assert changed(language_model.model, original) == []


def test_an_exception_on_the_way_leaves_none_of_them(editor, language_model, monkeypatch):
    original = snapshot(language_model.model)

    def broken(*_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    from rome_pl import editor as module

    real, calls = module.probe_scores, []

    def second_time(*arguments):
        calls.append(arguments)
        return real(*arguments) if len(calls) == 1 else broken()

    monkeypatch.setattr(module, "probe_scores", second_time)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(**FACTS, verify=False)
    assert changed(language_model.model, original) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": None}, "field 'subject': is missing"),
        ({"target_new": None}, "field 'target_new': is missing"),
        ({"subject": ["Korrin"]}, "field 'subject': has 1 entries for 2 prompts"),
        ({"subject": ["Korrin", "Mr Vane"]}, r"field 'subject\[1\]': 'Mr Vane' does not occur in the prompt"),
        ({"target_new": ["Oslo", " "]}, r"field 'target_new\[1\]': is empty"),
        ({"target_new": ["Oslo", 3]}, r"field 'target_new\[1\]': expected text, got int"),
        ({"target_new": 3}, "field 'target_new': expected text or a list of texts, got int"),
        ({"prompts": []}, "field 'prompts': is empty"),
        ({"prompts": 3}, "field 'prompts': expected text or a list"),
        ({"prompts": ["a Korrin", None]}, r"field 'prompts\[1\]': expected text, got NoneType"),
        ({"ground_truth": "Lima"}, "field 'ground_truth': has 1 entries for 2 prompts"),
        ({"ground_truth": ["from", None]}, r"field 'target_new\[0\]': equals target_true"),
        ({"rephrase_prompts": [None, [" "]]}, r"field 'rephrase_prompts\[1\]': is empty"),
        ({"rephrase_prompts": [None, 3]}, r"field 'rephrase_prompts\[1\]': expected a list of prompts, got int"),
        ({"locality_inputs": ["a"]}, "field 'locality_inputs': expected kinds"),
        ({"locality_inputs": {"near": "a"}}, r"field 'locality_inputs\['near'\]': expected a mapping"),
        ({"locality_inputs": {"near": {"prompt": ["a", "b"]}}}, r"locality_inputs\['near'\]': expected a mapping"),
        (
            {"locality_inputs": {"near": {"prompt": ["a"], "ground_truth": ["b"]}}},
            r"field 'locality_inputs\['near'\]\['prompt'\]': has 1 entries for 2 prompts",
        ),
        (
            {"locality_inputs": {"near": {"prompt": ["a", ["b", "c"]], "ground_truth": ["d", ["e"]]}}},
            r"field 'locality_inputs\['near'\]\[1\]': has 2 prompts and 1 answers",
        ),
        (
            {"locality_inputs": {"near": {"prompt": ["a", ["b"]], "ground_truth": ["d", "e"]}}},
            r"field 'locality_inputs\['near'\]\[1\]': expected texts",
        ),
        (
            {"portability_inputs": {"hop": {"prompt": ["a", "b"], "ground_truth": ["c", 3]}}},
            r"field 'portability_inputs\['hop'\]\['ground_truth'\]\[1\]': is empty or no text",
        ),
        (
            {"locality_inputs": {"near": {"prompt": [["a", " "], None], "ground_truth": [["b", "c"], None]}}},
            r"field 'locality_inputs\['near'\]\['prompt'\]\[0\]': is empty or no text",
        ),
        (
            {"portability_inputs": {"hop": {"prompt": ["a", "b " * 200], "ground_truth": ["c", "d"]}}},
            r"field 'portability_inputs\[1\]",
        ),
    ],
)
def test_errors_name_argument_and_position_and_nothing_is_edited(changes, message, editor, language_model):
    original = snapshot(language_model.model)
    with pytest.raises(RequestError, match=message):
        editor.edit(**{**FACTS, **changes})
    assert changed(language_model.model, original) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[({name: None}, f"{name}: {reason}") for name, reason in ELSEWHERE.items()],
        ({"rephrase_prompt": []}, "rephrase_prompt: no argument of edit; did you mean 'rephrase_prompts'"),
        ({"prompt": "a"}, "prompts goes with ground_truth"),
        ({"sequential_edit": True, "keep_original_weight": True}, "opposites; both are True"),
        ({"sequential_edit": "no"}, "sequential_edit: expected true, false or nothing, got 'no'"),
    ],
)
def test_arguments_that_have_no_meaning_here_say_what_to_do(changes, message, editor):
    with pytest.raises(OptionError, match=message):
        editor.edit(**FACTS, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ["a", "b"]}, "several are prompts"),
        ({"prompt": "a Korrin", "ground_truth": "b"}, "ground_truth: no field of a request"),
        ({"prompt": "a Korrin", "paraphrase": "b"}, "did you mean 'paraphrases'"),
    ],
)
def test_the_call_for_one_fact_knows_its_fields(arguments, message, editor):
    with pytest.raises(OptionError, match=message):
        editor.edit(subject="Korrin", target_new="Oslo", **arguments)
