"""Several processes: taking turns, and bringing together what they found."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["gather", "independent_gradients", "leave_to_each_process", "one_after_the_other"]

T = TypeVar("T")


def gather(items: Sequence[T]) -> list[T]:
    """The items of all ranks, in the order of ranks, on every rank; a collective. Tensors in them: the CPU's."""
    parts: list[list[T]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


@contextmanager
def one_after_the_other(trainer: Any) -> Iterator[None]:
    """Let the first process of a Trainer do the block, then all others."""
    if not trainer.is_global_zero:
        trainer.strategy.barrier()
    yield
    if trainer.is_global_zero:
        trainer.strategy.barrier()


def leave_to_each_process(module: nn.Module, child: str) -> None:
    """Keep DDP from sending a child's parameters and from setting gradients aside for them.

    Every process loads the language model itself, and none trains it.
    """
    part = module.get_submodule(child)
    names = [f"{child}.{name}" for name, _ in (*part.named_parameters(), *part.named_buffers())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)  # type: ignore[no-untyped-call]


@contextmanager
def independent_gradients(trainer: Any) -> Iterator[None]:
    """No averaging of gradients: every rank optimises edits of its own."""
    if isinstance(trainer.model, DistributedDataParallel):
        with trainer.model.no_sync():
            yield
    else:
        yield
