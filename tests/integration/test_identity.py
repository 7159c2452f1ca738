"""What a model is: weights, config, tokenizer, rules of encoding. What is kept of one is not taken for another's."""

import json
import shutil
from multiprocessing import get_context

import pytest
import torch
from safetensors.torch import load_file, save_file

from rome_pl.callbacks import EditCommit, RunReport
from rome_pl.editing.resume import check_model
from rome_pl.export.delta import DeltaError, apply_delta, read_delta
from rome_pl.export.run_export import export_run
from rome_pl.ledger.ledger_lines import LedgerError
from rome_pl.ledger.replay import read_edits, replay
from rome_pl.ledger.undo import pick, undo
from rome_pl.metrics.score_cache import KnownScores
from rome_pl.model.architecture import find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.requests.edit_request import EditRequest
from rome_pl.second_moments.generated_corpus import GeneratedCorpus
from rome_pl.second_moments.moment_file import StatisticsError
from rome_pl.second_moments.moment_store import (
    resolve_second_moments,
    shipped_statistics,
    statistics_files,
    statistics_folder,
)
from rome_pl.second_moments.second_moment import MomentInfo, SecondMoment
from rome_pl.tracing.trace import Fact, Trace
from rome_pl.tracing.trace_cache import KnownTraces
from tests.integration.helpers import lenient_callbacks, lighthouses, run_edits
from tests.recorded import rewrite_json
from tests.tiny import byte_level_tokenizer, tiny_language_model, tiny_model

REQUESTS = [EditRequest(**record, case_id=f"r{index}") for index, record in enumerate(lighthouses(4))]
PLAIN = {"sequential_edit": True, "preset": "r_rome", "mom2_adjustment": False}

pytestmark = pytest.mark.usefixtures("no_perplexity")


def with_bos():
    return LanguageModel(tiny_model("llama"), byte_level_tokenizer(bos=True))


def with_other_config():
    model = tiny_model("llama")
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 500.0}
    return LanguageModel(type(model)(model.config).double().eval(), byte_level_tokenizer()), model


def with_rope():
    """The same weights under another ``rope_theta``."""
    language_model, original = with_other_config()
    language_model.model.load_state_dict(original.state_dict())
    return language_model


def with_added_token():
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["Korrin0"])
    return LanguageModel(tiny_model("llama"), tokenizer)


OTHERS = {"BOS": with_bos, "rope_theta": with_rope, "added token": with_added_token}


def stored(folder, requests=REQUESTS):
    callbacks = [*lenient_callbacks(), RunReport(figures=False)]
    for callback in callbacks:
        if isinstance(callback, EditCommit):
            callback.ledger = True
    run_edits(tiny_language_model("llama"), folder, requests, callbacks, **PLAIN)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rome_pl.callbacks.probe_evaluation.perplexity", lambda *_: 1.0)
        return stored(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_kept_of_one_model_is_taken_for_another_s(name, run, tmp_path):
    model, other = tiny_language_model("llama"), OTHERS[name]()
    assert model.fingerprint == other.fingerprint
    known, fresh = KnownScores(model), KnownScores(other)
    known.measure(REQUESTS[:1])
    assert fresh.path != known.path
    assert KnownScores(tiny_language_model("llama")).path == known.path
    fact = Fact((3, 4, 5), (0, 2), 7)
    KnownTraces(model).keep(fact, Trace(0.5, 0.25, {}))
    assert KnownTraces(other).find(fact) is None
    assert GeneratedCorpus.of(model, 100, 0).source != GeneratedCorpus.of(other, 100, 0).source
    difference = "config" if name == "rope_theta" else "tokenizer"
    export_run(model, run, tmp_path / "delta", "delta")
    for use in (
        lambda: replay(other, run),
        lambda: undo(other, run, ["r1"]),
        lambda: pick(other, run, ["r1"]),
        lambda: check_model(run, other),
        lambda: apply_delta(other, read_delta(tmp_path / "delta")),
    ):
        with pytest.raises((LedgerError, DeltaError), match=f"of the same weights with another {difference}"):
            use()


@pytest.mark.parametrize("name", OTHERS)
def test_statistics_of_another_config_or_tokenizer_are_not_found_and_refused_by_name(name, tmp_path):
    other, model = OTHERS[name](), tiny_language_model("llama")
    site = find_site(model.model, 1)
    info = MomentInfo(**other.moment_identity(find_site(other.model, 1)), layer=1, count=300, corpus="c")
    path = statistics_folder() / "other.safetensors"
    SecondMoment(torch.eye(site.d_key, dtype=torch.float64), info).save(path)
    assert statistics_files(other, [find_site(other.model, 1)]) == {1: path}
    with pytest.raises(StatisticsError, match="from the same weights with another"):
        resolve_second_moments(model, [site], statistics=str(path))
    found = statistics_files(model, [site], wanted=None, corpus=None)
    assert found[1] != path


def test_what_is_saved_and_loaded_again_is_the_same_model(tmp_path):
    from rome_pl.model.loading import load_language_model

    model = with_bos()
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    again = load_language_model(str(tmp_path))
    again.tokenizer(["a", "a b"], padding=True, truncation=True, max_length=4)  # leaves its marks in the tokenizer
    for name in ("fingerprint", "config_fingerprint", "tokenizer_fingerprint"):
        assert getattr(again, name) == getattr(model, name)


def test_the_shipped_files_are_found_and_are_what_the_list_says():
    shipped = dict(shipped_statistics())
    assert sorted(info.layer for info in shipped.values()) == [0, 1, 2, 3, 4]
    assert all(info.config and len(info.tokenizer) == 64 for info in shipped.values())


def test_a_shipped_file_with_a_flipped_bit_is_refused(tmp_path):
    source = next(path for path, info in shipped_statistics() if info.layer == 4)
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / source.name).write_bytes(content)
    with pytest.raises(StatisticsError, match=f"{source.name}: damaged.*comes with the package"):
        SecondMoment.load(tmp_path / source.name)


