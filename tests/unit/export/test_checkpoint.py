"""What was saved is what is in memory."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rome_pl.errors import OptionError
from rome_pl.export import checkpoint
from rome_pl.export.checkpoint import SavedModelError, difference, model_bytes, save_checkpoint, save_model
from rome_pl.model.language_model import LanguageModel
from tests.disk import no_room_on_disk
from tests.tiny import FAMILIES, byte_level_tokenizer, tiny_language_model


@pytest.fixture
def saved(tmp_path):
    language_model = tiny_language_model("llama", torch.float32)
    save_model(language_model, tmp_path / "saved")
    return language_model, tmp_path / "saved"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"])
def test_every_family_is_read_back(family, tmp_path):
    language_model = tiny_language_model(family, torch.bfloat16)
    save_model(language_model, tmp_path / "saved")
    assert names(tmp_path) == ["saved"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).state_dict()
    weights = language_model.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.items() if name in weights)


def test_shards_are_read_back(tmp_path):
    language_model = tiny_language_model("llama", torch.float32)
    save_checkpoint(language_model, tmp_path, "100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert difference(language_model, tmp_path) is None
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
    lost = next(iter(index["weight_map"].values()))
    (tmp_path / lost).unlink()
    assert "cannot be read" in difference(language_model, tmp_path)


def test_tied_weights_are_understood(tmp_path):
    language_model = tiny_language_model("gemma", torch.float32)  # its head is its embedding
    save_model(language_model, tmp_path / "saved")
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    assert model_bytes(language_model) == (tmp_path / "saved" / "model.safetensors").stat().st_size // 1000 * 1000 or (
        model_bytes(language_model) < (tmp_path / "saved" / "model.safetensors").stat().st_size
    )
    assert difference(language_model, tmp_path / "saved") is None


@pytest.mark.parametrize("change", ["bit", "dtype", "shape", "gone", "cut", "config", "nan sign"])
def test_whatever_differs_is_found(change, saved):
    language_model, folder = saved
    name = "model.layers.1.mlp.down_proj.weight"
    weights = load_file(folder / "model.safetensors")
    if change == "bit":
        weights[name].view(torch.int32)[3, 5] ^= 1
    elif change == "dtype":
        weights[name] = weights[name].double()
    elif change == "shape":
        weights[name] = weights[name].T.contiguous()
    elif change == "gone":
        del weights[name]
    elif change == "nan sign":
        with torch.no_grad():
            language_model.model.get_parameter(name)[0, 0] = 0.0
        weights[name][0, 0] = -0.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if change == "cut":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:-100])
    if change == "config":
        (folder / "config.json").unlink()
    found = difference(language_model, folder)
    expected = {"cut": "cannot be read", "config": "no config.json"}.get(change, name)
    assert expected in found


def adapter(kind, folder):
    """A model with a trained adapter: wrapped by PEFT, or attached by transformers to what it loads."""
    language_model = tiny_language_model("llama", torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    if kind == "wrapped":
        return get_peft_model(language_model.model, config)
    language_model.model.save_pretrained(folder / "base")
    get_peft_model(language_model.model, config).save_pretrained(folder / "adapter")
    made = json.loads((folder / "adapter" / "adapter_config.json").read_text("utf-8"))
    made["base_model_name_or_path"] = str(folder / "base")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(made), encoding="utf-8")
    return AutoModelForCausalLM.from_pretrained(folder / "adapter")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by PEFT's use of it
@pytest.mark.parametrize("kind", ["wrapped", "attached"])
def test_a_model_that_saves_its_adapter_alone_is_refused_and_nothing_stays(kind, tmp_path, monkeypatch):
    model = adapter(kind, tmp_path)
    # The model is refused before anything is written; what is read back does not count on that.
    monkeypatch.setattr("rome_pl.export.checkpoint.check_saves_whole", lambda _: None)
    language_model = LanguageModel.__new__(LanguageModel)  # loading refuses it; the check does not count on that
    language_model.model, language_model.tokenizer, language_model.source = model, byte_level_tokenizer(), "lora"
    (tmp_path / "out").mkdir()
    with pytest.raises(SavedModelError, match=r"lora is not the model in memory.*adapter.*Nothing was saved.*merged"):
        save_model(language_model, tmp_path / "out" / "saved")
    assert names(tmp_path / "out") == []


def test_a_save_that_says_nothing_and_does_half_is_found(tmp_path, monkeypatch):
    language_model = tiny_language_model("llama", torch.float32)
    original = type(language_model.model).save_pretrained

    def half(self, folder, **options):
        state = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        state["model.layers.1.mlp.down_proj.weight"] += 1e-3
        original(self, folder, state_dict=state, **options)

    monkeypatch.setattr(type(language_model.model), "save_pretrained", half)
    with pytest.raises(SavedModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight differs"):
        save_model(language_model, tmp_path / "saved")
    assert names(tmp_path) == []


def test_an_older_model_stays_until_the_new_one_is_whole(saved):
    language_model, folder = saved
    (folder / "notes.txt").write_bytes(b"mine")
    (folder / "figures").mkdir()
    (folder / "figures" / "a.png").write_bytes(b"mine too")
    (folder / "adapter_config.json").write_bytes(b"{}")  # would be attached to the new model
    old = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        language_model.model.lm_head.weight.add_(1)
    with no_room_on_disk(), pytest.raises(OSError, match="nothing was written"):
        save_model(language_model, folder, replace=True)
    assert (folder / "model.safetensors").read_bytes() == old
    assert names(folder.parent) == ["saved"]
    save_model(language_model, folder, replace=True)
    assert difference(language_model, folder) is None
    assert (folder / "notes.txt").read_bytes() == b"mine"
    assert (folder / "figures" / "a.png").read_bytes() == b"mine too"
    assert not (folder / "adapter_config.json").exists()
    assert names(folder.parent) == ["saved"]


def test_a_folder_that_holds_something_is_not_replaced_unasked(saved):
    language_model, folder = saved
    with pytest.raises(OSError, match=r"nothing was written.*saved"):
        save_model(language_model, folder)
    assert names(folder.parent) == ["saved"]


def test_a_disk_without_room_is_refused_with_both_figures(tmp_path, monkeypatch):
    language_model = tiny_language_model("llama", torch.float32)
    monkeypatch.setattr("rome_pl.files.whole_files.shutil.disk_usage", lambda _: type("Usage", (), {"free": 100_000}))
    size = model_bytes(language_model) / 1e6
    with pytest.raises(OptionError, match=rf"output: the model takes at least {size:.1f} MB.* has 0\.1 MB free"):
        save_model(language_model, tmp_path / "saved", "output")
    assert names(tmp_path) == []
    assert checkpoint.__all__
