from functools import cache, partial
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from rome_pl.encoding.text_encoder import leading_tokens
from rome_pl.errors import OptionError
from rome_pl.second_moments.corpus import Corpus, CorpusError
from rome_pl.second_moments.text_blocks import Block, BlockStream, Packer, Plan
from tests.tiny import byte_level_tokenizer, sentencepiece_tokenizer

TOKENIZERS = {
    "byte level": byte_level_tokenizer,
    "byte level, BOS": partial(byte_level_tokenizer, bos=True),
    "sentencepiece": sentencepiece_tokenizer,
}
PAD = 7  # a token that texts also have: nothing may take it for padding


@cache
def tokenizer(name):
    return TOKENIZERS[name]()


def property_test(examples=60):
    return settings(derandomize=True, database=None, max_examples=examples, deadline=None)


texts = st.lists(st.text("ab cé.🙂\n", max_size=60), max_size=8)
names = st.sampled_from(list(TOKENIZERS))


def packer(name, rows, length):
    return Packer(tokenizer(name), rows, length, PAD, leading_tokens(tokenizer(name)))


def packed(name, some, rows, length):
    return list(packer(name, rows, length).blocks(some))


def tokens_of(name, some):
    return [ids for text in some for ids in tokenizer(name)(text, add_special_tokens=False)["input_ids"]]


def lines(blocks):
    """Every row of every block: its ids, positions, and whether tokens count."""
    return [tuple(tensor[row].tolist() for tensor in block) for block in blocks for row in range(len(block[0]))]


# ---- leading tokens


def test_leading_tokens_are_what_a_tokenizer_puts_before_a_text():
    assert [leading_tokens(tokenizer(name)) for name in TOKENIZERS] == [(), (1,), (1,)]


def test_tokens_put_after_a_text_do_not_lead():
    def closes(text, return_special_tokens_mask):
        return {"input_ids": [1, 5, 4, 2], "special_tokens_mask": [1, 1, 0, 1]}

    assert leading_tokens(closes) == (1, 5)


# ---- packing


@given(name=names, some=texts, rows=st.integers(1, 3), length=st.integers(2, 40))
@property_test()
def test_every_token_of_the_text_is_counted_once_and_in_order(name, some, rows, length):
    blocks = packed(name, some, rows, length)
    assert all(tensor.shape == (rows, length) for block in blocks for tensor in block)
    assert all((ids.dtype, counted.dtype) == (torch.int64, torch.bool) for ids, _, counted in blocks)
    counted = [token for ids, _, counts in lines(blocks) for token, count in zip(ids, counts, strict=True) if count]
    assert counted == tokens_of(name, some)


@given(name=names, some=texts, rows=st.integers(1, 3), length=st.integers(2, 40))
@property_test()
def test_only_the_end_is_padded(name, some, rows, length):
    """A row may lack what is too little for what opens a piece and one token more."""
    lead = list(leading_tokens(tokenizer(name)))
    blocks = lines(packed(name, some, rows, length))
    last = max((number for number, (_, _, counts) in enumerate(blocks) if any(counts)), default=-1)
    assert len(blocks) - last - 1 < rows
    for number, (ids, _, counts) in enumerate(blocks):
        padding = length - 1 - max((index for index, count in enumerate(counts) if count), default=-1)
        assert ids[length - padding :] == [PAD] * padding
        assert number >= last or padding <= len(lead)
        inside = [token for token, count in zip(ids[: length - padding], counts, strict=False) if not count]
        assert set(inside) <= set(lead)


