"""Ledgers, manifests, results and deltas of the wrong form: each refused with file, line and field."""

import json
import os
import shutil

import pytest

from rome_pl.callbacks import EditCommit, RunReport
from rome_pl.errors import RomeError
from rome_pl.export.delta import read_delta
from rome_pl.export.run_export import export_run
from rome_pl.ledger.ledger_lines import LedgerError, read_lines
from rome_pl.ledger.replay import read_edits, read_manifest, replay
from rome_pl.ledger.run_end import is_finished
from tests.integration.helpers import REQUESTS, lenient_callbacks, run_edits
from tests.recorded import rewrite_json, rewrite_ledger
from tests.timing import least_seconds
from tests.tiny import tiny_language_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three edits and its delta."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rome_pl.callbacks.probe_evaluation.perplexity", lambda *_: 1.0)
        callbacks = [*lenient_callbacks(), RunReport(figures=False)]
        for callback in callbacks:
            if isinstance(callback, EditCommit):
                callback.ledger = True
        options = {"sequential_edit": True, "preset": "r_rome", "mom2_adjustment": False}
        run_edits(tiny_language_model(), folder / "run", REQUESTS, callbacks, **options)
    export_run(tiny_language_model(), folder / "run", folder / "delta", "delta")
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def ledger(whole, tmp_path):
    """The run with the lines of its ledger alone, which is quicker."""
    (tmp_path / "run" / "ledger").mkdir(parents=True)
    shutil.copy(whole / "run" / "ledger" / "edits.jsonl", tmp_path / "run" / "ledger")
    return tmp_path / "run"


def put(content, place, value):
    """The content with another value at a place such as ``request.target_new``; ``...`` takes it away."""
    *path, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    content = json.loads(json.dumps(content))
    at = content
    for part in path:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return content


LINE = [
    *(("index", value) for value in (..., None, "1", -1, 1.5, True, [], 10**30)),
    *(("case_id", value) for value in (..., None, 1.5, [], {}, True)),
    *(("status", value) for value in (..., None, "appliel", "pending", 1, ["applied"], "APPLIED")),
    *(("reason", value) for value in (..., 1, [], {})),
    *(("notes", value) for value in (..., None, "note", {}, [1], [None])),
    *(("request", value) for value in (None, "text", [], 5, {})),
    *(("request.prompt", value) for value in (..., None, "", 5, [])),
    *(("request.target_new", value) for value in (..., None, "", 5, [])),
    *(("request.target_true", value) for value in (..., 5, [])),
    *(("request.neighbours", value) for value in (None, "x", {}, [1])),
    *(("request.locality", value) for value in (None, "x", {}, ["x"], [{"prompt": "x"}])),
    *(("probability", value) for value in (..., None, 0.5, [], "x")),
    *(("probability.after", value) for value in (..., "0.5", -0.1, 2.0, [], {})),
    *(("layers", value) for value in (..., None, 1, "1", {}, [-1], [1.0], ["1"], [None], [2, 1], [1, 1])),
    *(("steps", value) for value in (..., None, 1, {}, [1], [[1.0]], [["x"] * 5])),
    *(("measured", value) for value in (..., 1, [], {}, {"rewrite": 1})),
    *(("measured.rewrite", value) for value in (..., None, 1.0, [1.0], ["a", "b"])),
    *(("measured.answers", value) for value in (..., None, [], {"rewrite": None}, {"rewrite": [{}]})),
    *(("failed", value) for value in (..., None, "no", 0)),
    *(("update_norm", value) for value in (..., "1", -1.0, [])),
    *(("num_steps", value) for value in (..., None, -1, "1", 1.5)),
    *(("shard", value) for value in (None, 1, "", "../../x.safetensors", "/etc/passwd", "a.safetensors", "000000")),
    *(("shard", value) for value in ("000000.safetensors\n", "..\\000000.safetensors", "000000.safetensors/../x")),
    *(("shard_sha256", value) for value in (None, 1, "", "x" * 64)),
    *(("joint", value) for value in ("x", {}, [-1], ["0"])),
    *(("together", value) for value in ("x", {}, [1], [1, 2, 3], [-1, 2], ["1", "2"])),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), LINE, ids=[f"{place} {value!r:.20}" for place, value in LINE])
def test_a_line_of_the_wrong_form_is_refused_with_its_field(place, value, ledger):
    rewrite_ledger(ledger, lambda lines: [lines[0], put(lines[1], place, value), lines[2]])
    with pytest.raises(LedgerError, match=r"edits\.jsonl, line 2: damaged \(field '" + place.split(".")[0]):
        read_edits(ledger)


