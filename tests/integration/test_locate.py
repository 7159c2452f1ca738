"""Causal tracing and trial edits from the command line and in a Trainer of the user's own."""

import json
import signal

import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file

from rome_pl.callbacks import TraceReport
from rome_pl.cli.app import main
from rome_pl.data_modules import FactDataModule
from rome_pl.errors import OptionError
from rome_pl.metrics.probes import measure_answers, next_tokens
from rome_pl.modules.rome_module import RomeModule
from rome_pl.modules.trace_module import TraceModule
from rome_pl.requests.edit_request import EditRequest
from rome_pl.tracing import tracer as tracing
from rome_pl.tracing.tracer import Tracer
from tests.integration.helpers import quiet_trainer, saved_model, snapshot
from tests.tiny import LAYERS, byte_level_tokenizer, tiny_language_model, tiny_model, with_unreadable_experts

SUBJECTS = ("Korrin", "Miss Vane", "Dunholt", "Marrow", "Lima", "Old Bess")
TEMPLATES = ("Where is {}? In", "I saw {} near the", "{} was", "{} stands in")
# What a trial of edits on a random model needs: little.
EDITING = {"v_num_grad_steps": 4, "v_lr": 0.1, "clamp_norm_factor": 20.0, "context_template_length_params": [[3, 2]]}


