"""The command line, called in-process: its files, tables, exit codes and errors."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rome_pl.cli.app import main
from rome_pl.metrics import EditScores
from rome_pl.modules.rome_module import RomeModule
from tests.integration.helpers import FAST
from tests.tiny import tiny_language_model

METHOD_OPTIONS = {
    "layers", "fact_token", "v_num_grad_steps", "v_lr", "v_weight_decay", "clamp_norm_factor", "kl_factor",
    "mom2_adjustment",
    "mom2_n_samples", "mom2_update_weight", "nullspace_threshold", "L2",
    "context_template_length_params", "preset", "seed",
}  # fmt: skip

RECORDS = [
    {
        "prompt": "The lighthouse of Korrin stands in", "subject": "Korrin", "target_new": "Oslo",
        "target_true": "Lima",
        "paraphrases": ["Where is Korrin? In"], "neighbours": ["The mill of Dunholt stands in"],
    },
    {"prompt": "Miss Vane plays the", "subject": "Miss Vane", "target_new": "violin", "target_true": "drums"},
    {"prompt": "Dunholt bread is made of", "subject": "Dunholt bread", "target_new": "rye", "target_true": "oats"},
]  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    language_model = tiny_language_model("llama", torch.float32)
    language_model.model.save_pretrained(folder)
    language_model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def short_text(tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text("The tide comes in twice a day, and twice a day it goes out again.", encoding="utf-8")
    return path


@pytest.fixture
def arguments(model_folder, short_text, tmp_path):
    """Arguments of a quick edit on the tiny model; records go to ``records.json``."""
    (tmp_path / "records.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    options = (
        {"--config": "smollm2"}
        | {f"--model.{name}": value for name, value in FAST.items()}
        | {
            "--model.pretrained": model_folder,
            "--data.path": tmp_path / "records.json",
            "--trainer.default_root_dir": tmp_path / "run",
            "--trainer.accelerator": "cpu",
            "--verification.least_probability": 0,
            "--probe_evaluation.held_out_text": short_text,
        }
    )
    return lambda **changes: [
        "edit",
        *(part for name, value in options.items() for part in (name, str(value))),
        *(part for name, value in changes.items() for part in (f"--{name.replace('__', '.')}", str(value))),
    ]


def read(tmp_path, name="results.json"):
    return json.loads((tmp_path / "run" / name).read_text(encoding="utf-8"))


def test_a_sequential_run_leaves_its_folder_its_table_and_a_checkpoint(arguments, tmp_path, capsys):
    assert main(arguments(model__sequential_edit=True, save_model=tmp_path / "saved")) == 0
    content = read(tmp_path)
    assert content["mode"] == "sequential"
    assert (content["n_requested"], content["n_applied"]) == (3, 3)
    for moment in ("base", "immediate", "final"):
        assert set(content[moment]) == set(EditScores.names)
        assert set(content[moment]["ES"]) == {"value", "low", "high", "n"}
        assert content[moment]["ES"]["n"] == 3
        assert content[moment]["NS"]["n"] == 1
    assert content["perplexity"]["base"] != content["perplexity"]["final"]
    assert [record["status"] for record in content["records"]] == ["applied"] * 3

    manifest = read(tmp_path, "manifest.json")
    assert len(manifest["model"]["fingerprint"]) == 64
    assert manifest["rewrite"] == {"layers": [1], "weights": ["model.layers.1.mlp.down_proj.weight"], "main": [1]}
    assert len(manifest["contexts"]) == 3

    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert config["model"]["v_num_grad_steps"] == FAST["v_num_grad_steps"]
    lines = (tmp_path / "run" / "ledger" / "edits.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["applied"] * 3
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert "Lima" in capsys.readouterr().out

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("x")["input_ids"]
    base = tiny_language_model("llama", torch.float32).model.state_dict()
    differing = [name for name, tensor in saved.state_dict().items() if not torch.equal(tensor, base[name])]
    assert differing == ["model.layers.1.mlp.down_proj.weight"]
    # The ledger's factors are the whole difference.
    change = sum(
        shard["layers.0.left"].T @ shard["layers.0.right"]
        for shard in (load_file(path) for path in (tmp_path / "run" / "ledger" / "shards").iterdir())
    )
    torch.testing.assert_close(
        saved.state_dict()[differing[0]].double(), base[differing[0]].double() + change, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("sequential", [False, True])
def test_the_ledgers_of_two_runs_are_equal(sequential, arguments, tmp_path):
    texts = []
    for name in ("one", "two"):
        assert main(arguments(trainer__default_root_dir=tmp_path / name, model__sequential_edit=sequential)) == 0
        texts.append((tmp_path / name / "ledger" / "edits.jsonl").read_text(encoding="utf-8"))
    assert texts[0] == texts[1]


def test_single_mode_has_no_final_scores_and_no_checkpoint(arguments, tmp_path, capsys):
    assert main(arguments(model__sequential_edit=False)) == 0
    content = read(tmp_path)
    assert content["mode"] == "single"
    assert content["final"] is None
    assert content["immediate"] != content["base"]
    assert main(arguments(save_model=tmp_path / "saved", overwrite="true")) == 2
    assert "sequential_edit: true" in capsys.readouterr().err


def test_records_that_cannot_be_edited_are_skipped_counted_and_listed(arguments, tmp_path):
    bad = [
        {"prompt": "Nobody is here", "subject": "Korrin", "target_new": "x"},
        {"prompt": "", "subject": "", "target_new": ""},
    ]
    (tmp_path / "mixed.jsonl").write_text(
        "\n".join(
            [json.dumps(RECORDS[0]), json.dumps(bad[0]), '{"prompt": ', json.dumps(bad[1]), json.dumps(RECORDS[1])]
        ),
        encoding="utf-8",
    )
    assert main(arguments(data__path=tmp_path / "mixed.jsonl")) == 3
    content = read(tmp_path)
    assert (content["n_requested"], content["n_applied"], content["n_skipped"]) == (5, 2, 3)
    reasons = [record["reason"] for record in content["records"] if record["status"] == "skipped"]
    assert any("mixed.jsonl, record 1, field 'subject'" in reason for reason in reasons)
    assert any("mixed.jsonl, line 3" in reason for reason in reasons)
    assert content["base"]["ES"]["n"] == 2
    assert main(arguments(data__path=tmp_path / "mixed.jsonl", model__on_error="stop", overwrite="true")) == 2


def test_rejected_edits_count_in_the_scores(arguments, tmp_path):
    assert main(arguments(verification__least_probability=0.9999)) == 3
    content = read(tmp_path)
    assert content["n_rejected"] == 3
    assert content["immediate"]["ES"]["n"] == 3
    assert content["immediate"] == content["base"]


def test_a_run_folder_is_not_overwritten_by_accident(arguments, tmp_path, capsys):
    assert main(arguments()) == 0
    before = read(tmp_path)
    assert main(arguments(model__seed=5)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert read(tmp_path) == before
    assert main([*arguments(model__seed=5), "--overwrite"]) == 0
    assert read(tmp_path, "manifest.json")["seed"] == 5


def test_a_failed_start_does_not_block_the_next_run(arguments, tmp_path):
    assert main(arguments(data__path="nowhere.json")) == 2
    assert main(arguments(probe_evaluation__held_out_text="nowhere.txt")) == 2
    assert main(arguments(model__preset="rome", model__statistics="nowhere.safetensors")) == 2
    assert main(arguments()) == 0


def test_overwrite_deletes_nothing_before_the_rest_is_known_to_be_right(arguments, tmp_path):
    assert main(arguments()) == 0
    before = read(tmp_path)
    for wrong in ({"data__path": "nowhere.json"}, {"model__layers": "[9]"}, {"save_model": tmp_path / "records.json"}):
        assert main(arguments(overwrite="true", **wrong)) == 2
        assert read(tmp_path) == before


def test_a_folder_with_foreign_files_is_refused(arguments, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work", encoding="utf-8")
    assert main(arguments()) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert main(arguments(overwrite="true")) == 0
    assert (tmp_path / "run" / "thesis.tex").is_file()


def test_a_stream_that_a_check_stops_is_reported_as_not_complete(arguments, tmp_path):
    options = {"state_check__largest_change": 1e-12, "state_check__on_failure": "stop", "state_check__every_n_edits": 1}
    assert main(arguments(model__sequential_edit=True, **options)) == 3
    content = read(tmp_path)
    assert content["interrupted"] is True
    assert (content["n_requested"], content["n_rolled_back"], content["n_applied"]) == (3, 1, 0)
    # Every requested record is scored on the final model, reached or not.
    assert content["base"]["ES"]["n"] == content["final"]["ES"]["n"] == 3
    assert content["final"] == content["base"]


def test_dry_run_shows_positions_and_edits_nothing(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(RomeModule, "load", lambda self: pytest.fail("a dry run needs no weights"))
    assert main([*arguments(), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "3 requests are valid" in out
    assert "n'" in out  # "Korrin" ends in an n of its own in this vocabulary
    assert not (tmp_path / "run").exists()


def test_ctrl_c_before_the_first_edit_saves_no_model(arguments, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rome_pl.metrics.score_cache.probe_scores", interrupted)
    assert main(arguments(model__sequential_edit=True, save_model=tmp_path / "saved")) == 130
    assert not (tmp_path / "saved").exists()
    assert read(tmp_path)["n_applied"] == 0


def test_ctrl_c_saves_what_was_done(arguments, tmp_path, monkeypatch):
    original = RomeModule.training_step

    def interrupted(self, batch, batch_idx):
        if batch_idx == 1:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    monkeypatch.setattr(RomeModule, "training_step", interrupted)
    assert main(arguments(model__sequential_edit=True, save_model=tmp_path / "saved")) == 130
    content = read(tmp_path)
    assert content["interrupted"] is True
    assert (content["n_requested"], content["n_applied"], content["n_skipped"]) == (3, 1, 1)
    assert "KeyboardInterrupt" in content["records"][1]["reason"]
    assert content["final"] is None
    assert (tmp_path / "saved" / "config.json").is_file()


def test_statistics_from_a_corpus_are_computed_once_and_used(arguments, tmp_path, short_text, monkeypatch):
    (tmp_path / "corpus.txt").write_text("\n".join([short_text.read_text(encoding="utf-8")] * 90), encoding="utf-8")
    options = {"model__preset": "r_rome", "model__corpus": tmp_path / "corpus.txt", "model__mom2_n_samples": 400}
    assert main(arguments(**options)) == 0
    kept = read(tmp_path, "manifest.json")["second_moments"]
    assert [info["count"] for info in kept] == [1024]  # one block
    monkeypatch.setattr("rome_pl.second_moments.moment_store.compute", lambda *_, **__: pytest.fail("is kept"))
    assert main(arguments(overwrite="true", **options)) == 0
    assert read(tmp_path, "manifest.json")["second_moments"] == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__path": "nowhere.json"}, "nowhere.json: no such file"),
        ({"model__layers": "[7]"}, "layers: 7 is out of range"),
        ({"model__pretrained": "nobody/no-such-model"}, "cannot load 'nobody/no-such-model'"),
        ({"model__keep_original_weight": "true"}, "sequential_edit"),
        ({"model__statistics": "nowhere.safetensors", "model__preset": "rome"}, "nowhere.safetensors"),
        ({"data__limit": 0}, "limit"),
        ({"trainer__max_epochs": 3}, "max_epochs"),
    ],
)
def test_bad_configurations_exit_with_one_clear_line(changes, message, arguments, capsys):
    assert main(arguments(**changes)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_file_of_unknown_form_is_refused_with_its_fields(arguments, tmp_path, capsys):
    (tmp_path / "odd.json").write_text(json.dumps([{"question": "q", "answer": "a"}]), encoding="utf-8")
    assert main(arguments(data__path=tmp_path / "odd.json")) == 2
    assert "'answer', 'question'" in capsys.readouterr().err


def test_a_misspelt_option_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments(model__layr=3))
    assert exit_.value.code == 2
    assert "model.layr" in capsys.readouterr().err


def test_help_and_print_config(capsys):
    for arguments, expected in (
        (["edit", "--help"], "--model.v_lr"),
        (["edit", "--config", "quickstart", "--print_config"], "limit: 10"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        assert expected in capsys.readouterr().out


def test_the_method_s_options_have_their_published_names():
    import inspect

    beside_the_method = {
        "pretrained", "dtype", "allow_pickle", "chat", "statistics", "corpus", "sequential_edit", "kl_position",
        "stop_loss", "stop_probability", "stop_greedy", "optimizer", "contexts_per_step", "contexts", "retries",
        "retry_below", "compile", "on_error", "keep_original_weight", "anchor_norm", "largest_update",
        "keep_subject_facts",
    }  # fmt: skip
    assert set(inspect.signature(RomeModule).parameters) == METHOD_OPTIONS | beside_the_method


def test_the_quickstart_config_runs(arguments, tmp_path):
    changed = arguments(data__limit=2, data__path="sample")
    changed[changed.index("smollm2")] = "quickstart"
    assert main(changed) == 0
    assert read(tmp_path)["n_applied"] == 2
