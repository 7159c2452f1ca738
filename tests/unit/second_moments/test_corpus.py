import gc
import json
import os
import pickle

import pyarrow
import pytest
import torch
from datasets import Dataset
from pyarrow import csv, parquet

from rome_pl.model.language_model import LanguageModel
from rome_pl.second_moments.corpus import Corpus, CorpusError
from rome_pl.second_moments.generated_corpus import OPENERS, GeneratedCorpus, generated_texts
from rome_pl.utils.environment import cache_folder
from rome_pl.utils.restored_state import seeded
from tests.tiny import byte_level_tokenizer, tiny_language_model, tiny_model

# After an error the datasets library leaves its file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*table:ResourceWarning")

DOCUMENTS = ["The tide comes in\ntwice a day.", "Brød trenger tid. 東京", "  Nobody had seen the keeper."]


@pytest.fixture(autouse=True)
def private_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr("rome_pl.second_moments.generated_corpus.GENERATED_LENGTH", 48)


@pytest.fixture
def collected():
    """Collects garbage while this module's filter of warnings still holds."""
    yield
    gc.collect()


def plain(tmp_path, text, name="a.txt"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Corpus(str(path))


def write_table(path, columns):
    table = pyarrow.table(columns)
    if path.suffix in (".jsonl", ".json"):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())
        path.write_text("".join(lines), encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(table, path)
    elif path.suffix == ".csv":
        csv.write_csv(table, path)
    else:  # as datasets itself keeps it
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


# ---- plain text


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one\ntwo\nthree\n", ["one\n", "two\n", "three\n"]),
        ("one\ntwo", ["one\n", "two"]),
        ("one\ntwo\n\nthree\n", ["one\ntwo\n", "three\n"]),
        ("one\ntwo\n \t\n\nthree", ["one\ntwo\n", "three"]),
        ("\n\none\ntwo\n\n\n", ["one\n", "two\n"]),  # blank lines around the text part nothing
        ("one", ["one"]),
        ("\ufeffone\ntwo\n", ["one\n", "two\n"]),  # a mark that some editors put first
        ("one\r\n\r\ntwo\r\nthree\r\n", ["one\n", "two\nthree\n"]),
    ],
)
def test_plain_text_is_parted_at_blank_lines_or_else_at_every_line(text, documents, tmp_path):
    assert list(plain(tmp_path, text).texts()) == documents


def test_plain_text_is_read_again_each_time(tmp_path):
    corpus = plain(tmp_path, "one\ntwo\n")
    assert list(corpus.texts()) == list(corpus.texts()) == ["one\n", "two\n"]


@pytest.mark.parametrize("name", ["a.txt", "a", "a.md", "a.TXT", "[a]*.txt"])
def test_any_file_that_is_no_table_is_plain_text(name, tmp_path):
    assert list(plain(tmp_path, "one\ntwo\n", name).texts()) == ["one\n", "two\n"]


# ---- tables


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow", "csv", "JSONL"])
def test_tables_are_read_in_order_without_blank_records(kind, tmp_path):
    path = tmp_path / f"table.{kind.lower()}"
    write_table(path, {"number": [1, 2, 3, 4], "text": [DOCUMENTS[0], " \n", *DOCUMENTS[1:]]})
    path.rename(tmp_path / f"table.{kind}")
    corpus = Corpus(str(tmp_path / f"table.{kind}"))
    assert list(corpus.texts()) == DOCUMENTS
    assert list(corpus.texts()) == DOCUMENTS


