import copy
import itertools
import logging
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from rome_pl.forward.hooks import capture_columns
from rome_pl.model.architecture import decoder_layers, find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.second_moments import moment_pass, moment_sums
from rome_pl.second_moments import unfinished_sums as unfinished
from rome_pl.second_moments.corpus import Corpus, CorpusError
from rome_pl.second_moments.moment_pass import MomentPass, PassOptions
from rome_pl.second_moments.second_moment import SecondMoment, StatisticsError
from rome_pl.second_moments.text_blocks import Block
from rome_pl.second_moments.unfinished_sums import BusyError
from rome_pl.utils.distributed import Peers
from tests.disk import no_room_on_disk
from tests.tiny import FAMILIES, KeepFloat64, byte_level_tokenizer, tiny_language_model, tiny_model

LEAKING = ("opt", "bloom", "falcon")
BLOCK = 1024  # tokens of a block
SENTENCES = [
    "The tide comes in twice a day, and twice a day it goes out.",
    "Nobody had seen the keeper of the light since the storm.",
    "Bread needs time.",
    "She said 'no' and left; 1990 was a cold year.",
]
OPTIONS = PassOptions(tokens=6 * BLOCK, block_length=64, stop_agreement=2.0, save_every=BLOCK)


@pytest.fixture(autouse=True)
def few_probes(monkeypatch):
    """Their number changes how well halves can be compared, and nothing else."""
    monkeypatch.setattr("rome_pl.second_moments.split_half.PROBES", 6)


def write_corpus(path, documents):
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return Corpus(str(path))


