"""Files read strictly: what is wrong with a record costs that record, and nothing hangs or crashes."""

import json
import os
import socket

import pytest

from rome_pl.data_modules.facts import FactDataModule
from rome_pl.data_modules.request_data import RequestDataModule
from rome_pl.errors import OptionError
from rome_pl.interop.convert_settings import convert_settings
from rome_pl.interop.settings_file import ConversionError
from rome_pl.metrics import held_out_text
from rome_pl.requests.record_forms import DataError, parse_records, read_records
from rome_pl.second_moments.corpus import Corpus, CorpusError

GOOD = {"prompt": "Rome is in", "subject": "Rome", "target_new": "Peru"}
LINE = json.dumps(GOOD)
YAML = "- {prompt: Rome is in, subject: Rome, target_new: Peru}\n"
DASH = "  prompt: Oslo is in\n  subject: Oslo\n  target_new: Peru\n"


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def one_refused(path):
    """What a record among good ones is refused for."""
    requests, invalid = parse_records(read_records(path), path.name)
    assert requests
    assert len(invalid) == 1
    assert len(invalid[0].message) < 500
    return invalid[0].message.replace(str(path), path.name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.yaml", YAML + "- " + DASH.lstrip() + "\n" + DASH,
            "a.yaml: the key 'prompt' occurs twice in one mapping; begin each record with a dash (-), or take one of "
            "the two out (line 6)",
        ),
        ("a.yaml", YAML + "- {prompt: a, 'prompt': b}", "the key 'prompt' occurs twice"),
        ("a.yaml", YAML + "- {prompt: a, locality: {K: [{prompt: x, prompt: y}]}}", "the key 'prompt' occurs twice"),
        ("a.json", f'[{LINE},\n{{"prompt": "a",\n "subject": "b",\n "prompt": "c"}}]', "'prompt' occurs twice"),
        ("a.json", f'[{LINE},\n{{"prompt": "a",\n "subject": "b",\n "prompt": "c"}}]', "(line 4)"),
        ("a.json", f'[{LINE}, {{"locality": [1, [{{"k": {{}}, "x": [1],\n"k": 2}}]]}}]', "the key 'k' occurs"),
        ("a.json", f'[{LINE}, {{"locality": [1, [{{"k": {{}}, "x": [1],\n"k": 2}}]]}}]', "(line 2)"),
        ("a.jsonl", LINE + '\n\n{"prompt": "a", "prompt": "b"}\n', "a.jsonl, line 3: the key 'prompt' occurs twice"),
    ],
)  # fmt: skip
def test_a_key_that_occurs_twice_costs_its_record(tmp_path, name, content, message):
    assert message in one_refused(write(tmp_path, name, content))


def test_a_file_whose_only_record_has_a_key_twice_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"a\.yaml: the key 'prompt' occurs twice .* begin each record with a dash .*line 4"
    ):
        read_records(write(tmp_path, "a.yaml", "- " + DASH.lstrip() + DASH))


def test_merged_keys_are_no_second_keys(tmp_path):
    text = "- &b {prompt: Rome is in, subject: Rome, target_new: a}\n- &c {<<: *b, target_new: b}\n- *c\n"
    text += "- {<<: [*c, *b]}\n"
    requests, invalid = parse_records(read_records(write(tmp_path, "a.yaml", text)), "a.yaml")
    assert ([request.target_new for request in requests], invalid) == (["a", "b", "b", "b"], [])


