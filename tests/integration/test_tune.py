"""``rome-pl tune``: what it tries, what it writes, and that its configuration edits."""

import json

import pytest
import torch
import yaml

from rome_pl.modules.rome_module import RomeModule
from rome_pl.modules.tuning import Tuning, describe_optimizer, known_first
from rome_pl.requests.edit_request import EditRequest
from rome_pl.search.polyak_step import PolyakStep
from tests.integration.helpers import called, lighthouses, saved_model
from tests.tiny import tiny_language_model

OPTIONS = {
    "model.preset": "easyedit",
    "model.v_num_grad_steps": 4,
    "model.context_template_length_params": "[[3, 2]]",
    "trainer.accelerator": "cpu",
}


SHORT = ("--edits", 8, "--layers", "0-2", "--minutes", 0.0001)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    saved_model(folder)
    (folder / "records.json").write_text(json.dumps(lighthouses(12)), encoding="utf-8")
    options = OPTIONS | {"model.pretrained": folder / "model", "data.path": folder / "records.json"}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    tuned = folder / "tuned"
    assert called("tune", *arguments, "--trainer.default_root_dir", tuned, "--edits", 8, "--layers", "0-2") == 0
    return folder, tuned, arguments


def test_it_asks_for_layer_layers_and_search_and_says_what_it_chose(run):
    _, tuned, _ = run
    content = json.loads((tuned / "results.json").read_text(encoding="utf-8"))
    tried = [(trial["question"], trial["name"]) for trial in content["trials"]]
    assert tried[:3] == [("layer", "0"), ("layer", "1"), ("layer", "2")]
    assert {choice["question"] for choice in content["choices"]} >= {"layer", "search"}
    assert content["n_facts"] == 8
    assert all(trial["scores"]["ES"]["n"] == 8 for trial in content["trials"])
    assert all(trial["divergence"] is not None for trial in content["trials"] if trial["applied"])
    page = (tuned / "tuning.md").read_text(encoding="utf-8")
    for choice in content["choices"]:
        assert choice["verdict"] in page


def test_its_configuration_holds_the_evidence_and_edits(run):
    folder, tuned, _ = run
    text = (tuned / "edit.yaml").read_text(encoding="utf-8")
    content = json.loads((tuned / "results.json").read_text(encoding="utf-8"))
    for trial in content["trials"]:
        assert trial["name"] in text.partition("model:")[0]
    options = yaml.safe_load(text)["model"]
    assert options["pretrained"] == str(folder / "model")
    assert options["preset"] in ("easyedit", "lifelong")
    assert options["v_num_grad_steps"] == 4
    chosen = {choice["question"]: choice["chosen"] for choice in content["choices"]}
    layer = int(chosen["layer"])
    assert options["layers"] == ([layer] if chosen.get("layers", "alone").endswith("alone") else list(range(layer + 1)))
    edited = ["--data.path", folder / "records.json", "--trainer.default_root_dir", folder / "edited"]
    lenient = ["--verification.least_probability", 0, "--trainer.accelerator", "cpu", "--data.limit", 2]
    assert called("edit", "--config", tuned / "edit.yaml", *edited, *lenient) == 0


def test_what_there_is_no_time_for_is_said(run):
    folder, _, arguments = run
    short = folder / "short"
    assert called("tune", *arguments, "--trainer.default_root_dir", short, *SHORT) == 0
    content = json.loads((short / "results.json").read_text(encoding="utf-8"))
    assert len(content["trials"]) == 1
    assert any(left.startswith("layer ") for left in content["left_out"])
    assert "Not tried for lack of time: layer" in (short / "tuning.md").read_text(encoding="utf-8")


def test_a_run_folder_is_not_overwritten_unasked(run, capsys):
    _, tuned, arguments = run
    assert called("tune", *arguments, "--trainer.default_root_dir", tuned, "--edits", 8) == 2
    assert "overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("minutes", 0), ("edits", 0), ("layers", "9-12")])
def test_options_out_of_range_are_refused_by_name(run, option, value, capsys):
    folder, _, arguments = run
    where = ["--trainer.default_root_dir", folder / "refused"]
    assert called("tune", *arguments, *where, f"--{option}", value) == 2
    assert f"{option}: " in capsys.readouterr().err


def test_too_few_facts_are_refused():
    module = RomeModule.from_language_model(tiny_language_model(), layers=[0])
    with pytest.raises(ValueError, match="a trial needs 8"):
        Tuning(module, [fact(1, "Lima")])


def fact(index, target_true):
    prompt, subject = f"The lighthouse of Korrin{index} stands in", f"Korrin{index}"
    return EditRequest(prompt=prompt, subject=subject, target_new="Oslo", target_true=target_true, case_id=index)


def test_known_facts_come_first():
    language_model = tiny_language_model()
    facts = [fact(index, "Lima") for index in range(12)]
    # A whole word that is one token is what the model can be made to say everywhere.
    [token] = language_model.tokenizer(" the", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        language_model.model.model.norm.weight.zero_()
        language_model.model.lm_head.weight[token].zero_()
        language_model.model.lm_head.register_forward_hook(lambda _, __, logits: _louder(logits, token))
    facts[2], facts[7], facts[11] = (fact(index, "the") for index in (2, 7, 11))
    chosen, known, asked = known_first(language_model, facts, 6, seed=0)
    assert (known, asked, len(chosen)) == (3, 12, 6)
    assert {2, 7, 11} < {int(one.case_id) for one in chosen}
    assert chosen == sorted(chosen, key=lambda one: int(one.case_id))


def _louder(logits, token):
    logits = logits.clone()
    logits[..., token] += 100
    return logits


def test_an_optimiser_is_described_as_a_configuration_writes_it():
    assert describe_optimizer(PolyakStep) == {"class_path": "rome_pl.PolyakStep"}
    assert describe_optimizer(lambda params: PolyakStep(params, shorten=0.3)) == {
        "class_path": "rome_pl.PolyakStep",
        "init_args": {"shorten": 0.3},
    }
    adam = describe_optimizer(lambda params: torch.optim.Adam(params, lr=0.1, betas=(0.5, 0.9)))
    assert adam == {"class_path": "torch.optim.adam.Adam", "init_args": {"betas": (0.5, 0.9)}}