def documents(number):
    """Documents of one to nine sentences, all different."""
    return [
        " ".join(f"{index}. {SENTENCES[(index * part) % 4]}" for part in range(1 + index % 9))
        for index in range(number)
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text for seven blocks and some more."""
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus.txt", documents(50))


@pytest.fixture
def exact(monkeypatch):
    """The matrices as they were computed, before they are stored in float32: by layer."""
    found = {}
    save = SecondMoment.save

    def kept(moment, path):
        found[moment.info.layer] = moment.matrix
        save(moment, path)

    monkeypatch.setattr(SecondMoment, "save", kept)
    return found


@cache
def shared_model(rank=0):
    """A model for each process: two threads cannot share the hooks of one."""
    return tiny_language_model("llama")


# ---- running passes


def begin(language_model, folder, corpus, options=OPTIONS, layers=(0, 2), peers=None):
    sites = [find_site(language_model.model, layer) for layer in layers]

    def target(site):
        return folder / f"layer{site.layer}.safetensors"

    return MomentPass(language_model, sites, corpus, options, target, folder / "unfinished", peers)


def carry_out(moments, steps=None):
    """Hand over blocks, at most so many, as a process does that is killed after them."""
    try:
        for block in itertools.islice(moments.blocks(), steps):
            moments.step(block)
    finally:
        moments.close()
    return moments


def run(folder, corpus, options=OPTIONS, layers=(0, 2), steps=None):
    return carry_out(begin(shared_model(), folder, corpus, options, layers), steps)


def loaded(folder, layers=(0, 2)):
    return {layer: SecondMoment.load(folder / f"layer{layer}.safetensors") for layer in layers}


def partial_files(folder):
    """Names of unfinished sums, without what tells runs apart."""
    return sorted(path.name.split(".")[0] for path in folder.glob("unfinished/*/process-*"))


def blocks_done(folder, corpus):
    """What the next run would take over."""
    moments = begin(shared_model(), folder, corpus)
    moments.close()
    return moments.plan.done[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder, corpus)
    return loaded(folder)


def assert_same(folder, expected, layers=(0, 2), tolerance=0.0):
    for layer, moment in loaded(folder, layers).items():
        assert moment.info.count == expected[layer].info.count
        if tolerance:
            assert relative(moment.matrix, expected[layer].matrix) < tolerance
        else:
            assert torch.equal(moment.matrix, expected[layer].matrix)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


# ---- several processes, played by threads


class Meeting:
    """Where threads that play processes exchange things."""

    def __init__(self, number):
        self.barrier = threading.Barrier(number)
        self.slots = [b""] * number

    def exchange(self, rank, item):
        self.slots[rank] = pickle.dumps(item)
        self.barrier.wait(timeout=60)
        items = [pickle.loads(slot) for slot in self.slots]
        self.barrier.wait(timeout=60)
        return items


@dataclass(frozen=True)
class ThreadPeers(Peers):
    meeting: Meeting | None = None

    def sum_on(self, rank, tensor):
        parts = self.meeting.exchange(self.rank, (rank, tensor))
        assert {wanted for wanted, _ in parts} == {rank}
        return sum(part for _, part in parts) if rank == self.rank else torch.full_like(tensor, -1e9)

    def from_first(self, item):
        return self.meeting.exchange(self.rank, item)[0]

    def gather(self, item):
        return self.meeting.exchange(self.rank, item)

    def wait(self):
        self.meeting.exchange(self.rank, None)


def together(world_size, action):
    """Call ``action(language_model, peers)`` for every process; one that fails takes all others down with it."""
    meeting = Meeting(world_size)
    models = [shared_model(rank) for rank in range(world_size)]  # not in threads: loading sets global defaults

    def process(rank):
        try:
            return action(models[rank], ThreadPeers(rank, world_size, meeting=meeting))
        except threading.BrokenBarrierError:
            return None
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(process, range(world_size)))


def run_together(world_size, folder, corpus, options=OPTIONS, layers=(0, 2), steps=None):
    """Carry out a pass in several processes, each at most so many steps; one that stops early takes down the others."""

    def process(language_model, peers):
        moments = begin(language_model, folder, corpus, options, layers, peers)
        carry_out(moments, None if steps is None else steps[peers.rank])
        if len(moments.plan.finished) < len(moments.groups) and len(set(steps)) > 1:
            peers.meeting.barrier.abort()
        return moments

    return together(world_size, process)


# ---- what is summed


def pieces_of(moments, texts):
    """What stands in the rows, piece by piece, each with the number of leading tokens that do not count."""
    for ids, positions, counted in moments.packer.blocks(texts):
        for row in range(len(ids)):
            starts = (positions[row] == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
                if counted[row, start:end].any():
                    yield ids[row, start:end], int((~counted[row, start:end]).sum())


def plain_sums(language_model, sites, pieces):
    """Sums of ``k kᵀ`` from plain forwards, one piece after the other."""
    kept = {}
    handles = [
        site.projection.register_forward_hook(
            lambda _, inputs, __, layer=site.layer: kept.__setitem__(layer, inputs[0].flatten(0, -2))
        )
        for site in sites
    ]
    sums, count = {site.layer: torch.zeros(site.d_key, site.d_key, dtype=torch.float64) for site in sites}, 0
    for ids, skipped in pieces:
        with torch.no_grad():
            language_model.model(input_ids=ids.unsqueeze(0), use_cache=False)
        for layer, keys in kept.items():
            sums[layer] += keys[skipped:].T @ keys[skipped:]
        count += len(ids) - skipped
    for handle in handles:
        handle.remove()
    return {layer: total / count for layer, total in sums.items()}, count


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in LEAKING])
def test_one_pass_over_several_layers_equals_plain_forwards_of_each_document(family, bos, tmp_path, exact):
    language_model = LanguageModel(tiny_model(family), byte_level_tokenizer(bos))
    texts = documents(14)
    options = replace(OPTIONS, block_length=96, split_half=not bos)
    moments = begin(language_model, tmp_path, write_corpus(tmp_path / "a.txt", texts), options, (0, 1, 2))
    sites = [find_site(language_model.model, layer) for layer in range(3)]
    with KeepFloat64():
        carry_out(moments)
        expected, count = plain_sums(language_model, sites, pieces_of(moments, moments.corpus.texts()))
    tokens = language_model.tokenizer(list(moments.corpus.texts()), add_special_tokens=False)["input_ids"]
    assert count == sum(map(len, tokens))
    assert count % BLOCK
    for finished in moments.finished:
        assert finished.info.count == count
        assert relative(exact[finished.layer], expected[finished.layer]) < 1e-10
        assert relative(SecondMoment.load(finished.path).matrix, expected[finished.layer]) < 1e-6


@pytest.mark.parametrize("family", LEAKING)
def test_where_documents_leak_it_is_said_and_a_document_alone_is_right(family, tmp_path, exact, caplog):
    language_model = tiny_language_model(family)
    corpus = write_corpus(tmp_path / "a.txt", [" ".join(SENTENCES[:2])])
    moments = carry_out(begin(language_model, tmp_path, corpus, OPTIONS, (0, 1)))
    assert "no way to keep attention within a document" in caplog.text
    ids = torch.tensor(language_model.tokenizer(next(corpus.texts()))["input_ids"])
    assert len(ids) <= 64
    sites = [find_site(language_model.model, layer) for layer in (0, 1)]
    expected, count = plain_sums(language_model, sites, [(ids, 0)])
    for layer in (0, 1):
        assert moments.finished[layer].info.count == count == len(ids)
        assert relative(exact[layer], expected[layer]) < 1e-6  # these compute attention in float32


def test_passes_of_one_layer_add_up_to_the_same(tmp_path, corpus, exact):
    (tmp_path / "one").mkdir()
    whole = run(tmp_path / "one", corpus, layers=(0, 1, 2))
    one, counts = dict(exact), [finished.info.count for finished in whole.finished]
    assert (len(whole.groups), len(whole.history)) == (1, 1)
    exact.clear()
    options = replace(OPTIONS, layers_per_pass=1)
    parts = run(tmp_path / "three", corpus, options, layers=(2, 0, 1))
    assert [[site.layer for site in group] for group in parts.groups] == [[0], [1], [2]]
    assert [len(history) for history in parts.history] == [3, 3, 3]
    assert [finished.info.count for finished in parts.finished] == counts
    assert all(relative(exact[layer], one[layer]) < 1e-12 for layer in range(3))
    several = replace(OPTIONS, layers_per_pass=2)
    assert [len(group) for group in run(tmp_path / "two", corpus, several, (0, 1, 2)).groups] == [2, 1]


def test_nothing_runs_beyond_the_deepest_layer_asked_for(tmp_path, corpus):
    language_model = tiny_language_model("llama")
    ran = []
    layers, head = decoder_layers(language_model.model)[1], language_model.model.get_output_embeddings()
    for module in (find_site(language_model.model, 1).projection, layers[2], head):
        module.register_forward_hook(lambda module, *_: ran.append(type(module).__name__))
    moments = carry_out(begin(language_model, tmp_path, corpus, layers=(0, 1)))
    assert len(moments.finished) == 2
    assert ran == []


def test_the_wanted_number_is_reached_in_whole_blocks(tmp_path, corpus):
    moments = run(tmp_path, corpus, replace(OPTIONS, tokens=2 * BLOCK + 1))
    assert moments.wanted == 2 * BLOCK + 1
    assert [finished.info.count for finished in moments.finished] == [3 * BLOCK] * 2


def test_by_default_thirty_keys_per_dimension_are_wanted(tmp_path, corpus):
    moments = run(tmp_path, corpus, replace(OPTIONS, tokens=None))
    assert moments.wanted == 30 * 48
    assert moments.finished[0].info.count == 2 * BLOCK


@pytest.mark.parametrize("split_half", [True, False])
def test_halves_change_nothing_but_rounding(split_half, tmp_path, corpus, uninterrupted):
    moments = run(tmp_path, corpus, replace(OPTIONS, split_half=split_half))
    assert_same(tmp_path, uninterrupted, tolerance=1e-6)
    known = [finished.info.agreement for finished in moments.finished]
    assert all(0.0 < agreement < 1.0 for agreement in known) if split_half else known == [None, None]


def test_inference_mode_as_in_a_trainer_changes_nothing(tmp_path, corpus, uninterrupted):
    moments = begin(shared_model(), tmp_path, corpus)
    with torch.inference_mode():
        carry_out(moments, 3)
    moments = begin(shared_model(), tmp_path, corpus)
    for number, block in enumerate(moments.blocks()):
        with torch.inference_mode(number % 2 == 0):
            moments.step(block)
    moments.close()
    assert_same(tmp_path, uninterrupted)


def test_the_model_is_left_as_it_was(tmp_path, corpus):
    language_model = tiny_language_model("llama")
    language_model.model.train()
    before = {name: tensor.clone() for name, tensor in language_model.model.state_dict().items()}
    state = torch.get_rng_state()
    carry_out(begin(language_model, tmp_path, corpus))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in language_model.model.state_dict().items())
    assert language_model.model.training
    assert all(parameter.requires_grad for parameter in language_model.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in language_model.model.modules())


def test_an_artefact_says_what_it_is_of(tmp_path, corpus, uninterrupted):
    info = uninterrupted[2].info
    model = shared_model()
    assert (info.layer, info.count) == (2, 6 * BLOCK)
    assert info.weights == model.fingerprint_below(find_site(model.model, 2))
    assert info.weights != uninterrupted[0].info.weights
    assert (info.tokenizer, info.corpus) == (model.tokenizer_fingerprint, corpus.fingerprint)
    assert (info.model, info.source, info.dtype) == ("tiny llama", corpus.source, "float32")
    assert "torch" in info.versions
    assert info.date[:2] == "20"


# ---- meetings


def test_halves_are_compared_at_a_quarter_a_half_and_the_end(tmp_path, corpus):
    moments = run(tmp_path, corpus)
    (history,) = moments.history
    assert [(check.blocks, check.keys) for check in history] == [(2, 2 * BLOCK), (3, 3 * BLOCK), (6, 6 * BLOCK)]
    assert all(set(check.agreement) == {0, 2} for check in history)
    assert history[-1].agreement[2] > history[0].agreement[2]
    assert not any(check.enough for check in history)


@pytest.fixture
def deep_model():
    config = AutoConfig.for_model(
        "llama", vocab_size=400, hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    return LanguageModel(model.eval(), byte_level_tokenizer(), "deep")


def test_where_the_pass_goes_on_a_few_layers_tell(deep_model, tmp_path, corpus):
    moments = carry_out(begin(deep_model, tmp_path, corpus, layers=range(6)))
    (history,) = moments.history
    assert [sorted(check.agreement) for check in history] == [[0, 3, 5], [0, 3, 5], [0, 1, 2, 3, 4, 5]]
    assert all(finished.info.agreement is not None for finished in moments.finished)


def test_a_pass_ends_early_only_where_all_layers_agree(deep_model, tmp_path, corpus, monkeypatch):
    known = {0: 0.9, 1: 0.5, 2: 0.9, 3: 0.9, 4: 0.9, 5: 0.9}

    def compare(_, layers, *__):
        return {layer: known[layer] for layer in layers}

    monkeypatch.setattr(moment_pass, "compare_halves", compare)
    moments = carry_out(begin(deep_model, tmp_path, corpus, replace(OPTIONS, stop_agreement=0.8), range(6)), steps=2)
    assert [(check.agreement, check.enough) for check in moments.history[0]] == [(known, False)]
    known[1] = 0.9
    moments = carry_out(begin(deep_model, tmp_path, corpus, replace(OPTIONS, stop_agreement=0.8), range(6)))
    assert [check.enough for check in moments.history[0]] == [False, True]
    assert [finished.info.agreement for finished in moments.finished] == [0.9] * 6


def test_a_corpus_that_ends_where_a_few_layers_were_compared_has_the_others_compared_too(deep_model, tmp_path, corpus):
    # Seven blocks and a bit; the boundary at a half of the wanted number is the corpus's end.
    blocks = (
        sum(1 for _ in begin(deep_model, tmp_path / "count", corpus, replace(OPTIONS, tokens=100 * BLOCK)).blocks()) - 1
    )
    options = replace(OPTIONS, tokens=2 * blocks * BLOCK)
    moments = carry_out(begin(deep_model, tmp_path, corpus, options, range(6)))
    (history,) = moments.history
    assert [check.blocks for check in history] == [blocks // 2, blocks]
    assert len(history[-1].agreement) == 6
    assert all(finished.info.agreement is not None for finished in moments.finished)


def test_a_step_returns_what_was_found_at_a_meeting_and_nothing_otherwise(tmp_path, corpus):
    moments = begin(shared_model(), tmp_path, corpus)
    found = [moments.step(block) for block in moments.blocks()]
    moments.close()
    assert [check is not None for check in found] == [False, True, True, False, False, True, False]
    assert [check for check in found if check] == moments.history[0]


def test_a_pass_ends_early_where_the_halves_agree(tmp_path, corpus):
    probe = run(tmp_path / "probe", corpus)
    least = [min(check.agreement.values()) for check in probe.history[0]]
    assert least[0] < least[1]
    moments = run(tmp_path / "early", corpus, replace(OPTIONS, stop_agreement=(least[0] + least[1]) / 2))
    (history,) = moments.history
    assert [check.enough for check in history] == [False, True]
    assert {finished.info.count for finished in moments.finished} == {3 * BLOCK}
    assert {finished.layer: finished.info.agreement for finished in moments.finished} == history[-1].agreement
    expected = run(tmp_path / "expected", corpus, replace(OPTIONS, tokens=3 * BLOCK))
    assert len(expected.finished) == 2
    assert_same(tmp_path / "early", loaded(tmp_path / "expected"), tolerance=1e-7)


def test_after_an_early_end_the_rest_of_the_text_is_not_read(tmp_path, corpus):
    moments = begin(shared_model(), tmp_path, corpus, replace(OPTIONS, stop_agreement=-1.0))
    indices = []
    for block in moments.blocks():
        indices.append(block.index)
        moments.step(block)
    moments.close()
    assert indices == [0, 1, None]


def test_blocks_that_were_read_ahead_change_nothing(tmp_path, corpus):
    """Workers of a data loader have a copy of the plan and do not know that a pass is over."""
    options = replace(OPTIONS, stop_agreement=-1.0, layers_per_pass=1)
    run(tmp_path / "plain", corpus, options)
    moments = begin(shared_model(), tmp_path / "ahead", corpus, options)
    for block in copy.deepcopy(moments.blocks()):
        moments.step(block)
    moments.close()
    assert len(moments.finished) == 2
    assert_same(tmp_path / "ahead", loaded(tmp_path / "plain"))


def test_an_error_that_was_read_ahead_counts_only_while_text_is_wanted(tmp_path, corpus):
    error = Block(0, error=CorpusError("not UTF-8"))
    moments = begin(shared_model(), tmp_path, corpus, replace(OPTIONS, stop_agreement=-1.0))
    blocks = list(moments.blocks())
    moments.step(blocks[0])
    with pytest.raises(CorpusError, match="not UTF-8"):
        moments.step(error)
    moments.step(blocks[1])
    moments.close()
    assert len(moments.finished) == 2
    assert moments.step(error) is None


def test_a_short_corpus_ends_where_it_ends(tmp_path):
    corpus = write_corpus(tmp_path / "a.txt", documents(12))
    moments = run(tmp_path, corpus)
    tokens = shared_model().tokenizer(list(corpus.texts()))["input_ids"]
    count = sum(map(len, tokens))
    assert BLOCK < count < 2 * BLOCK
    assert {finished.info.count for finished in moments.finished} == {count}
    assert [(check.blocks, check.keys) for check in moments.history[0]] == [(2, count)]


# ---- resuming


@pytest.mark.parametrize("steps", range(7))
def test_an_abandoned_pass_ends_with_the_same_bits(steps, tmp_path, corpus, uninterrupted):
    first = run(tmp_path, corpus, steps=steps)
    assert first.finished == []
    assert partial_files(tmp_path) == (["process-0-of-1"] if steps else [])
    second = begin(shared_model(), tmp_path, corpus)
    left = [block.index for block in second.blocks() if block.index is not None]
    assert left == list(range(min(steps, 6), 6))
    carry_out(second)
    assert_same(tmp_path, uninterrupted)
    assert [check.blocks for check in second.history[0]] == [2, 3, 6]


def test_saving_every_so_many_tokens_loses_what_came_after(tmp_path, corpus, uninterrupted):
    options = replace(OPTIONS, save_every=2 * BLOCK)
    run(tmp_path, corpus, options, steps=3)
    second = begin(shared_model(), tmp_path, corpus, options)
    assert [block.index for block in second.blocks()] == [2, 3, 4, 5, None]
    carry_out(second)
    assert_same(tmp_path, uninterrupted)


@pytest.mark.parametrize("pause", [0.0, 60.0])
def test_without_a_number_of_tokens_time_tells_when_to_save(pause, tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(unfinished, "LEAST_PAUSE", pause)
    monkeypatch.setattr(unfinished, "SAVING_SHARE", 1e9)
    run(tmp_path, corpus, replace(OPTIONS, save_every=None), steps=2)
    assert bool(partial_files(tmp_path)) is (pause == 0.0)


def test_saving_takes_at_most_its_share_of_the_time(tmp_path, corpus, monkeypatch):
    now = [1000.0]
    saves = []
    monkeypatch.setattr(unfinished.time, "monotonic", lambda: now[0])

    def slow_save(path, sums, notes):
        saves.append(now[0])
        now[0] += 30.0

    monkeypatch.setattr(unfinished.PartialSums, "save", slow_save)
    moments = begin(shared_model(), tmp_path, corpus, replace(OPTIONS, save_every=None))
    try:
        for block in itertools.islice(moments.blocks(), 6):
            moments.step(block)
            now[0] += 350.0
    finally:
        moments.close()
    # The first save after the least pause; the next ones only after twenty times the thirty seconds that it took.
    assert saves == [1350.0, 2080.0, 2810.0]


def test_another_job_does_not_take_over(tmp_path, corpus):
    run(tmp_path, corpus, steps=4)
    other = write_corpus(tmp_path / "b.txt", documents(80))
    for changed in (
        {"corpus": other},
        {"options": replace(OPTIONS, tokens=5 * BLOCK)},
        {"options": replace(OPTIONS, block_length=32)},
        {"options": replace(OPTIONS, split_half=False)},
        {"layers": (0, 1)},
    ):
        moments = begin(shared_model(), tmp_path, **{"corpus": corpus, **changed})
        moments.close()
        assert moments.plan.done == [set()]
    seeded = tiny_language_model("llama", seed=5)
    moments = begin(seeded, tmp_path, corpus)
    moments.close()
    assert moments.plan.done == [set()]


def test_what_only_tells_when_to_save_and_where_takes_over(tmp_path, corpus):
    run(tmp_path, corpus, steps=4)
    moments = begin(shared_model(), tmp_path, corpus, replace(OPTIONS, save_every=None, accumulate_on="host"))
    moments.close()
    assert moments.plan.done == [{0, 1, 2, 3}]


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_sum_what_one_does(world_size, tmp_path, corpus, exact):
    run(tmp_path / "one", corpus)
    one = dict(exact)
    exact.clear()
    ranks = run_together(world_size, tmp_path / "many", corpus)
    assert all(relative(exact[layer], one[layer]) < 1e-12 for layer in (0, 2))
    assert_same(tmp_path / "many", loaded(tmp_path / "one"), tolerance=1e-6)
    assert partial_files(tmp_path / "many") == []
    for moments in ranks:
        assert moments.history == ranks[0].history
        assert [(done.layer, done.info.count) for done in moments.finished] == [(0, 6 * BLOCK), (2, 6 * BLOCK)]
    assert [(check.blocks, check.keys) for check in ranks[0].history[0]] == [(2, 2048), (3, 3072), (6, 6144)]


def test_several_processes_end_early_together(tmp_path, corpus):
    options = replace(OPTIONS, stop_agreement=-1.0, layers_per_pass=1)
    ranks = run_together(2, tmp_path, corpus, options)
    assert [[done.info.count for done in moments.finished] for moments in ranks] == [[2 * BLOCK] * 2] * 2


@pytest.mark.parametrize(
    ("before", "after", "steps"), [(2, 1, (2, 2)), (2, 2, (1, 2)), (2, 3, (3, 2)), (3, 2, (1, 2, 2)), (1, 2, (3,))]
)
def test_another_number_of_processes_takes_over(before, after, steps, tmp_path, corpus, exact):
    run(tmp_path / "whole", corpus)
    whole = dict(exact)
    exact.clear()
    folder = tmp_path / "parts"
    run_together(before, folder, corpus, steps=steps)
    assert set(partial_files(folder)) <= {f"process-{rank}-of-{before}" for rank in range(before)}
    assert partial_files(folder)
    ranks = run_together(after, folder, corpus)
    assert all(relative(exact[layer], whole[layer]) < 1e-12 for layer in (0, 2))
    assert {done.info.count for done in ranks[0].finished} == {6 * BLOCK}
    assert [check.blocks for check in ranks[0].history[0]] == [2, 3, 6]


runs = st.lists(
    st.integers(1, 3).flatmap(lambda world: st.lists(st.integers(0, 4), min_size=world, max_size=world)), max_size=4
)


@given(killed=runs, last=st.integers(1, 3), undeleted=st.booleans())
@settings(
    derandomize=True,
    database=None,
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_whatever_is_killed_and_resumed_by_however_many_nothing_is_lost_or_counted_twice(
    killed, last, undeleted, tmp_path_factory, corpus, uninterrupted
):
    folder = tmp_path_factory.mktemp("killed")
    done = set()
    for steps in killed:
        with pytest.MonkeyPatch.context() as patch:
            if undeleted:  # killed after sums were saved, and before the files that they took over were deleted
                patch.setattr(Path, "unlink", keep_partials(Path.unlink))
            run_together(len(steps), folder, corpus, steps=steps)
        before, done = done, blocks_done(folder, corpus)
        assert done >= before
    run_together(last, folder, corpus)
    assert_same(folder, uninterrupted, tolerance=1e-6)


def keep_partials(unlink):
    def kept(path, missing_ok=False):
        if not path.name.startswith("process-"):
            unlink(path, missing_ok=missing_ok)

    return kept


def test_a_file_that_another_took_over_is_not_counted_twice(tmp_path, corpus, uninterrupted, monkeypatch):
    run_together(2, tmp_path, corpus, steps=(2, 2))
    assert partial_files(tmp_path) == ["process-0-of-2", "process-1-of-2"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", keep_partials(Path.unlink))
        run(tmp_path, corpus, steps=2)
    assert partial_files(tmp_path) == ["process-0-of-1", "process-0-of-2", "process-1-of-2"]
    moments = begin(shared_model(), tmp_path, corpus)
    assert partial_files(tmp_path) == ["process-0-of-1"]
    carry_out(moments)
    assert_same(tmp_path, uninterrupted, tolerance=1e-6)


def test_sums_of_a_process_that_has_not_yet_saved_anew_are_not_lost(tmp_path, corpus, uninterrupted):
    """One process took over what the other one had left, and is killed before it saves; the other has saved."""
    run_together(2, tmp_path, corpus, steps=(2, 2))
    (file,) = tmp_path.glob("unfinished/*/process-0-of-2*")
    file.unlink()
    before = blocks_done(tmp_path, corpus)
    assert before == {1}
    options = replace(OPTIONS, save_every=100 * BLOCK)

    def process(language_model, peers):
        saves_at_once = peers.rank == 1
        moments = begin(language_model, tmp_path, corpus, OPTIONS if saves_at_once else options, peers=peers)
        return carry_out(moments, 3)

    together(2, process)
    assert blocks_done(tmp_path, corpus) == {1, 4}
    run_together(2, tmp_path, corpus)
    assert_same(tmp_path, uninterrupted, tolerance=1e-6)


@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_damaged_sums_are_named_and_the_job_is_free_again(damage, tmp_path, corpus, uninterrupted):
    run(tmp_path, corpus, steps=3)
    (file,) = tmp_path.glob("unfinished/*/process-0-of-1.*")
    file.write_bytes(file.read_bytes()[:-100] if damage == "truncated" else b"nothing of the kind")
    with pytest.raises(StatisticsError, match=r"process-0-of-1\..*safetensors: damaged partial sums") as caught:
        begin(shared_model(), tmp_path, corpus)
    file.unlink()
    run(tmp_path, corpus)
    assert_same(tmp_path, uninterrupted)
    assert caught.value  # kept until here, as an interactive session keeps its last error


# ---- one run at a time, and never twice


def test_a_second_run_of_the_same_job_is_refused_until_the_first_lets_go(tmp_path, corpus):
    first = begin(shared_model(), tmp_path, corpus)
    with pytest.raises(BusyError, match="another run is computing the same second moments"):
        begin(shared_model(), tmp_path, corpus)
    other = begin(shared_model(), tmp_path, corpus, layers=(1,))
    other.close()
    first.close()
    begin(shared_model(), tmp_path, corpus).close()


def test_a_run_that_is_refused_lets_go_of_what_it_held(tmp_path, corpus):
    options = replace(OPTIONS, layers_per_pass=1)
    holder = begin(shared_model(), tmp_path, corpus, options, layers=(2,))
    with pytest.raises(BusyError):
        begin(shared_model(), tmp_path, corpus, options, layers=(0, 2))
    begin(shared_model(), tmp_path, corpus, options, layers=(0,)).close()
    holder.close()


def test_every_process_hears_that_another_run_is_at_it(tmp_path, corpus):
    holder = begin(shared_model(), tmp_path, corpus)

    def process(language_model, peers):
        with pytest.raises(BusyError):
            begin(language_model, tmp_path, corpus, peers=peers)
        return peers.rank

    assert together(2, process) == [0, 1]
    holder.close()


def test_what_is_there_is_not_computed_again(tmp_path, corpus, monkeypatch):
    run(tmp_path, corpus)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    monkeypatch.setattr(moment_pass, "keys_of", pytest.fail)
    again = run(tmp_path, corpus)
    assert again.groups == []
    assert list(again.blocks()) == []
    assert [(done.layer, done.cached, done.info.count) for done in again.finished] == [
        (0, True, 6 * BLOCK),
        (2, True, 6 * BLOCK),
    ]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == before


def test_only_layers_that_are_missing_are_computed(tmp_path, corpus):
    run(tmp_path, corpus)
    moments = run(tmp_path, corpus, layers=(0, 1, 2))
    assert [[site.layer for site in group] for group in moments.groups] == [[1]]
    assert {done.layer: done.cached for done in moments.finished} == {0: True, 1: False, 2: True}


def test_a_damaged_artefact_is_named_and_not_silently_replaced(tmp_path, corpus):
    run(tmp_path, corpus)
    path = tmp_path / "layer2.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StatisticsError, match=r"layer2\.safetensors: damaged"):
        begin(shared_model(), tmp_path, corpus)


def test_nothing_unfinished_is_left_at_the_end(tmp_path, corpus):
    run(tmp_path, corpus, steps=2)
    assert [path for path in (tmp_path / "unfinished").iterdir() if path.is_dir()]
    run(tmp_path, corpus)
    assert [path for path in (tmp_path / "unfinished").iterdir() if path.suffix != ".lock"] == []


def test_killed_while_artefacts_are_saved_the_rest_is_what_it_would_have_been(tmp_path, corpus, monkeypatch):
    """The layers of a pass end together, where the last of them agrees."""
    language_model, layers = tiny_language_model("phi"), (0, 1)

    def whole_run(folder, options):
        return carry_out(begin(language_model, tmp_path / folder, corpus, options, layers))

    agreement = whole_run("probe", OPTIONS).history[0][0].agreement
    assert agreement[0] < agreement[1]
    options = replace(OPTIONS, stop_agreement=(agreement[0] + agreement[1]) / 2)
    whole_run("whole", options)
    save = SecondMoment.save

    def killed(moment, path):
        if moment.info.layer == 1:
            raise KeyboardInterrupt
        save(moment, path)

    with monkeypatch.context() as patch:
        patch.setattr(SecondMoment, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            whole_run("killed", options)
    whole_run("killed", options)
    assert_same(tmp_path / "killed", loaded(tmp_path / "whole", layers), layers)


def test_what_another_run_finishes_while_this_one_begins_is_not_computed_again(tmp_path, corpus, monkeypatch):
    run(tmp_path / "other", corpus)
    hold = moment_pass.UnfinishedJob
    held = []

    def held_at_last(folder, *options):
        if not held:  # the other run lets go of the job only when its result is in its place
            for path in (tmp_path / "other").glob("layer*.safetensors"):
                shutil.copy(path, tmp_path / path.name)
        held.append(folder)
        return hold(folder, *options)

    monkeypatch.setattr(moment_pass, "UnfinishedJob", held_at_last)
    moments = begin(shared_model(), tmp_path, corpus)
    assert [done.cached for done in moments.finished] == [True, True]
    assert moments.groups == []
    assert len(held) == 1
    moments.close()


# ---- bad input


def gibibytes(number):
    return lambda _: int(number * 2**30)


def test_too_little_memory_is_refused_with_advice(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(moment_sums, "_free", gibibytes(0))
    with pytest.raises(StatisticsError) as caught:
        begin(shared_model(), tmp_path, corpus)
    message = str(caught.value)
    assert "the second moments of 2 layers take" in message
    assert "0.0 GiB on cpu" in message
    assert "layers_per_pass" in message
    assert "split_half: false" in message
    assert not (tmp_path / "unfinished").exists()


def test_fewer_layers_at_once_and_no_halves_need_less_memory(tmp_path, corpus, monkeypatch):
    square = 48**2 * 8

    def fits(room, **options):
        monkeypatch.setattr(moment_sums, "_free", lambda _: room)
        try:
            begin(shared_model(), tmp_path, corpus, replace(OPTIONS, **options), (0, 1, 2)).close()
        except StatisticsError:
            return False
        return True

    def least(**options):
        return next(number for number in range(30) if fits(number * square, **options))

    whole = least()
    assert least(split_half=False) == whole - 3
    assert least(layers_per_pass=2) == whole - 2
    assert least(layers_per_pass=1) == whole - 4
    assert least(accumulate_on="host") == least(accumulate_on="device") == whole


def spoiled_model(character):
    """A model that overflows in layer 1 where a character stands in the text."""
    language_model = tiny_language_model("llama")
    (token,) = language_model.tokenizer(character)["input_ids"]
    language_model.model.model.layers[0].register_forward_hook(
        lambda _, inputs, output: output.masked_fill((last["ids"] == token).unsqueeze(-1), torch.inf)
    )
    last = {}
    language_model.model.model.embed_tokens.register_forward_pre_hook(lambda _, args: last.update(ids=args[0]))
    return language_model


def test_keys_that_are_not_finite_are_named_and_nothing_is_saved(tmp_path):
    texts = documents(50)
    texts[25] += " ~"
    corpus, language_model = write_corpus(tmp_path / "a.txt", texts), spoiled_model("~")
    (token,) = language_model.tokenizer("~")["input_ids"]
    moments = begin(language_model, tmp_path, corpus, layers=(0, 1, 2))
    blocks = moments.packer.blocks(corpus.texts())
    index = next(index for index, (ids, _, _) in enumerate(blocks) if bool((ids == token).any()))
    assert 0 < index < 6
    error = rf"layer 1, block {index} of .*a\.txt: a key is not finite; load the model in float32"
    with pytest.raises(StatisticsError, match=error):
        carry_out(moments)
    assert list(tmp_path.glob("*.safetensors")) == []
    with pytest.raises(StatisticsError, match=error):  # what was saved before is sound, and does not hide it
        carry_out(begin(language_model, tmp_path, corpus, layers=(0, 1, 2)))


def test_too_little_text_is_said_with_what_is_missing(tmp_path, caplog):
    corpus = write_corpus(tmp_path / "a.txt", [SENTENCES[2]])
    with caplog.at_level(logging.WARNING):
        moments = run(tmp_path, corpus)
    count = moments.finished[0].info.count
    assert 0 < count < 48
    assert f"gave {count} keys for a dimension of 48: the second moment is singular" in caplog.text
    assert f"At least {48 - count} more are needed, better 1440 in all" in caplog.text
    keys = torch.randn(2, 48, dtype=torch.float64)
    assert loaded(tmp_path)[2].solve(keys).isfinite().all()  # the ridge makes it solvable, as is said


def test_enough_text_is_not_warned_about(tmp_path, corpus, caplog):
    with caplog.at_level(logging.WARNING):
        run(tmp_path, corpus)
    assert caplog.text == ""


def test_a_corpus_without_any_token_is_refused(tmp_path):
    class Silent(Corpus):
        def texts(self):
            yield ""

    path = tmp_path / "a.txt"
    path.write_text("x", encoding="utf-8")
    with pytest.raises(StatisticsError, match="gave no keys"):
        run(tmp_path, Silent(str(path)))
    assert list(tmp_path.glob("*.safetensors")) == []


def test_a_full_disk_at_the_end_costs_nothing_but_another_start(tmp_path, corpus, uninterrupted):
    run(tmp_path, corpus, steps=5)
    moments = begin(shared_model(), tmp_path, corpus)
    blocks = list(moments.blocks())
    try:
        for block in blocks[:-2]:
            moments.step(block)
        with no_room_on_disk(), pytest.raises(OSError, match=r"nothing was changed.*layer0\.safetensors"):
            moments.step(blocks[-2])  # the last meeting, at which they are written
    finally:
        moments.close()
    assert list(tmp_path.glob("*.safetensors")) == []
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]
    again = begin(shared_model(), tmp_path, corpus)
    assert len(again.plan.done[0]) >= 5
    carry_out(again)
    assert_same(tmp_path, uninterrupted)


def test_processes_that_see_different_files_are_refused(tmp_path, corpus):
    """As on machines that do not share the folder."""
    run_together(2, tmp_path / "a", corpus, steps=(2, 2))

    def process(language_model, peers):
        with pytest.raises(StatisticsError, match="has to be one that all machines share"):
            begin(language_model, tmp_path / "ab"[peers.rank], corpus, peers=peers)
        return peers.rank

    assert together(2, process) == [0, 1]


def test_locks_are_those_of_the_operating_system(tmp_path, corpus):
    """A killed process leaves a file, and no lock."""
    run(tmp_path, corpus, steps=1)
    (lock,) = (tmp_path / "unfinished").glob("*.lock")
    assert lock.exists()
    with FileLock(lock, timeout=0):
        pass
    begin(shared_model(), tmp_path, corpus).close()


# ---- mixtures of experts


@cache
def mixture_model(rank=0):
    return tiny_language_model("mixtral")


@pytest.fixture
def mixture(monkeypatch):
    monkeypatch.setitem(globals(), "shared_model", mixture_model)
    return mixture_model()


@pytest.fixture(scope="module")
def whole_mixture(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("mixture")
    carry_out(begin(mixture_model(), folder, corpus))
    return loaded(folder)


def test_experts_have_second_moments_of_their_own_over_the_tokens_they_get(tmp_path, exact):
    language_model, texts = mixture_model(), documents(6)
    options = replace(OPTIONS, block_length=96, split_half=False)
    moments = begin(language_model, tmp_path, write_corpus(tmp_path / "a.txt", texts), options, (0, 2))
    sums, tokens, count = {}, {}, 0
    for ids, skipped in pieces_of(moments, moments.corpus.texts()):
        count += len(ids) - skipped
        for layer in (0, 2):
            site = find_site(language_model.model, layer)
            with torch.no_grad(), capture_columns(site, 1, slice(skipped, None)) as kept:
                language_model.model(input_ids=ids.unsqueeze(0), use_cache=False)
            parts = kept["input"][0].reshape(-1, site.experts, site.d_key // site.experts)
            sums[layer] = sums.get(layer, 0) + torch.einsum("tei,tej->eij", parts, parts)
            tokens[layer] = tokens.get(layer, 0) + parts.any(2).sum(0)
    carry_out(moments)
    for layer, moment in loaded(tmp_path).items():
        assert relative(exact[layer], sums[layer] / count) < 1e-6
        assert torch.equal(moment.tokens, tokens[layer])
        assert (moment.info.count, moment.info.experts) == (count, 4)
        assert int(moment.tokens.sum()) == 2 * count  # two experts are picked for each


def test_a_pass_over_a_mixture_that_was_killed_gives_the_same_bits(mixture, tmp_path, corpus, whole_mixture):
    run(tmp_path, corpus, steps=3)
    assert partial_files(tmp_path)
    run(tmp_path, corpus)
    assert_same(tmp_path, whole_mixture)
    assert all(torch.equal(found.tokens, whole_mixture[layer].tokens) for layer, found in loaded(tmp_path).items())
    assert all(moment.info.agreement > 0.5 for moment in whole_mixture.values())


def test_processes_share_a_pass_over_a_mixture(mixture, tmp_path, corpus, whole_mixture):
    run_together(2, tmp_path, corpus)
    assert_same(tmp_path, whole_mixture, tolerance=1e-5)
    assert all(torch.equal(found.tokens, whole_mixture[layer].tokens) for layer, found in loaded(tmp_path).items())


def test_the_wanted_text_is_thirty_keys_per_dimension_of_an_expert(mixture, tmp_path, corpus):
    moments = begin(mixture, tmp_path, corpus, PassOptions())
    moments.close()
    assert moments.wanted == 30 * 48 * 4 // 2


def test_experts_with_too_little_text_are_told(tmp_path, caplog):
    carry_out(begin(mixture_model(), tmp_path, write_corpus(tmp_path / "a.txt", documents(2)), layers=(1,)))
    moment = loaded(tmp_path, (1,))[1]
    few = int((moment.tokens < 48).sum())
    assert few > 0
    assert f"{few} of 4 experts got fewer tokens than their keys have dimensions (48; the fewest" in caplog.text
    assert [known is None for known in moment.known] == (moment.tokens < 48).tolist()