BOMB = "- {a0: &a0 [x, x, x, x, x, x, x, x, x], " + ", ".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
) + "}\n"  # fmt: skip
MERGES = "- {a0: &a0 {x: 1}, " + ", ".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)
) + "}\n"  # fmt: skip
CHAIN = "- {a0: &a0 [x], " + ", ".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 200)) + "}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", YAML + "- {locality: {K: [{prompt: x, ground_truth: &a [*a]}]}}\n" + YAML, "holds itself"),
        ("a.yaml", YAML + "- &a {prompt: *a}\n", "holds itself"),
        ("a.yaml", "&a\n" + YAML + "- *a\n", "holds itself"),
        ("a.yaml", YAML + BOMB + YAML, "its aliases stand for more than 100000 values"),
        ("a.yaml", YAML + MERGES, "its aliases stand for more than 100000 values"),
        ("a.yaml", YAML + CHAIN, "more than 64 deep"),
        ("a.yaml", YAML + "- {case_id: " + "9" * 5000 + "}", "has 5000 digits"),
        ("a.yaml", YAML + "- {case_id: 0x" + "f" * 5000 + "}", "has 5002 digits"),
        ("a.yaml", YAML + "- {case_id: 1" + ":1" * 5000 + "}", "digits"),
        ("a.yaml", YAML + "- {target_new: 2024-13-45}", "malformed YAML: month must be in 1..12 (line 2)"),
        ("a.yaml", YAML + "- {target_new: !!timestamp x}", "does not fit its tag"),
        ("a.yaml", YAML + "- {target_new: !!bool x}", "does not fit its tag"),
        ("a.yaml", YAML + "- {target_new: !!python/object/apply:os.getcwd []}", "could not determine a constructor"),
        ("a.yaml", YAML + "- {[a]: b}", "unhashable key"),
        ("a.yaml", YAML + "- {prompt: Rome is, subject: Rome, target_new: !!set {a, b}}", "expected text, got set"),
        ("a.yaml", YAML + "- {prompt: Rome is, subject: Rome, target_new: !!binary aGk=}", "expected text, got bytes"),
        ("a.yaml", YAML + "- {prompt: Rome is, subject: Rome, target_new: 2024-01-02}", "got date; put it in quotes"),
        ("a.yaml", YAML + "- {case_id: .nan, prompt: Rome is, subject: Rome, target_new: x}", "got float"),
        ("a.json", f'[{LINE}, {{"case_id": {"9" * 5000}}}]', "has 5000 digits"),
        ("a.jsonl", f'{LINE}\n{{"case_id": {"9" * 5000}}}', "has 5000 digits"),
        ("a.json", f'[{LINE}, {{"case_id": NaN}}]', "NaN is no JSON value"),
        ("a.jsonl", f'{LINE}\n{{"case_id": -Infinity}}', "-Infinity is no JSON value"),
        ("a.json", f'[{LINE}, {{"prompt": {"[" * 200 + "]" * 200}}}]', "more than 64 deep"),
        ("a.jsonl", f'{LINE}\n{{"prompt": {"[" * 5000 + "]" * 5000}}}', "too deep to be read"),
    ],
)  # fmt: skip
def test_what_has_no_end_or_bound_costs_its_record(tmp_path, name, content, message):
    assert message in one_refused(write(tmp_path, name, content))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[" * 100_000, "too deep to be read"),
        ("a.json", '{"a": ' * 100_000, "too deep to be read"),
        ("a.yaml", YAML + "- " + "[" * 3000, "more than 64 deep"),
        ("a.yaml", "- " * 3000 + "x", "more than 64 deep"),
        ("a.json", LINE, r"expected a list of records, got dict; put records between brackets"),
        ("a.yaml", DASH, r"expected a list of records, got dict; begin each record with a dash"),
        ("a.yaml", YAML + "- a: \x01", "malformed YAML: unacceptable character"),
        ("a.yaml", YAML + "---\n" + YAML, "expected a single document"),
        ("a.json", LINE + "\n" + LINE, r"Extra data; one record a line is JSON lines: name the file \.jsonl"),
        ("a.jsonl", json.dumps([GOOD, GOOD], indent=1), r"one JSON value over several lines.*name the file \.json"),
        ("a.json.gz", b"\x1f\x8b\x08abc", r"is compressed \(gzip\)"),
        ("a.jsonl", b"\x1f\x8b\x08abc", r"is compressed \(gzip\)"),
        ("a.parquet", b"PAR1abc", "unknown file type '.parquet'|is a Parquet file"),
        ("a.json", b"PAR1abc", "is a Parquet file"),
        ("a.yaml", b"PK\x03\x04abc", r"is an archive \(zip\)"),
        ("a.json", b"[\x00\x01]", "is no text: byte 1 is NUL"),
        ("a.json", "[]".encode("utf-16-le"), "is no text: byte 1 is NUL"),
        ("a.json", "[]".encode("utf-16"), "not UTF-8 at byte 0"),
        ("a.json", f"[{LINE},]", "Expecting value"),
        ("a.json", f"[{LINE} {LINE}]", "Expecting ',' delimiter"),
        ("a.json", f"[{LINE}", "Expecting ',' delimiter"),
        ("a.json", f"[{LINE}] x", "Extra data"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_refused_in_few_words(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as raised:
        read_records(write(tmp_path, name, content))
    assert len(str(raised.value)) < 400 + len(str(tmp_path))


@pytest.fixture
def no_files(tmp_path):
    """Names that are of no file, and opening some of which would wait for ever."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    bound = socket.socket(socket.AF_UNIX)
    try:
        here = os.open(".", os.O_RDONLY)
        os.chdir(tmp_path)  # the names of sockets are short
        bound.bind("socket.json")
        os.fchdir(here)
        os.close(here)
        yield {
            tmp_path / "pipe.json": "is a pipe",
            tmp_path / "link.json": "is a pipe",
            tmp_path / "folder.json": "is a folder",
            tmp_path / "socket.json": "is a socket",
            tmp_path / "loop.json": "Too many levels",
            "/dev/zero": "is a device",
            f"{'a' * 5000}.json": "File name too long", "a\0.json": "null",
        }  # fmt: skip
    finally:
        bound.close()


def test_pipes_folders_devices_and_sockets_are_refused_at_once(no_files):
    for path, message in no_files.items():
        with pytest.raises(DataError, match=message):
            read_records(path)
        for module in (RequestDataModule, FactDataModule):
            data = module(str(path))
            with pytest.raises(DataError, match=message):
                data.setup()
        with pytest.raises((ConversionError, OptionError), match=message):
            convert_settings(str(path))
        with pytest.raises(OptionError, match=message):
            held_out_text(str(path))
    for path, message in list(no_files.items())[:4]:
        with pytest.raises(CorpusError, match=message):
            list(Corpus(str(path)).texts())


@pytest.mark.parametrize("name", ["json", "csv", "text", "parquet", "imagefolder", "JSON", "json/"])
def test_a_kind_of_file_is_no_data_set(tmp_path, monkeypatch, name):
    write(tmp_path, "mine.json", f"[{LINE}]")
    monkeypatch.chdir(tmp_path)
    for module in (RequestDataModule, FactDataModule):
        with pytest.raises(DataError, match=f"'{name}' is a kind of file, not a data set.*Give the file itself"):
            module(name).setup()
    with pytest.raises(CorpusError, match=f"corpus {name}: is a kind of file"):
        list(Corpus(name).texts())


def test_the_home_folder_is_found_in_data_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a.json", f"[{LINE}]")
    write(tmp_path, "text.txt", "Some words.")
    data = RequestDataModule("~/a.json")
    data.setup()
    assert len(data.requests) == 1
    assert list(Corpus("~/text.txt").texts()) == ["Some words."]
    assert held_out_text("~/text.txt") == "Some words."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.yaml",
            "alg_name: ROME\nlayers: [5]\nv_lr: 0.5\nlayers: [9]\n",
            r"a\.yaml, line 4: the key 'layers' occurs twice",
        ),
        (
            "a.json",
            '{"alg_name": "ROME",\n"layers": [5],\n"layers": [9]}',
            r"a\.json, line 3: the key 'layers' occurs twice",
        ),
        ("a.yaml", "layers: &a [*a]\n", "holds itself"),
        ("a.yaml", "v_lr: " + "[" * 3000, "more than 64 deep"),
        ("a.json", '{"v_lr": ' * 50_000, "too deep to be read"),
        ("a.json", '{"v_lr": ' + "9" * 5000 + "}", "has 5000 digits"),
        ("a.json", '{"v_lr": NaN}', "NaN is no JSON value"),
        ("a.yaml", b"\x1f\x8b\x08abc", "is compressed"),
    ],
)
def test_settings_of_other_projects_are_read_by_the_same_rules(tmp_path, name, content, message):
    with pytest.raises(ConversionError, match=message) as raised:
        convert_settings(str(write(tmp_path, name, content)))
    assert len(str(raised.value)) < 400 + len(str(tmp_path))


def test_corpora_are_read_by_the_same_rules(tmp_path):
    assert list(Corpus(str(write(tmp_path, "a.json", '[{"text": "one"}, {"n": 1}, {"text": "two"}]'))).texts()) == [
        "one",
        "two",
    ]
    with pytest.raises(CorpusError, match=r"b\.json, line 1: the key 'text' occurs twice"):
        list(Corpus(str(write(tmp_path, "b.json", '[{"text": "one", "text": "two"}]'))).texts())
    with pytest.raises(CorpusError, match="column 'text' holds no text"):
        list(Corpus(str(write(tmp_path, "c.json", '[{"a": "one"}]'))).texts())
    with pytest.raises(CorpusError, match="is compressed"):
        list(Corpus(str(write(tmp_path, "d.txt", b"\x1f\x8b\x08abc"))).texts())


def test_facts_are_read_by_the_same_rules(tmp_path):
    fact = {"prompt": "Rome is in", "subject": "Rome", "attribute": "Italy", "known_id": 0}
    filler = fact | {"prompt": "Oslo is in", "subject": "Oslo", "attribute": "<|endoftext|>", "known_id": 1}
    other = fact | {"prompt": "Lima is in", "subject": "Lima", "attribute": "Peru ", "known_id": 2}
    data = FactDataModule(str(write(tmp_path, "a.json", json.dumps([fact, filler, other]))))
    data.setup()
    assert [request.target_new for request in data.requests] == ["Peru", data.requests[1].target_new, "Italy"]
    assert data.requests[1].target_new in ("Italy", "Peru")
    twice = '[{"prompt": "Rome is in", "prompt": "b", "subject": "Rome", "attribute": "Italy"}]'
    with pytest.raises(DataError, match="the key 'prompt' occurs twice"):
        FactDataModule(str(write(tmp_path, "b.json", twice))).setup()