def known_facts(language_model, number):
    """Facts in the form of known_1000.json whose answer a random model gives."""
    found = []
    for subject in SUBJECTS:
        for template in TEMPLATES:
            prompt = template.format(subject)
            answer = language_model.tokenizer.decode(next_tokens(language_model, [prompt])).strip()
            if not answer.isalpha():
                continue
            request = EditRequest(prompt=prompt, subject=subject, target_new=answer)
            row = language_model.encoder.continuation(prompt, answer, request)
            if measure_answers(language_model, [row])[0].generated:
                found.append(
                    {
                        "known_id": 100 + len(found), "subject": subject, "attribute": answer, "prompt": prompt,
                        "template": template, "prediction": f" {answer}",
                        "relation_id": f"P{TEMPLATES.index(template)}",
                    }
                )  # fmt: skip
    assert len(found) >= number
    return found[:number]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a saved model, facts that it knows, and one that it does not know."""
    folder = tmp_path_factory.mktemp("work")
    facts = known_facts(saved_model(folder), 4)
    unknown = {**facts[0], "known_id": 7, "attribute": "Reykjavik", "relation_id": "P0"}
    (folder / "facts.json").write_text(json.dumps([*facts, unknown]), encoding="utf-8")
    return folder


@pytest.fixture
def arguments(work, tmp_path):
    options = {
        "model.pretrained": work / "model", "data.path": work / "facts.json", "trainer.accelerator": "cpu",
        "trainer.default_root_dir": tmp_path / "run", "model.noise_samples": 2, "model.preset": "easyedit",
        "model.editing": json.dumps(EDITING), "model.trial_edits": 3, "model.layers": "0,2",
    }  # fmt: skip

    def made(**changes):
        merged = options | {name.replace("__", "."): value for name, value in changes.items()}
        return ["locate", *(str(part) for name, value in merged.items() for part in (f"--{name}", value))]

    return made


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_the_verb_traces_tries_layers_and_leaves_a_config_that_edits(arguments, work, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(arguments()) == 0
    printed = capsys.readouterr().out
    assert "5 facts: 4 known, 4 of them traced" in " ".join(printed.split())
    content = read(run)
    counts = {name: content[f"n_{name}"] for name in ("requested", "known", "traced", "unknown", "skipped")}
    assert counts == {"requested": 5, "known": 4, "traced": 4, "unknown": 1, "skipped": 0}
    assert content["unknown"] == ["7"]
    assert set(content["effects"]) == {"hidden", "mlp", "attention"}
    for roles in content["effects"].values():
        assert len(roles["subject_last"]) == LAYERS
        assert roles["subject_last"][0]["n"] == 4
    for name in ("effects", "fact_1", "fact_3", "trial"):
        assert (run / "figures" / f"{name}.png").stat().st_size > 1000
    assert not (run / "figures" / "fact_4.png").exists()
    assert "| mlp | last subject token |" in (run / "table.md").read_text(encoding="utf-8")
    records = [json.loads(line) for line in (run / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == 4
    assert all(len(record["tokens"]) == len(record["restored"]["mlp"]) for record in records)
    trial = content["trial"]
    assert [found["layer"] for found in trial["layers"]] == [0, 2]
    assert trial["edits"] == 3
    assert trial["S_of"] == ["ES"]  # known_1000.json has neither paraphrases nor neighbours
    assert any("PS" in note and "NS" in note for note in content["notes"])
    best = max(found["scores"]["S"]["value"] for found in trial["layers"])
    chosen = next(found for found in trial["layers"] if found["layer"] == trial["recommended"])
    assert chosen["scores"]["S"]["value"] == best
    assert content["agreement"]["peak"] == content["peak"]

    config = (run / "edit.yaml").read_text(encoding="utf-8")
    assert config.startswith("# Edits ")
    assert f"| **{trial['recommended']}** |" in config
    options = yaml.safe_load(config)
    assert options["model"]["layers"] == [trial["recommended"]]
    assert {name: options["model"][name] for name in EDITING} == EDITING
    requests = [{"prompt": "Korrin stands in", "subject": "Korrin", "target_new": "Oslo"}]
    (tmp_path / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
    edit = ["edit", "--config", str(run / "edit.yaml"), "--data.path", str(tmp_path / "requests.json")]
    edit += ["--trainer.default_root_dir", str(tmp_path / "edited"), "--trainer.accelerator", "cpu"]
    assert main([*edit, "--verification.least_probability", "0"]) == 0
    assert read(tmp_path / "edited", "manifest.json")["rewrite"]["layers"] == [trial["recommended"]]


def test_ctrl_c_in_the_trial_ends_the_run_and_keeps_the_traces(arguments, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(RomeModule, "training_step", interrupted)
    assert main(arguments()) == 130
    content = read(tmp_path / "run")
    assert content["n_traced"] == 4
    assert content["trial"] is None
    assert signal.getsignal(signal.SIGINT) is handler


def test_trial_edits_take_paraphrases_and_neighbours_from_a_file_of_their_own(arguments, tmp_path):
    records = [
        {
            "prompt": f"The lighthouse of {subject} stands in", "subject": subject, "target_new": "Oslo",
            "target_true": "Lima", "paraphrases": [f"Where is {subject}? In"], "neighbours": ["Tarn lies in"],
        }
        for subject in ("Korrin", "Tamsel", "Ostrava")
    ]  # fmt: skip
    (tmp_path / "trial.json").write_text(json.dumps(records), encoding="utf-8")
    assert main(arguments(model__trial_path=tmp_path / "trial.json", model__trial_edits=2, model__layers="1")) == 0
    trial = read(tmp_path / "run")["trial"]
    assert trial["edits"] == 2
    assert trial["S_of"] == ["ES", "PS", "NS"]
    assert trial["recommended"] == 1
    scores = trial["layers"][0]["scores"]
    assert all(scores[name]["n"] == 2 for name in ("ES", "PS", "NS"))
    means = [scores[name]["value"] for name in ("ES", "PS", "NS")]
    expected = 3 / sum(1 / mean for mean in means) if all(means) else 0.0
    assert scores["S"]["value"] == pytest.approx(expected)


def test_known_traces_are_not_made_again(arguments, tmp_path, monkeypatch):
    assert main(arguments(model__facts=2, model__trial_edits=0)) == 0
    made = []
    trace = Tracer.trace
    monkeypatch.setattr(Tracer, "trace", lambda *args: made.append(args) or trace(*args))
    assert main(arguments(model__trial_edits=0, trainer__default_root_dir=tmp_path / "more")) == 0
    assert len(made) == 2  # of four
    lines = [(tmp_path / name / "records.jsonl").read_text(encoding="utf-8") for name in ("run", "more")]
    assert lines[1].startswith(lines[0])
    assert main(arguments(model__trial_edits=0, model__seed=1, trainer__default_root_dir=tmp_path / "other")) == 0
    assert len(made) == 6  # other noise


def test_a_module_in_a_trainer_of_one_s_own(work, tmp_path, private_cache):
    language_model = tiny_language_model("llama", torch.float32)
    language_model.model.load_state_dict(load_file(work / "model" / "model.safetensors"), strict=False)
    before, state = snapshot(language_model.model), torch.get_rng_state()
    module = TraceModule.from_language_model(language_model, noise_samples=2, window=2)
    logger = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    trainer = quiet_trainer([TraceReport(pictures=1)], tmp_path, logger=logger)
    facts = FactDataModule(str(work / "facts.json"))
    found = trainer.predict(module, datamodule=facts)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in language_model.model.state_dict().items())
    assert {name: value for step in found for name, value in step.items()} == {
        fact.name: fact.trace.total_effect for fact in module.traced
    }
    assert [fact.name for fact in module.traced] == ["100", "101", "102", "103"]
    content = read(tmp_path)
    assert content["trial"] is None
    assert content["window"] == 2
    by_role = [fact.trace.effect("mlp")[fact.roles.index("subject_last")] for fact in module.traced]
    mean = torch.stack(by_role).mean(0)
    assert [entry["value"] for entry in content["effects"]["mlp"]["subject_last"]] == pytest.approx(mean.tolist())
    totals = [fact.trace.clean - fact.trace.corrupted for fact in module.traced]
    assert content["totals"]["total_effect"]["value"] == pytest.approx(sum(totals) / 4)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"figures/effects", "figures/fact_1"} <= set(events.Tags()["images"])
    logged = [event.value for event in events.Scalars("effect/mlp/subject_last")]
    assert logged == pytest.approx(mean.tolist(), rel=1e-5)


def test_noise_is_three_deviations_of_the_subjects_embeddings(work, tmp_path):
    language_model = tiny_language_model("llama", torch.float32)
    module = TraceModule.from_language_model(language_model, noise_samples=1)
    requests = [
        EditRequest(prompt="Korrin was", subject="Korrin", target_new="x", target_true="y", case_id=0),
        EditRequest(prompt="I saw Lima near", subject="Lima", target_new="x", target_true="y", case_id=1),
    ]
    with pytest.raises(Exception, match="nothing to trace"):
        module.begin(requests)
    encode = language_model.encoder.edit
    tokens = []
    for request in requests:
        first, last = (encode(request, ("",), name).rows[0] for name in ("subject_first", "subject_last"))
        tokens += first.ids[first.lookup : last.lookup + 1]
    weight = language_model.model.get_input_embeddings().weight.detach()[tokens].double()
    assert module.deviation == pytest.approx(3 * float(weight.std()))


def test_results_do_not_depend_on_other_facts_or_on_bos(tmp_path, private_cache):
    tokenizer = byte_level_tokenizer(bos=True)
    language_model = tiny_language_model("gpt2", torch.float64)
    language_model = type(language_model)(language_model.model, tokenizer, "tiny gpt2 with BOS")
    facts = known_facts(language_model, 3)
    traces = []
    for chosen in (facts, facts[::-1], [facts[1]]):
        module = TraceModule.from_language_model(language_model, noise_samples=2)
        requests = [
            EditRequest(
                prompt=fact["prompt"], subject=fact["subject"], target_new="Oslo", target_true=fact["attribute"],
                case_id=place,
            )
            for place, fact in enumerate(chosen)
        ]  # fmt: skip
        module.begin(requests)
        module.deviation = 0.1  # which does depend on all of them
        fact = module._facts[str(chosen.index(facts[1]))]
        assert fact.ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(fact.ids[slice(*fact.subject)]).strip() == facts[1]["subject"]
        traces.append(Tracer(language_model.model, 1).trace(fact, module._noise(fact)))
    for other in traces[1:]:
        torch.testing.assert_close(other.restored, traces[0].restored, rtol=1e-12, atol=0)
        assert other.corrupted == traces[0].corrupted


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__noise_factor": 0}, "noise_factor: expected a number above 0"),
        ({"model__noise_factor": -1}, "noise_factor: expected a number above 0"),
        ({"model__noise_samples": 0}, "noise_samples: expected a number from 1 on, got 0"),
        ({"model__window": 0}, "window: expected a number from 1 on, got 0"),
        ({"model__facts": 0}, "facts: expected a number from 1 on, got 0"),
        ({"model__trial_edits": -1}, "trial_edits: expected a number from 0 on"),
        ({"model__layers": "1,3"}, "layers: 3 does not exist; the model has 3 layers"),
        ({"model__layers": "[1, 3]", "model__trial_edits": 0}, "layers: 3 does not exist"),
        ({"model__editing": '{"v_lr": -1}'}, "editing: v_lr: expected a number from 0 on"),
        ({"model__editing": '{"learning_rate": 1}'}, "learning_rate"),
        ({"model__editing": '{"preset": "rome"}'}, "editing: preset is an option of its own"),
        ({"trainer__precision": "bf16-true"}, "precision is bf16-true: use '32-true'"),
        ({"model__editing": '{"layers": [1]}'}, "editing: layers is not for a trial to choose"),
        ({"model__editing": '{"retries": [{"layers": [1]}]}'}, "editing: retries at other layers would credit"),
        ({"model__trial_path": "nowhere.json"}, "nowhere.json: no such file"),
        ({"trainer__devices": 2}, "facts are traced on one; set trainer.devices: 1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_traced(arguments, tmp_path, capsys, monkeypatch, changes, said):
    monkeypatch.setattr(tracing.Tracer, "trace", lambda *_: pytest.fail("traced"))
    assert main(arguments(**changes)) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "results.json").exists()


PROMPT = {"prompt": "Korrin was", "subject": "Korrin"}
TARN = {"prompt": "Tarn was", "subject": "Tarn", "attribute": "Lima", "known_id": 9}


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{**PROMPT, "attribute": "Oslo", "known_id": 1}, TARN], "of none of 2 facts, so there is nothing to trace"),
        ([{**PROMPT, "target_new": "Oslo", "case_id": 4}], "record 4, field 'target_true': is missing"),
        ([{**PROMPT, "known_id": 4}], "record 4, field 'target_new': is missing"),
        (
            [{**PROMPT, "subject": "Vane", "known_id": 4, "attribute": "a"}, {**TARN, "subject": "x"}],
            "'Vane' does not occur in the prompt",
        ),
        ([{"prompt": "Korrin was", "attribute": "Oslo"}], "record 0, field 'subject': is missing"),
        ([{"subject": "Korrin", "answer": "Oslo"}], "unknown form of record"),
    ],
)
def test_facts_that_cannot_be_traced_are_named(arguments, tmp_path, capsys, records, said):
    (tmp_path / "bad.json").write_text(json.dumps(records), encoding="utf-8")
    assert main(arguments(data__path=tmp_path / "bad.json")) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error
    assert "bad.json" in error


def test_a_fact_that_cannot_be_used_is_skipped_and_counted(arguments, work, tmp_path):
    records = json.loads((work / "facts.json").read_text(encoding="utf-8"))
    records[1] = {name: value for name, value in records[1].items() if name != "attribute"}
    records.append({**PROMPT, "subject": "Vane", "known_id": 4, "attribute": "a"})
    (tmp_path / "some.json").write_text(json.dumps(records), encoding="utf-8")
    assert main(arguments(data__path=tmp_path / "some.json", model__trial_edits=0)) == 3
    content = read(tmp_path / "run")
    assert (content["n_requested"], content["n_known"], content["n_skipped"]) == (6, 3, 2)
    assert {record["case_id"]: record["field"] for record in content["records"]} == {
        "101": "target_true",
        "4": "subject",
    }


def test_an_earlier_run_is_not_overwritten(arguments, capsys):
    assert main(arguments(model__trial_edits=0, model__facts=1)) == 0
    assert main(arguments(model__trial_edits=0, model__facts=1)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments(model__trial_edits=0, model__facts=1), "--overwrite"]) == 0


def test_a_mixture_of_an_unknown_form_is_traced_without_its_mlps_and_without_a_trial(tmp_path, private_cache):
    model = with_unreadable_experts(tiny_model("llama", torch.float32))
    language_model = type(tiny_language_model())(model, byte_level_tokenizer(), "tiny mixture")
    facts = [*known_facts(language_model, 1), TARN]
    (tmp_path / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    module = TraceModule.from_language_model(language_model, noise_samples=1)
    trainer = quiet_trainer([TraceReport()], tmp_path / "run")
    with pytest.raises(OptionError, match="expected 'all'"):
        TraceModule.from_language_model(language_model, layers="first").candidates()
    trainer.predict(module, datamodule=FactDataModule(str(tmp_path / "facts.json")))
    content = read(tmp_path / "run")
    assert set(content["effects"]) == {"hidden", "attention"}
    assert any("mlp could not be traced" in note and "mixture of experts" in note for note in content["notes"])
    assert any("no edits could be tried" in note for note in content["notes"])
    assert content["peak"] is None
    assert module.layer_trial() is None


def test_other_trainers_and_data_are_told_what_fits():
    language_model = tiny_language_model("llama", torch.float32)
    module = TraceModule.from_language_model(language_model)
    with pytest.raises(TypeError, match="TraceReport works with TraceModule"):
        TraceReport().on_predict_end(None, torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="runs predict\\(\\) on a TraceModule"):
        FactDataModule().predict_dataloader()
    with pytest.raises(OptionError, match=r"traced by Trainer\.predict"):
        module.setup("fit")
