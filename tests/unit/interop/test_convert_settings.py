"""Settings of other projects: every key, what it becomes, what is refused."""

import json
import re
from pathlib import Path

import pytest
import yaml

from rome_pl.interop.convert_settings import convert_settings, write_config
from rome_pl.interop.setting_rules import IMPLIED, REQUIRED, RULES
from rome_pl.interop.settings_file import METHODS, ConversionError

DOCS = Path(__file__).parents[3] / "docs" / "coming-from-easyedit.md"

# Their keys, our values.
SEARCH = {
    "layers": [2],
    "fact_token": "subject_first",
    "v_num_grad_steps": 11,
    "v_lr": "3e-1",  # as YAML reads a number without a point
    "v_loss_layer": 2,
    "v_weight_decay": 0.25,
    "clamp_norm_factor": 3,
    "kl_factor": 0.125,
    "mom2_adjustment": True,
}
MODULES = {
    "rewrite_module_tmp": "blocks.{}.mlp.down_proj",
    "layer_module_tmp": "blocks.{}",
    "mlp_module_tmp": "blocks.{}.mlp",
    "attn_module_tmp": "blocks.{}.attention",
    "ln_f_module": "norm",
    "lm_head_module": "head",
}
STATISTICS = {"mom2_dataset": "wikitext", "mom2_n_samples": 700, "mom2_dtype": "float64"}
COMMON = {**SEARCH, **MODULES, **STATISTICS}
EASYEDIT = {"model_name": "some/model", "stats_dir": "./stats", "device": 3, "model_parallel": False}
CONTEXTS = {"context_template_length_params": [[4, 3]]}
SHARED = {"layer_selection": "all", "mom2_update_weight": 900}

# Every published kind of file, by the folder that it would lie in.
FILES = {
    "easyedit/ROME/a.yaml": {"alg_name": "ROME", **EASYEDIT, **COMMON, **CONTEXTS, "fp16": False, "max_length": 30},
    "easyedit/R-ROME/a.yaml": {
        "alg_name": "R-ROME", **EASYEDIT, **COMMON, **CONTEXTS, "fp16": True, "enable_prompt_keys": False,
        "enable_random_prefix_keys": True, "original_implementation": False, "mom2_adjustment": False,
    },
    "easyedit/MEMIT/a.yaml": {"alg_name": "MEMIT", **EASYEDIT, **COMMON, **SHARED, "batch_size": 4},
    "easyedit/EMMET/a.yaml": {
        "alg_name": "EMMET", **EASYEDIT, **COMMON, **SHARED, "update_norm_lambda": 0, "emmet_lambda": 0.1,
        "evaluation_type": "LLM-judge",
    },
    "easyedit/AlphaEdit/a.yaml": {
        "alg_name": "AlphaEdit", **EASYEDIT, **COMMON, **SHARED, "P_loc": "./p.pt", "nullspace_threshold": "3e-2",
        "L2": 7, "sequential_edit": True,
    },
    "kmeng01/ROME/org_model-1.json": {**COMMON, **CONTEXTS},
    "kmeng01/MEMIT/org_model-1.json": {**COMMON, **SHARED},
    "unified/ROME/a.json": {**COMMON, **CONTEXTS, "bias_update": False, "dynamic": False, "dynamic_multiplier": 2},
    "unified/MEMIT/a.json": {
        **COMMON, **SHARED, "calculate_objective_value": False, "update_norm_lambda": 0, "emmet_lambda": 0.1
    },
    "unified/EMMET/a.json": {
        **COMMON, **SHARED, "calculate_objective_value": False, "update_norm_lambda": 2.5, "emmet_lambda": 0.2
    },
    "alphaedit/AlphaEdit/a.json": {
        "model_name": "tiny", **COMMON, **SHARED, "nullspace_threshold": 0.03, "L2": 7, "keep_original_weight": False
    },
}  # fmt: skip
PRESETS = {"ROME": "rome", "R-ROME": "r_rome", "MEMIT": "memit", "EMMET": "emmet", "AlphaEdit": "alphaedit"}