def test_an_arrow_file_that_datasets_saved_is_read(tmp_path):
    Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(tmp_path / "saved")
    corpus = Corpus(str(tmp_path / "saved" / "*.arrow"))
    assert list(corpus.texts()) == DOCUMENTS


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "csv"])
def test_another_column_can_be_named(kind, tmp_path):
    path = tmp_path / f"table.{kind}"
    write_table(path, {"body": DOCUMENTS, "text": ["x", "y", "z"]})
    assert list(Corpus(str(path), column="body").texts()) == DOCUMENTS


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "csv"])
@pytest.mark.parametrize("column", ["nothing", "number"])
@pytest.mark.usefixtures("collected")
def test_a_column_without_text_is_refused_with_those_there_are(kind, column, tmp_path):
    path = tmp_path / f"table.{kind}"
    write_table(path, {"number": [1, 2], "body": DOCUMENTS[:2]})
    with pytest.raises(CorpusError) as caught:
        list(Corpus(str(path), column=column).texts())
    message = str(caught.value)
    assert str(path) in message
    assert f"column '{column}' holds no text; columns: ['body', 'number']" in message
    assert "data.column" in message


@pytest.mark.usefixtures("collected")
def test_a_damaged_table_is_named(tmp_path):
    for name in ("table.jsonl", "table.parquet", "table.arrow"):
        (tmp_path / name).write_bytes(b'{"text": "one"}\n{"text" [[[\n\x00\xff')
        with pytest.raises(CorpusError, match=name.replace(".", r"\.") + ": cannot be read"):
            list(Corpus(str(tmp_path / name)).texts())


# ---- several files


def test_a_pattern_reads_files_in_the_order_of_their_names(tmp_path):
    for number, name in enumerate(["b.txt", "a10.txt", "a2.txt", "c.md"]):
        (tmp_path / name).write_text(f"{number}\n", encoding="utf-8")
    (tmp_path / "d.txt").mkdir()
    corpus = Corpus(str(tmp_path / "*.txt"))
    assert [path.name for path in corpus.files] == ["a10.txt", "a2.txt", "b.txt"]
    assert list(corpus.texts()) == ["1\n", "2\n", "0\n"]


def test_a_pattern_may_mix_kinds_and_folders(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    (tmp_path / "x" / "a.txt").write_text("one\n", encoding="utf-8")
    write_table(tmp_path / "y" / "a.jsonl", {"text": ["two"]})
    assert list(Corpus(str(tmp_path / "**" / "a.*")).texts()) == ["one\n", "two"]


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    plain(tmp_path, "one\n")
    assert list(Corpus("~/a.txt").texts()) == ["one\n"]


# ---- bad input


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_a_file_of_no_bytes_is_refused_as_empty(name, tmp_path):
    with pytest.raises(CorpusError, match=name.replace(".", r"\.") + ": is empty; give a file with text"):
        list(plain(tmp_path, "", name).texts())


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "\n \n\t\n"), ("a.jsonl", '{"text": " "}\n{"text": ""}\n'), ("a.csv", "text,number\n")],
)
def test_a_file_without_text_is_refused_as_empty(name, content, tmp_path):
    with pytest.raises(CorpusError, match=name.replace(".", r"\.") + ": is empty; give a file with text"):
        list(plain(tmp_path, content, name).texts())


def test_an_empty_file_among_others_is_passed_over(tmp_path):
    plain(tmp_path, "", "a.jsonl")
    plain(tmp_path, '{"text": "one"}\n', "b.jsonl")
    assert list(Corpus(str(tmp_path / "*.jsonl")).texts()) == ["one"]


def test_a_folder_is_refused_with_the_pattern_to_give(tmp_path):
    with pytest.raises(CorpusError, match=r"is a folder; give a pattern of its files, such as .*/\*\.txt"):
        list(Corpus(str(tmp_path)).texts())
    with pytest.raises(CorpusError, match="is a folder"):
        _ = Corpus(str(tmp_path)).fingerprint  # would not know when a file in it changes


@pytest.mark.parametrize("where", ["start", "end"])
def test_a_file_that_is_not_utf8_is_refused_with_its_byte(where, tmp_path):
    filler = b"A line of text.\n\n" * 2000  # more than is decoded at once
    bad = "Élan".encode("latin-1")
    corpus = plain(tmp_path, bad + filler if where == "start" else filler + bad)
    with pytest.raises(CorpusError, match=r"a\.txt: not UTF-8 \(byte 0xc9\); save the file as UTF-8"):
        list(corpus.texts())