@pytest.mark.parametrize("field", ["count", "layer", "weights", "agreement"])
@pytest.mark.parametrize("value", [None, "x", [], -1])
def test_a_bad_description_in_the_cache_is_passed_over_with_a_warning(field, value, tmp_path, caplog):
    if (field, value) in (("agreement", None), ("weights", "x"), ("agreement", -1)):
        return
    model = tiny_language_model("llama")
    site = find_site(model.model, 1)
    info = MomentInfo(**model.moment_identity(site), layer=1, count=300, corpus="c")
    good = statistics_folder() / "z.safetensors"
    SecondMoment(torch.eye(site.d_key, dtype=torch.float64), info).save(good)
    bad = statistics_folder() / "a.safetensors"
    about = json.dumps({**vars(info), field: value})
    save_file(load_file(good), bad, metadata={"rome_pl": about})
    assert statistics_files(model, [site]) == {1: good}
    assert "a.safetensors: damaged" in caplog.text
    assert f"'{field}'" in caplog.text


def test_a_run_in_another_precision_or_under_other_rules_is_not_resumed(run):
    for changes, message in (
        ({"dtype": "torch.float32"}, r"began in torch\.float32, the model is loaded in torch\.float64"),
        ({"dtype": "torch.float64", "encoding": 1}, "other rules"),
    ):
        rewrite_json(run / "manifest.json", lambda content, new=changes: content | {"model": content["model"] | new})
        with pytest.raises(LedgerError, match=message):
            check_model(run, tiny_language_model("llama"))


def test_a_run_of_an_earlier_version_is_replayed_and_what_is_missing_said(run, caplog):
    expected = replay(tiny_language_model("llama"), run).change
    path = run / "ledger" / "edits.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        del line["check"], line["shard_sha256"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (run / "ledger" / "end.json").unlink()
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    del manifest["checksum"], manifest["model"]["config"], manifest["model"]["encoding"]
    manifest["model"]["tokenizer"] = "of the vocabulary alone"
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    caplog.clear()
    assert replay(tiny_language_model("llama"), run).change == expected
    assert "the model's config and the tokenizer's rules are not on record" in caplog.text
    assert "whose lines have no checksums" in caplog.text
    with pytest.raises(LedgerError, match="other rules"):
        check_model(run, tiny_language_model("llama"))
    undo(tiny_language_model("llama"), run, ["r1"])  # its lines have checksums, over those that have none too
    assert replay(tiny_language_model("llama"), run).names == ["r0", "r2", "r3"]
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"status": "applied"', b'"status": "skipped"', 1))
    with pytest.raises(LedgerError, match=r"line 5: damaged \(its checksum does not fit"):
        read_edits(run)


CHANGES = {
    "a letter": (lambda lines: [lines[0], lines[1].replace(b"Oslo", b"Osla").replace(b"rye", b"rie"), *lines[2:]], 2),
    "a lost line": (lambda lines: [*lines[:1], *lines[2:]], 2),
    "the first line lost": (lambda lines: lines[1:], 1),
    "a doubled line": (lambda lines: [*lines[:2], *lines[1:]], 3),
    "two lines in another order": (lambda lines: [lines[0], lines[2], lines[1], lines[3]], 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_line_that_was_changed_lost_doubled_or_moved_is_named(name, run):
    change, number = CHANGES[name]
    path = run / "ledger" / "edits.jsonl"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(LedgerError, match=rf"edits\.jsonl, line {number}: damaged \(its checksum does not fit"):
        replay(tiny_language_model("llama"), run)


def test_resuming_with_fewer_records_is_refused_with_the_difference(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    callbacks = [*lenient_callbacks(), RunReport(figures=False)]
    for callback in callbacks:
        if isinstance(callback, EditCommit):
            callback.ledger = callback.resume = True
    with pytest.raises(LedgerError, match=r"2 records that the stream lacks now \(r2, r3\)"):
        run_edits(tiny_language_model("llama"), run, REQUESTS[:2], callbacks, **PLAIN)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def take_out(run, name, start):
    torch.set_num_threads(1)
    model = tiny_language_model("llama")
    start.wait(60)
    undo(model, run, [name])


def test_two_processes_that_undo_one_run_both_do(run):
    context = get_context("spawn")
    start = context.Barrier(2)
    processes = [context.Process(target=take_out, args=(run, name, start)) for name in ("r1", "r2")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [edit["status"] for edit in read_edits(run)] == ["applied", "undone", "undone", "applied"]
    both, one_by_one = tiny_language_model("llama"), tiny_language_model("llama")
    assert replay(both, run).names == ["r0", "r3"]
    pick(one_by_one, run, ["r0", "r3"])
    for name, tensor in one_by_one.model.state_dict().items():
        torch.testing.assert_close(both.model.state_dict()[name], tensor, rtol=1e-9, atol=1e-12)
