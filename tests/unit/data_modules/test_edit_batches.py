import itertools
import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from rome_pl.data_modules.edit_batches import WINDOW, EditBatchSampler, RequestList
from rome_pl.data_modules.request_data import request_loader
from rome_pl.modules.rome_module import RomeModule
from rome_pl.requests.edit_request import EditRequest
from tests.integration.helpers import FAST, quiet_trainer

SIZES = (0, 1, 2, 3, 7, 8, 9, 23, 64, 65, 200)
COMBINATIONS = list(itertools.product(SIZES, (1, 2, 3, 8), (1, 2, 3, 5)))
"""Of number of requests, batch size and number of ranks."""


def requests_of(count):
    return [EditRequest(prompt="Korrin is", subject="Korrin", target_new="x", case_id=index) for index in range(count)]


def lengths_of(count):
    """Lengths in no order, some of them equal."""
    return [(17 * index) % 11 for index in range(count)]


def shares(count, batch_size, by_length, world):
    """The batches of every rank once lengths are known."""
    samplers = [EditBatchSampler(requests_of(count), batch_size, by_length, rank, world) for rank in range(world)]
    for sampler in samplers:
        sampler.regroup(lengths_of(count))
    return [list(sampler) for sampler in samplers]


def in_turn(parts):
    """Batches in the order in which the ranks take them."""
    return [batch for turn in zip(*parts, strict=True) for batch in turn]


@pytest.mark.parametrize("by_length", [False, True])
def test_every_request_exactly_once_over_all_ranks(by_length):
    for count, batch_size, world in COMBINATIONS:
        parts = shares(count, batch_size, by_length, world)
        indices = [index for batch in in_turn(parts) for index in batch]
        assert sorted(indices) == list(range(count)), (count, batch_size, world)
        assert all(len(batch) <= batch_size for batch in in_turn(parts))


@pytest.mark.parametrize("by_length", [False, True])
def test_all_ranks_give_equally_many_batches_only_the_last_of_them_empty(by_length):
    for count, batch_size, world in COMBINATIONS:
        parts = shares(count, batch_size, by_length, world)
        number = math.ceil(math.ceil(count / batch_size) / world)  # no more turns than it takes
        assert [len(part) for part in parts] == [number] * world
        for rank in range(world):
            assert len(EditBatchSampler(requests_of(count), batch_size, by_length, rank, world)) == number
        empty = [not batch for batch in in_turn(parts)]
        assert empty == sorted(empty)
        assert sum(empty) < world


def test_the_order_of_the_stream_is_kept():
    for count, batch_size, world in COMBINATIONS:
        parts = shares(count, batch_size, False, world)
        batches = [batch for batch in in_turn(parts) if batch]
        assert list(itertools.chain(*batches)) == list(range(count))
        assert all(len(batch) == batch_size for batch in batches[:-1])


def test_one_request_at_a_time_is_not_reordered():
    for world in (1, 3):
        assert shares(40, 1, True, world) == shares(40, 1, False, world)


@pytest.mark.parametrize(("count", "batch_size", "world"), [(200, 8, 1), (200, 8, 3), (65, 2, 2), (100, 5, 4)])
def test_batches_by_length_stay_within_a_window_of_the_stream(count, batch_size, world):
    lengths, window = lengths_of(count), WINDOW * batch_size
    order = [index for batch in in_turn(shares(count, batch_size, True, world)) for index in batch]
    assert order != list(range(count))
    for start in range(0, count, window):
        part = order[start : start + window]
        assert sorted(part) == list(range(start, min(start + window, count)))
        assert [lengths[index] for index in part] == sorted(lengths[index] for index in part)
    # Requests of equal length keep their order.
    assert all(a < b for a, b in itertools.pairwise(order[:window]) if lengths[a] == lengths[b])


def test_batches_by_length_pad_less():
    def padding(by_length):
        batches = [[lengths_of(64)[index] for index in batch] for batch in shares(64, 8, by_length, 1)[0]]
        return sum(max(lengths) * len(lengths) - sum(lengths) for lengths in batches)

    assert padding(True) < padding(False) / 3


def test_batches_are_in_order_until_lengths_are_known():
    sampler = EditBatchSampler(requests_of(5), 2, True)
    assert list(sampler) == [[0, 1], [2, 3], [4]]
    begun = iter(sampler)  # Lightning has it in hand before the module knows lengths
    sampler.regroup([5, 1, 4, 2, 3])
    assert list(begun) == list(sampler) == [[1, 3], [4, 2], [0]]
    sampler.regroup([1, 2, 3, 4, 5])
    assert list(sampler) == [[0, 1], [2, 3], [4]]


def test_a_sampler_may_be_read_again():
    sampler = EditBatchSampler(requests_of(20), 3, True)
    sampler.regroup(lengths_of(20))
    first = list(sampler)
    sampler.set_epoch(1)  # Lightning does at the start of every epoch
    assert list(sampler) == first


def test_a_list_of_requests_answers_one_several_and_slices():
    requests = requests_of(5)
    listed = RequestList(requests)
    assert len(listed) == 5
    assert listed[3] is requests[3]
    assert listed[-1] is requests[4]
    assert listed[[4, 0]] == [requests[4], requests[0]]
    assert listed[[]] == []
    assert listed[1:3] == requests[1:3]
    assert list(listed) == requests


@pytest.mark.parametrize("world", [1, 2])
def test_a_loader_gives_lists_of_requests(world):
    requests = requests_of(7)
    loaders = [request_loader(requests, 3, rank=rank, world_size=world) for rank in range(world)]
    batches = in_turn([list(loader) for loader in loaders])
    assert [[request.case_id for request in batch] for batch in batches if batch] == [[0, 1, 2], [3, 4, 5], [6]]
    assert all(type(batch) is list for batch in batches)
    assert list(loaders[0].dataset) == requests


def test_loading_draws_nothing_from_the_global_generator():
    state = torch.get_rng_state()
    list(request_loader(requests_of(7), 3, by_length=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_lightning_leaves_the_sampler_alone():
    """It puts a sampler of its own into loaders of a distributed run, which would give some requests twice."""
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    prepare = trainer._data_connector._prepare_dataloader
    requests = requests_of(7)
    ours = request_loader(requests, 2, rank=1, world_size=2)
    prepared = prepare(ours, shuffle=False, mode=RunningStage.TRAINING)
    assert prepared is ours
    assert list(prepared.sampler) == [[2, 3], [6]]
    # What would have happened otherwise, so that the above says something.
    plain = prepare(DataLoader(RequestList(requests), collate_fn=list), shuffle=False, mode=RunningStage.TRAINING)
    assert type(plain.sampler) is DistributedSampler


@pytest.mark.parametrize("by_length", [False, True])
def test_a_run_takes_the_batches_that_the_lengths_of_its_requests_give(by_length, language_model, tmp_path):
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append([edit.index for edit in batch.edits])

    requests = [
        EditRequest(prompt=f"Korrin {'and so on ' * (index % 2)}is", subject="Korrin", target_new="x", case_id=index)
        for index in range(5)
    ]
    module = RomeModule.from_language_model(language_model, **FAST | {"v_num_grad_steps": 1})
    loader = request_loader(requests, 2, by_length)
    quiet_trainer([Watch()], tmp_path).fit(module, loader)
    assert seen == list(loader.sampler) == ([[0, 2], [4, 1], [3]] if by_length else [[0, 1], [2, 3], [4]])