def test_a_table_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "Élan"}\n'.encode("latin-1"))
    with pytest.raises(CorpusError, match=r"a\.jsonl: cannot be read"):
        list(Corpus(str(tmp_path / "a.jsonl")).texts())


@pytest.mark.parametrize("source", ["nobody/nothing-like-this", "missing.txt", "missing/*.jsonl"])
def test_a_name_that_is_neither_file_nor_data_set_is_refused(source):
    with pytest.raises(CorpusError) as caught:
        list(Corpus(source).texts())
    message = str(caught.value)
    assert message.startswith(f"corpus {source}: no such file, and no data set of that name could be loaded")
    assert "offline?" in message


# ---- fingerprints


def test_a_fingerprint_depends_on_the_bytes_and_not_on_the_path(tmp_path):
    (tmp_path / "other").mkdir()
    one, same = plain(tmp_path, "one\n"), plain(tmp_path / "other", "one\n", "b.md")
    assert one.fingerprint == same.fingerprint
    assert Corpus(one.source, column="body").fingerprint == one.fingerprint  # there are no columns
    for changed in ("one", "One\n", "one\n\n", ""):
        assert plain(tmp_path / "other", changed).fingerprint != one.fingerprint


def test_the_fingerprint_of_a_table_depends_on_the_column(tmp_path):
    path = tmp_path / "a.jsonl"
    write_table(path, {"text": ["x"], "body": ["y"]})
    assert Corpus(str(path)).fingerprint != Corpus(str(path), column="body").fingerprint
    assert Corpus(str(path)).fingerprint == Corpus(str(path)).fingerprint


def test_the_fingerprint_of_a_pattern_depends_on_every_file_and_their_order(tmp_path):
    def fingerprint(**contents):
        folder = tmp_path / "-".join(f"{name}{len(text)}" for name, text in contents.items())
        folder.mkdir()
        for name, text in contents.items():
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        return Corpus(str(folder / "*.txt")).fingerprint

    found = [
        fingerprint(a="one", b="two2"),
        fingerprint(a="two2", b="one"),
        fingerprint(a="onetwo2"),
        fingerprint(a="one", b="two2", c=""),
    ]
    assert len(set(found)) == 4


def test_the_fingerprint_of_a_hub_data_set_is_what_names_it():
    names = [
        Corpus("wikimedia/wikipedia"),
        Corpus("wikimedia/wikipedia", subset="20231101.en"),
        Corpus("wikimedia/wikipedia", split="test"),
        Corpus("wikimedia/wikipedia", column="body"),
        Corpus("wikimedia/wikisource"),
    ]
    assert len({corpus.fingerprint for corpus in names}) == len(names)
    assert "wikimedia/wikipedia" in names[0].fingerprint


def test_a_corpus_travels_to_other_processes(tmp_path):
    corpus = plain(tmp_path, "one\n")
    copy = pickle.loads(pickle.dumps(corpus))
    assert copy == corpus
    assert list(copy.texts()) == ["one\n"]
    assert copy.fingerprint == corpus.fingerprint


# ---- what a model writes itself


def tokens_of(language_model, texts):
    return sum(len(ids) for ids in language_model.tokenizer(list(texts), add_special_tokens=False)["input_ids"])


def test_a_generated_corpus_depends_on_the_seed_alone(language_model):
    texts = list(generated_texts(language_model, 200, seed=1))
    assert texts == list(generated_texts(language_model, 200, seed=1))
    assert texts != list(generated_texts(language_model, 200, seed=2))
    with seeded(99, torch.device("cpu")):
        assert texts == list(generated_texts(language_model, 200, seed=1))


def test_more_tokens_continue_the_same_corpus(language_model):
    few, many = (list(generated_texts(language_model, tokens, seed=1)) for tokens in (200, 6000))
    assert many[: len(few)] == few
    assert len(many) > len(few)
    assert tokens_of(language_model, many) > 4000


