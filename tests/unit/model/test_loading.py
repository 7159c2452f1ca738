"""Sources that cannot be loaded: every one is refused by one sentence, and nothing hangs or is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import pytest
import torch

from rome_pl.errors import RomeError, SourceError
from rome_pl.model.gguf import converted
from rome_pl.model.loading import load_encoder, load_language_model
from rome_pl.utils.environment import cache_folder
from tests.broken_models import BROKEN, broken
from tests.tiny import byte_level_tokenizer, tiny_model
from tests.tiny_gguf import write_gguf


class Hung(BaseException):
    pass


@pytest.fixture
def at_most_a_minute():
    def hung(*_):
        raise Hung

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    tiny_model("llama", torch.float32).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("at_most_a_minute")
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_refused_by_one_sentence(whole, tmp_path, fault):
    folder = broken(whole, tmp_path / "broken", fault)
    with pytest.raises(RomeError) as refusal:
        load_language_model(str(folder))
    assert "\n" not in str(refusal.value)
    with suppress(RomeError):  # it reads no weights, and has nothing against some of these
        load_encoder(str(folder))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("bitsandbytes", "holds quantised weights .quantization_config: bitsandbytes"),
        ("GPTQ", "holds quantised weights .quantization_config: gptq"),
        ("fp8", "holds quantised weights .quantization_config: fp8"),
        ("a kernel of the hub", "someone/kernel.*no such code runs here"),
        ("kernels by part", "someone/kernel.*no such code runs here"),
        ("an encoder-decoder", "is an encoder-decoder"),
        ("an adapter", "holds an adapter of PEFT.*merge_and_unload"),
        ("fewer layers", r"config.json says 2 layers, .* model\.layers\.2\."),
        ("weights of more layers", r"config.json says 3 layers, .* model\.layers\.3\."),
        ("a weight of another shape", "other shapes than config.json says"),
        ("unknown positions", "it names 'of_its_own', which transformers does not know"),
        ("number as text", "'hidden_size'.*expected int"),
        ("a weight is not a number", "down_proj.weight holds numbers that are not finite"),
        ("layers without end", "num_hidden_layers: 1000000000"),
        ("tokenizer is a pipe", "tokenizer.json is neither a file nor a folder"),
    ],
)
def test_the_sentence_says_what_is_wrong(whole, tmp_path, fault, reason):
    with pytest.raises(RomeError, match=reason):
        load_language_model(broken(whole, tmp_path / "broken", fault))


def test_a_named_attention_of_transformers_is_taken(whole, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in whole.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "config.json").read_text()) | {"attn_implementation": "eager"}
    (folder / "config.json").write_text(json.dumps(content))
    assert load_language_model(folder).model.config._attn_implementation == "eager"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError])
def test_interrupts_and_lack_of_memory_stay_what_they_are(whole, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(error):
        load_language_model(whole)


# GGUF


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    return path


def test_a_gguf_file_gives_its_weights(gguf):
    found = load_language_model(gguf)
    assert {weight.dtype for weight in found.model.parameters()} == {torch.float32}
    assert found.tokenizer("a")["input_ids"]


@pytest.mark.usefixtures("at_most_a_minute")
@pytest.mark.parametrize("share", [0, 0.0001, 0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999])
def test_a_cut_gguf_is_refused_and_leaves_nothing(gguf, share):
    content = gguf.read_bytes()
    gguf.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(SourceError, match="cannot be read as a GGUF model"):
        load_language_model(gguf)
    assert [path for path in cache_folder().rglob("*") if path.is_file()] == []


@pytest.mark.usefixtures("at_most_a_minute")
@pytest.mark.parametrize("at", [4, 8, 16, 24, 32, 40, 60, 100])
def test_a_damaged_gguf_header_is_refused(gguf, at):
    content = bytearray(gguf.read_bytes())
    content[at : at + 8] = b"\xff" * 8
    gguf.write_bytes(bytes(content))
    with pytest.raises(SourceError, match="cannot be read as a GGUF model"):
        load_language_model(gguf)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "empty config", "more"])
def test_a_damaged_conversion_is_made_anew(gguf, caplog, damage):
    folder = converted(gguf)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    path = folder / ("config.json" if damage == "empty config" else "model.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    if damage == "missing":
        path.unlink()
    elif damage == "more":
        (folder / "adapter_config.json").write_text("{}")
    else:
        path.write_bytes({"cut": content[:-40], "flipped": content, "empty config": b""}[damage])
    assert converted(gguf) == folder
    assert "damaged or not complete: it is repeated" in caplog.text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    caplog.clear()
    assert converted(gguf) == folder
    assert caplog.text == ""


def test_what_a_killed_conversion_left_is_removed_and_what_is_under_way_is_not(gguf):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    models = cache_folder() / "models"
    killed = models / f"other.unfinished-{socket.gethostname()}-{int(dead.stdout)}-1700000000-abc"
    reused = models / f"other.unfinished-{socket.gethostname()}-{os.getpid()}-1700000000-abc"
    elsewhere = models / f"other.unfinished-a-{socket.gethostname()}-{int(dead.stdout)}-1700000000-abc"
    for folder in (killed, reused, elsewhere):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"1")
    folder = converted(gguf)
    assert sorted(models.iterdir()) == sorted([elsewhere, folder])


@pytest.mark.parametrize("cache", ["/proc/nowhere", "/dev/null/cache", "file"])
def test_a_cache_that_cannot_be_made_is_named_before_the_conversion(gguf, tmp_path, monkeypatch, caplog, cache):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ROME_PL_CACHE", str(tmp_path / cache))
    with pytest.raises(SourceError, match=f"the cache {tmp_path / cache} cannot be made or written.*ROME_PL_CACHE"):
        load_language_model(gguf)
    assert "Converting" not in caplog.text


def test_an_adapter_beside_a_gguf_file_is_not_attached(gguf):
    (gguf.parent / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match="an adapter of PEFT lies beside it"):
        load_language_model(gguf)