def write(folder, name, values):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values, sort_keys=False)
    path.write_text(text.replace("'3e-1'", "3e-1"), encoding="utf-8")
    return path


def converted(folder, name="easyedit/ROME/a.yaml", **changes):
    values = {**FILES[name], **changes}
    return convert_settings(write(folder, name, {key: value for key, value in values.items() if value is not ...}))


def fate(result, key):
    return next(row.fate for row in result.rows if row.key == key)


@pytest.mark.parametrize("name", FILES)
def test_every_key_of_every_kind_of_file_has_a_row(name, tmp_path):
    result = converted(tmp_path, name)
    method = name.split("/")[1]
    assert result.method == method
    assert [row.key for row in result.rows if row.value is not None] == list(FILES[name])
    assert [row.key for row in result.rows if row.value is None] == [key for key in IMPLIED if key not in FILES[name]]
    assert all(row.fate.remark or row.fate.options for row in result.rows)
    model = result.config["model"]
    assert model["preset"] == PRESETS[method]
    expected = {
        "layers": [2], "fact_token": "subject_first", "v_num_grad_steps": 11, "v_lr": 0.3, "v_weight_decay": 0.25,
        "clamp_norm_factor": 3.0, "kl_factor": 0.125, "kl_position": "subject",
        "dtype": "float16" if FILES[name].get("fp16") else "float32",
        "context_template_length_params": FILES[name].get("context_template_length_params", [[10, 5]]),
    }  # fmt: skip
    assert {key: model[key] for key in expected} == expected


def test_the_files_above_hold_every_key_that_is_known():
    assert set().union(*FILES.values()) == set(RULES)
    assert set(REQUIRED) <= set(RULES)
    assert {name.split("/")[1] for name in FILES} == set(METHODS) == set(PRESETS)