def test_generating_leaves_the_global_generator_and_the_model_alone(language_model):
    state = torch.get_rng_state()
    language_model.model.train()
    list(generated_texts(language_model, 100, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert language_model.model.training
    assert all(parameter.requires_grad for parameter in language_model.model.parameters())


def test_the_sampling_options_of_a_checkpoint_do_not_bend_the_corpus(language_model):
    texts = list(generated_texts(language_model, 100, seed=1))
    for name, value in {"temperature": 0.1, "top_k": 1, "top_p": 0.2, "repetition_penalty": 3.0}.items():
        setattr(language_model.model.generation_config, name, value)
    assert list(generated_texts(language_model, 100, seed=1)) == texts


def test_generated_text_holds_neither_special_tokens_nor_what_follows_an_end():
    model = tiny_model("llama")
    language_model = LanguageModel(model, byte_level_tokenizer(bos=True))
    eos = language_model.tokenizer.eos_token_id
    with torch.no_grad():
        model.lm_head.weight[eos] = model.lm_head.weight.mean(0) * 3  # ends often
    texts = list(generated_texts(language_model, 500, seed=1))
    assert all(text.strip() for text in texts)
    assert not any(special in text for text in texts for special in ("<s>", "</s>", "<pad>"))
    assert len({len(text) for text in texts}) > 5


def test_a_model_that_ends_at_once_does_not_write_for_ever(language_model, monkeypatch):
    """Every text ends after its opening; what fills the rows is none."""
    calls = []

    def ends(input_ids, **_):
        calls.append(len(input_ids))
        return torch.cat([input_ids, torch.full((len(input_ids), 100), 2)], dim=1)

    monkeypatch.setattr(language_model.model, "generate", ends)
    texts = list(generated_texts(language_model, 10**4, seed=1))
    assert len(texts) == sum(calls) <= 20 * 10**4 / 100 + 32
    assert {text.strip() for text in texts} <= set(OPENERS)


def test_a_generated_corpus_is_written_once_and_known_before(language_model, monkeypatch):
    corpus = GeneratedCorpus.of(language_model, 300, seed=3)
    fingerprint = corpus.fingerprint
    assert not corpus.written
    assert language_model.fingerprint[:16] in fingerprint
    corpus.write(language_model)
    assert corpus.written
    assert corpus.source.startswith(str(cache_folder()))
    assert corpus.fingerprint == fingerprint
    assert list(corpus.texts()) == list(generated_texts(language_model, 300, seed=3))
    monkeypatch.setattr("rome_pl.second_moments.generated_corpus.generated_texts", pytest.fail)
    again = GeneratedCorpus.of(language_model, 300, seed=3)
    assert again == corpus
    again.write(language_model)


def test_generated_corpora_of_other_models_seeds_and_sizes_are_told_apart(language_model):
    other = tiny_language_model("llama", seed=5)
    corpora = [
        GeneratedCorpus.of(language_model, 300, seed=3),
        GeneratedCorpus.of(language_model, 300, seed=4),
        GeneratedCorpus.of(language_model, 301, seed=3),
        GeneratedCorpus.of(other, 300, seed=3),
    ]
    assert len({corpus.fingerprint for corpus in corpora}) == len({corpus.source for corpus in corpora}) == 4


def test_a_corpus_whose_writing_was_interrupted_is_not_there(language_model, monkeypatch):
    def interrupted(*_):
        yield "one"
        raise KeyboardInterrupt

    monkeypatch.setattr("rome_pl.second_moments.generated_corpus.generated_texts", interrupted)
    corpus = GeneratedCorpus.of(language_model, 300, seed=3)
    with pytest.raises(KeyboardInterrupt):
        corpus.write(language_model)
    assert not corpus.written
    assert os.listdir(cache_folder() / "corpora") == []  # noqa: PTH208