@pytest.mark.parametrize(
    "line", [b"[]", b"null", b'"x"', b"5", b"{}", b"[" * 100_000, b'{"a": 1, "a": 2}', b'{"a": NaN}', b'{"a": 1e999}',
             b'{"a": ' + b"1" * 5000 + b"}", b"\xff\xfe", b"\x00" * 40, b"", b" "],
)  # fmt: skip
def test_what_is_no_line_is_refused_with_its_number(line, ledger):
    path = ledger / "ledger" / "edits.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + b"".join(rest))
    with pytest.raises(LedgerError, match=r"edits\.jsonl, line 2: damaged"):
        read_edits(ledger)


MANIFEST = [
    *(("model", value) for value in (..., None, [], "x", {})),
    *((f"model.{name}", value) for name in ("source", "fingerprint", "tokenizer", "dtype") for value in (..., None, 5)),
    *(("model.dtype", value) for value in ("int8", "torch.quint8", "")),
    *(("model.frame", value) for value in (None, "x", [1])),
    *(("model.chat", value) for value in ([], "x", 1)),
    *(("rewrite", value) for value in (..., None, [], "x", {})),
    *(("rewrite.layers", value) for value in (..., None, [], 1, "1", [-1], ["1"], [1.5], {})),
    *(("metric", value) for value in (..., None, [], "x", {})),
    *(("metric.ridge", value) for value in (..., None, "x", [])),
    *(("second_moments", value) for value in (..., None, {}, "x", [1], [{}])),
    *(("mode", value) for value in (None, "other", 1, [])),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), MANIFEST, ids=[f"{place} {value!r:.20}" for place, value in MANIFEST])
def test_a_manifest_of_the_wrong_form_is_refused_with_its_field(place, value, copy):
    rewrite_json(copy / "run" / "manifest.json", lambda content: put(content, place, value))
    with pytest.raises(LedgerError, match=r"manifest\.json: missing or damaged \(field '" + place.split(".")[0]):
        read_manifest(copy / "run")


DELTA = [
    *(("base", value) for value in (..., None, [], "x", {})),
    *((f"base.{name}", value) for name in ("source", "fingerprint", "dtype") for value in (..., None, 5)),
    *(("rewrite", value) for value in (..., None, [], {})),
    *(("rewrite.layers", value) for value in (..., None, 1, ["1"], [-1])),
    *(("num_edits", value) for value in (..., None, "3", -1)),
    *(("writes", value) for value in (..., None, [1], [["1"]], [[0]], [[-1]], {})),
    *(("digests", value) for value in (..., None, [1], ["x"], {})),
    *(("edits", value) for value in (..., None, {}, [1])),
    *(("tensors", value) for value in (..., None, 1, "x")),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), DELTA, ids=[f"{place} {value!r:.20}" for place, value in DELTA])
def test_a_delta_of_the_wrong_form_is_refused_with_its_field(place, value, copy):
    rewrite_json(copy / "delta" / "rome_pl.json", lambda content: put(content, place, value))
    with pytest.raises(RomeError, match=r"rome_pl\.json: missing or damaged \(field '" + place.split(".")[0]):
        read_delta(copy / "delta")


@pytest.mark.parametrize("text", ["[]", "null", "5", "{}", '{"interrupted": "no"}', '{"interrupted": null}', "{", ""])
def test_results_of_the_wrong_form_are_refused(text, copy):
    (copy / "run" / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(LedgerError, match=r"results\.json: missing or damaged"):
        is_finished(copy / "run")


READERS = {
    "run/ledger/edits.jsonl": lambda folder: read_edits(folder / "run"),
    "run/ledger/shards/000001.safetensors": lambda folder: replay(tiny_language_model(), folder / "run"),
    "run/ledger/end.json": lambda folder: read_edits(folder / "run"),
    "run/manifest.json": lambda folder: read_manifest(folder / "run"),
    "run/results.json": lambda folder: is_finished(folder / "run"),
    "delta/rome_pl.json": lambda folder: read_delta(folder / "delta"),
    "delta/delta.safetensors": lambda folder: read_delta(folder / "delta"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("instead", ["FIFO", "folder"])
def test_a_fifo_or_folder_in_place_of_a_file_is_refused_at_once(name, instead, copy):
    (copy / name).unlink()
    os.mkfifo(copy / name) if instead == "FIFO" else (copy / name).mkdir()
    with pytest.raises(RomeError, match=r"is no regular file"):
        READERS[name](copy)


def test_reading_a_ledger_takes_time_in_proportion_to_its_lines(copy):
    path = copy / "run" / "ledger" / "edits.jsonl"

    def reading(number):
        rewrite_ledger(
            copy / "run", lambda lines: [lines[0] | {"index": index, "case_id": str(index)} for index in range(number)]
        )
        assert len(read_lines(path)) == number
        return least_seconds(lambda: read_lines(path))

    assert reading(2000) < 20 * reading(250)