def test_the_docs_name_every_key():
    named = set(re.findall(r"`(\w+)`", DOCS.read_text(encoding="utf-8")))
    assert set(RULES) - named == set()


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_is_what_was_converted(name, tmp_path):
    result = converted(tmp_path, name)
    write_config(result, tmp_path / "out.yaml")
    text = (tmp_path / "out.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == result.config
    assert f"# Converted from {result.path} ({result.method})." in text
    assert "rome-pl edit --config" in text
    comment = re.sub(r"\n# +", " ", text)
    differing = [row for row in result.rows if row.fate.kind == "differs"]
    assert differing
    assert all(f"- {row.key}: {row.fate.remark}" in comment for row in differing)
    assert max(map(len, text.replace(str(tmp_path), "").splitlines())) <= 120


def test_without_the_second_moment_rome_is_easyedit_s_preset(tmp_path):
    result = converted(tmp_path, mom2_adjustment=False)
    assert result.config["model"]["preset"] == "easyedit"
    assert "corpus" not in result.config["model"]
    assert {fate(result, key).kind for key in ("mom2_dataset", "mom2_n_samples", "stats_dir")} == {"not needed"}
    r_rome = converted(tmp_path, "easyedit/R-ROME/a.yaml").config["model"]
    assert (r_rome["preset"], r_rome["mom2_adjustment"]) == ("r_rome", False)
    # MEMIT's code does not look at it.
    memit = converted(tmp_path, "easyedit/MEMIT/a.yaml", mom2_adjustment=False)
    assert "mom2_adjustment" not in memit.config["model"]
    assert memit.config["model"]["corpus"] == "NeelNanda/wiki-10k"


@pytest.mark.parametrize(
    ("switches", "preset"),
    [
        ({"enable_prompt_keys": True, "enable_random_prefix_keys": False}, "p_rome"),
        ({"original_implementation": True, "enable_prompt_keys": True}, "rome"),
        ({"enable_prompt_keys": ..., "enable_random_prefix_keys": ..., "original_implementation": ...}, "r_rome"),
    ],
)
def test_r_rome_s_switches_choose_the_preset(switches, preset, tmp_path):
    assert converted(tmp_path, "easyedit/R-ROME/a.yaml", **switches).config["model"]["preset"] == preset


def test_what_changes_results_is_said(tmp_path):
    rome = converted(tmp_path)
    assert "there 700 texts" in fate(rome, "mom2_n_samples").remark
    assert "key vectors" in fate(rome, "mom2_n_samples").remark
    assert "mom2_n_samples" not in rome.config["model"]
    assert fate(rome, "clamp_norm_factor").kind == "converted"
    emmet = converted(tmp_path, "unified/EMMET/a.json")
    for key in ("clamp_norm_factor", "v_weight_decay", "emmet_lambda", "update_norm_lambda", "model_name"):
        assert fate(emmet, key).kind == "differs"
    assert fate(converted(tmp_path, "unified/MEMIT/a.json"), "emmet_lambda").kind == "not needed"
    assert fate(converted(tmp_path, layers=[2, 3]), "layers").kind == "differs"
    assert fate(converted(tmp_path, "easyedit/MEMIT/a.yaml", layers=[2, 3]), "layers").kind == "converted"
    assert fate(converted(tmp_path, model_parallel=True), "model_parallel").kind == "differs"
    assert fate(converted(tmp_path, rewrite_module_tmp="x.{}.attn.o_proj"), "rewrite_module_tmp").kind == "differs"
    assert fate(converted(tmp_path, "unified/ROME/a.json", bias_update=True), "bias_update").kind == "differs"


def test_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert converted(tmp_path).config["model"]["pretrained"] == "some/model"
    missing = converted(tmp_path, model_name="./hugging_cache/some-model")
    assert missing.config["model"]["pretrained"] == "./hugging_cache/some-model"
    assert "no such folder" in fate(missing, "model_name").remark
    (tmp_path / "hugging_cache" / "some-model").mkdir(parents=True)
    assert fate(converted(tmp_path, model_name="./hugging_cache/some-model"), "model_name").kind == "converted"
    guessed = converted(tmp_path, "kmeng01/ROME/org_model-1.json")
    assert guessed.config["model"]["pretrained"] == "org/model-1"
    assert fate(guessed, "model_name").kind == "differs"


def test_streams(tmp_path):
    batch = converted(tmp_path, "easyedit/MEMIT/a.yaml").config
    assert (batch["data"], batch["model"]["sequential_edit"]) == ({"batch_size": 4}, True)
    assert "data" not in converted(tmp_path, "easyedit/MEMIT/a.yaml", batch_size=1).config
    for key, value, sequential in (
        ("keep_original_weight", True, False),
        ("keep_original_weight", False, True),
        ("sequential_edit", False, False),
    ):
        assert converted(tmp_path, **{key: value}).config["model"]["sequential_edit"] is sequential
    assert converted(tmp_path, device="cpu").config["trainer"]["accelerator"] == "cpu"
    assert "accelerator" not in converted(tmp_path).config["trainer"]


@pytest.mark.parametrize(
    ("name", "values", "method"),
    [
        ("b/AlphaEdit.json", {**COMMON, **SHARED, "nullspace_threshold": 0.1, "L2": 1}, "AlphaEdit"),
        ("b/c.json", {**COMMON, **SHARED, "emmet_lambda": 0.1}, "EMMET"),
        ("b/c.json", {**COMMON, **SHARED}, "MEMIT"),
        ("b/c.json", {**COMMON, **CONTEXTS}, "ROME"),
        ("r_rome/c.json", {**COMMON, **CONTEXTS}, "R-ROME"),
        ("MEMIT/c.yaml", {"alg_name": "alphaedit", **COMMON, **SHARED}, "AlphaEdit"),
    ],
)
def test_a_method_that_is_not_named_is_told_from_folder_or_keys(name, values, method, tmp_path):
    assert convert_settings(write(tmp_path, name, values)).method == method


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alg_name": "MEND"}, "key 'alg_name': 'MEND' is not here; settings of ROME, R-ROME, MEMIT, EMMET, AlphaEdit"),
        ({"alg_name": "MEMITT"}, "did you mean 'MEMIT'"),
        ({"v_lerning_rate": 1}, "key 'v_lerning_rate': unknown"),
        ({"kl_facter": 1}, "did you mean 'kl_factor'"),
        ({"layers": ...}, "lacks the key 'layers'"),
        ({"layers": 5}, r"key 'layers': expected whole numbers from 0 on, such as \[5\], got 5"),
        ({"layers": [-1]}, "key 'layers'"),
        ({"layers": []}, "key 'layers'"),
        ({"layers": [True]}, "key 'layers'"),
        ({"v_lr": "fast"}, "key 'v_lr': expected a number, got 'fast'"),
        ({"v_lr": True}, "key 'v_lr': expected a number"),
        ({"v_lr": None}, "key 'v_lr': expected a number, got None"),
        ({"v_num_grad_steps": 2.5}, "key 'v_num_grad_steps': expected a whole number"),
        ({"v_num_grad_steps": ".inf"}, "key 'v_num_grad_steps': expected a number"),
        ({"v_num_grad_steps": "inf"}, "key 'v_num_grad_steps': expected a whole number"),
        ({"mom2_adjustment": "false"}, "key 'mom2_adjustment': expected true or false, got 'false'"),
        ({"fact_token": "subject_lst"}, "key 'fact_token': expected one of subject_last"),
        ({"context_template_length_params": [[5]]}, "key 'context_template_length_params': expected pairs"),
        ({"context_template_length_params": 3}, "key 'context_template_length_params': expected pairs"),
        ({"model_name": ""}, "key 'model_name': expected text"),
        ({"batch_size": 3}, "key 'batch_size': ROME edits one fact at a time"),
    ],
)
def test_what_cannot_be_meant_is_an_error_that_names_file_and_key(changes, message, tmp_path):
    with pytest.raises(ConversionError, match=message) as error:
        converted(tmp_path, **changes)
    assert "a.yaml" in str(error.value)