@given(name=names, some=texts, rows=st.integers(1, 3), length=st.integers(2, 40))
@property_test()
def test_every_piece_opens_as_the_tokenizer_opens_a_text_and_counts_positions_from_there(name, some, rows, length):
    lead = list(leading_tokens(tokenizer(name)))
    tokens = [len(tokens_of(name, [text])) for text in some]
    ends = set(accumulate(tokens))
    seen = 0
    for ids, positions, counts in lines(packed(name, some, rows, length)):
        starts = [column for column, position in enumerate(positions) if position == 0]
        assert starts[0] == 0
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            assert positions[start:end] == list(range(end - start))
            if not any(counts[start:end]):
                assert ids[start:end] == [PAD] * (end - start)
                continue
            assert ids[start : start + len(lead)] == lead
            assert counts[start:end] == [False] * len(lead) + [True] * (end - start - len(lead))
            before, seen = seen, seen + sum(counts[start:end])
            # A piece lies within one document, and ends where that or the row does.
            assert not any(before < document < seen for document in ends)
            assert seen in ends or end == length
    assert seen == sum(tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_document_longer_than_many_rows_goes_on_from_row_to_row(name):
    text = "The tide comes in twice a day. " * 40
    lead, tokens = list(leading_tokens(tokenizer(name))), tokens_of(name, [text])
    blocks = packed(name, [text, "End."], 2, 16)
    assert len(blocks) > 10
    room = 16 - len(lead)
    for number, (ids, positions, _) in enumerate(lines(blocks)[: len(tokens) // room]):
        assert ids == [*lead, *tokens[number * room : (number + 1) * room]]
        assert positions == list(range(16))


def test_a_document_that_ends_with_its_row_leaves_none_empty():
    tokens = tokenizer("byte level")("a b c d e f g h", add_special_tokens=False)["input_ids"]
    blocks = packed("byte level", ["a b c d e f g h"] * 3, 1, len(tokens))
    assert [ids.tolist() for ids, _, _ in blocks] == [[tokens]] * 3
    assert all(counted.all() for _, _, counted in blocks)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_text_gives_no_block(name):
    assert packed(name, [], 2, 8) == packed(name, ["", ""], 2, 8) == []


def test_many_texts_are_tokenised_in_small_lots_and_read_as_late_as_possible():
    read = []

    def source():
        for number in range(1000):
            read.append(number)
            yield "word " * 30

    blocks = packer("byte level", 1, 16).blocks(source())
    next(blocks)
    assert len(read) < 200


def test_a_row_too_short_for_one_token_is_refused():
    for length in (1, 0):
        with pytest.raises(OptionError, match="block_length"):
            packed("byte level, BOS", ["Rome"], 2, length)
    assert len(packed("byte level", ["ab"], 1, 1)) == len(tokens_of("byte level", ["ab"]))


def test_size_is_what_a_block_holds():
    assert Packer(None, 3, 5, 0, ()).size == 15


# ---- blocks


def test_a_block_moves_with_all_its_tensors():
    ids, positions, counted = packed("byte level", ["Rome is in Italy. " * 9], 2, 8)[0]
    block = Block(1, 4, ids, positions, counted, closes=2, ends=True, seen=9)
    moved = block.to(torch.device("meta"), non_blocking=True)
    assert {moved.input_ids.device.type, moved.position_ids.device.type, moved.counted.device.type} == {"meta"}
    assert (moved.group, moved.index, moved.closes, moved.ends, moved.seen) == (1, 4, 2, True, 9)
    assert block.input_ids.device.type == "cpu"
    assert Block(1, closes=2).to(torch.device("meta")) == Block(1, closes=2)


# ---- streams


class Numbered:
    """Stands in for a packer: as many blocks as the text says, each with its number in it."""

    def blocks(self, some):
        for number in some:
            yield (torch.tensor([[number]]),) * 3


def stream(plan, blocks, rank=0, world_size=1):
    return BlockStream(partial(range, blocks), Numbered(), plan, rank, world_size)


@st.composite
def plans(draw, most_blocks=14):
    """A plan of a few passes as a run leaves it: what is done lies before what it has not met yet."""
    blocks = draw(st.integers(0, most_blocks))
    plan = Plan([], [], [])
    for _ in range(draw(st.integers(1, 3))):
        boundaries = sorted(draw(st.sets(st.integers(1, most_blocks + 4), min_size=1, max_size=4)))
        met = draw(st.integers(0, sum(bound <= blocks for bound in boundaries)))
        reached = min(blocks, boundaries[met]) if met < len(boundaries) else boundaries[-1]
        plan.boundaries.append(boundaries)
        plan.met.append(met)
        plan.done.append(draw(st.sets(st.integers(0, reached - 1))) if reached else set())
    return blocks, plan


def steps_of(blocks, plan, world_size):
    """For every rank the steps of every pass."""
    ranks = [list(stream(plan, blocks, rank, world_size)) for rank in range(world_size)]
    return [[[step for step in rank if step.group == group] for rank in ranks] for group in range(len(plan.boundaries))]


@given(case=plans(), world_size=st.integers(1, 4))
@property_test(200)
def test_ranks_share_the_missing_blocks_and_each_is_given_once(case, world_size):
    blocks, plan = case
    for group, ranks in enumerate(steps_of(blocks, plan, world_size)):
        given_out = [step.index for rank in ranks for step in rank if step.index is not None]
        wanted = set(range(min(blocks, plan.boundaries[group][-1])))
        assert sorted(given_out) == sorted(wanted - plan.done[group])
        assert all(int(step.input_ids) == step.index for rank in ranks for step in rank if step.index is not None)
        assert all(step.input_ids is None for rank in ranks for step in rank if step.index is None)


@given(case=plans(), world_size=st.integers(1, 4))
@property_test(200)
def test_all_ranks_meet_at_the_same_steps(case, world_size):
    blocks, plan = case
    for group, ranks in enumerate(steps_of(blocks, plan, world_size)):
        sequences = [[(step.closes, step.ends, step.seen) for step in rank] for rank in ranks]
        assert all(sequence == sequences[0] for sequence in sequences)
        marks = [mark for mark in sequences[0] if mark[0] is not None or mark[1]]
        reached = [stage for stage, bound in enumerate(plan.boundaries[group]) if bound <= blocks]
        assert [closes for closes, _, _ in marks if closes is not None] == reached[plan.met[group] :]
        assert all(seen == plan.boundaries[group][closes] for closes, _, seen in marks if closes is not None)
        assert [ends for _, ends, _ in marks] == [False] * (len(marks) - 1) + [True]
        assert ranks[0][-1].ends
        assert marks[-1][2] == min(blocks, plan.boundaries[group][-1])


@given(case=plans(), world_size=st.integers(1, 4))
@property_test(200)
def test_at_a_boundary_every_block_before_it_has_been_given_and_none_after(case, world_size):
    blocks, plan = case
    for group, ranks in enumerate(steps_of(blocks, plan, world_size)):
        for number, step in enumerate(ranks[0]):
            if step.closes is None:
                continue
            boundary = plan.boundaries[group][step.closes]
            before = {other.index for rank in ranks for other in rank[: number + 1]} - {None}
            assert before == set(range(boundary)) - plan.done[group]


@given(case=plans(), world_size=st.integers(1, 4))
@property_test(100)
def test_ranks_take_turns_within_a_stage_so_that_none_waits_long(case, world_size):
    blocks, plan = case
    for ranks in steps_of(blocks, plan, world_size):
        shares = [sum(step.index is not None for step in rank) for rank in ranks]
        assert shares == sorted(shares, reverse=True)
        empty = [step for step in ranks[0] if step.index is None]
        # The first rank has nothing to do only where it has to meet the others.
        assert all(step.closes is not None or step.ends for step in empty)


def test_boundaries_that_an_earlier_run_has_met_are_not_met_again():
    steps = list(stream(Plan([[2, 4, 6]], [{0, 1, 3}], [1]), 6))
    assert [(step.index, step.closes, step.ends, step.seen) for step in steps] == [
        (2, None, False, 3),
        (None, 1, False, 4),
        (4, None, False, 5),
        (5, 2, False, 6),
        (None, None, True, 6),
    ]


def test_a_pass_that_is_finished_meanwhile_ends_with_one_step():
    plan = Plan([[2, 6], [2, 6]], [set(), set()], [0, 0])
    steps = []
    for step in stream(plan, 6):
        steps.append(step)
        if step.closes == 0 and step.group == 0:
            plan.finished.add(0)
    assert [(step.group, step.index, step.closes, step.ends) for step in steps] == [
        (0, 0, None, False),
        (0, 1, 0, False),
        (0, None, None, True),
        *((1, index, {1: 0, 5: 1}.get(index), False) for index in range(6)),
        (1, None, None, True),
    ]


@given(world_size=st.integers(1, 4), blocks=st.integers(1, 12), stage=st.integers(0, 2))
@property_test(60)
def test_all_ranks_leave_a_finished_pass_together(world_size, blocks, stage):
    plans = [Plan([[3, 6, 9]], [set()], [0]) for _ in range(world_size)]
    ranks = [iter(stream(plan, blocks, rank, world_size)) for rank, plan in enumerate(plans)]
    for together in zip(*ranks, strict=True):
        assert len({(step.closes, step.ends, step.seen) for step in together}) == 1
        for plan, step in zip(plans, together, strict=True):
            if step.closes == stage:
                plan.finished.add(0)


def test_every_pass_opens_the_corpus_anew():
    opened = []
    plan = Plan([[3], [2]], [set(), {0}], [0, 0])

    def corpus():
        opened.append(True)
        return range(5)

    steps = list(BlockStream(corpus, Numbered(), plan))
    assert [(step.group, step.index) for step in steps if step.index is not None] == [(0, 0), (0, 1), (0, 2), (1, 1)]
    assert len(opened) == 2


def test_text_beyond_the_last_boundary_is_not_read_far():
    read = []

    def corpus():
        for number in range(1000):
            read.append(number)
            yield number

    list(BlockStream(corpus, Numbered(), Plan([[3]], [set()], [0])))
    assert len(read) <= 4


def test_without_passes_there_is_nothing():
    assert list(stream(Plan([], [], []), 5)) == []


def content(step):
    tensors = (step.input_ids, step.position_ids, step.counted)
    numbers = [None if tensor is None else tensor.tolist() for tensor in tensors]
    return step.group, step.index, step.closes, step.ends, step.seen, numbers


def loaded(blocks, **options):
    return [content(step) for step in DataLoader(blocks, batch_size=None, generator=torch.Generator(), **options)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_loader_give_the_same_steps_in_the_same_order(method, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    path = tmp_path / "a.txt"
    path.write_text("The tide comes in twice a day.\n" * 30, encoding="utf-8")
    plan = Plan([[3, 7, 50], [4]], [{1, 2, 5}, set()], [0, 0])
    blocks = BlockStream(Corpus(str(path)).texts, packer("byte level, BOS", 2, 16), plan, 1, 2)
    alone = loaded(blocks)
    assert alone == [content(step) for step in blocks]
    assert len(alone) > 8
    assert loaded(blocks, num_workers=2, multiprocessing_context=method) == alone


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_text_comes_out_of_a_worker_as_it_is(workers, tmp_path, monkeypatch):
    """A data loader would make a traceback its message."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    path = tmp_path / "a.txt"
    path.write_bytes(b"The tide comes in twice a day.\n\n" * 3000 + "Élan".encode("latin-1"))
    plan = Plan([[10**6]], [set()], [0])
    blocks = BlockStream(Corpus(str(path)).texts, packer("byte level", 8, 128), plan)
    with pytest.raises(CorpusError, match="not UTF-8"):
        list(blocks)
    loader = DataLoader(blocks, batch_size=None, num_workers=workers, generator=torch.Generator())
    steps = list(loader)
    assert steps[0].index == 0
    errors = [step.error for step in steps if step.error is not None]
    assert len(errors) == workers
    assert all(isinstance(error, CorpusError) and "not UTF-8 (byte 0xc9)" in str(error) for error in errors)
    assert steps[-1].error is not None