def test_both_keys_of_r_rome_at_once_are_refused_as_there(tmp_path):
    with pytest.raises(ConversionError, match="one of enable_prompt_keys and enable_random_prefix_keys"):
        converted(tmp_path, "easyedit/R-ROME/a.yaml", enable_prompt_keys=True)


def test_force_leaves_out_what_is_unknown(tmp_path):
    path = write(tmp_path, "ROME/a.yaml", {**FILES["easyedit/ROME/a.yaml"], "my_own": 3})
    result = convert_settings(path, force=True)
    assert fate(result, "my_own").kind == "differs"
    assert "my_own" not in result.config["model"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "layers: [5]\nv_lr: [1\nkl_factor: 2\n", r"a.yaml, line 3: malformed YAML"),
        ("a.json", '{"layers": [5],\n "v_lr": }', r"a.json, line 2: malformed JSON at column 10"),
        ("a.yaml", "- layers\n", "expected keys with values, got list"),
        ("a.yaml", "", "expected keys with values, got NoneType"),
        ("a.json", "{}", "holds no settings"),
        ("a.yaml", "day: 2024-13-45\n", "malformed YAML"),
        ("a.yaml", "a: \x01\n", "malformed YAML"),
        ("a.toml", "layers = [5]", "unknown file type '.toml'"),
        ("a.json", '{"lr": 1e-5, "num_steps": 25}', "names no method"),
    ],
)
def test_files_that_are_no_settings(name, text, message, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConversionError, match=message):
        convert_settings(tmp_path / name)


def test_files_that_are_not_there_or_no_text(tmp_path):
    with pytest.raises(ConversionError, match="no such file"):
        convert_settings(tmp_path / "nowhere.yaml")
    with pytest.raises(ConversionError, match="is a folder"):
        convert_settings(tmp_path)
    (tmp_path / "a.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConversionError, match="not UTF-8 at byte 3"):
        convert_settings(tmp_path / "a.yaml")
