"""Several processes: taking turns, and gathering results."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rome_pl.errors import OptionError, RomeError

__all__ = [
    "PeerError",
    "Peers",
    "check_strategy",
    "gather",
    "independent_gradients",
    "leave_to_each_process",
    "one_after_the_other",
]

T = TypeVar("T")


_SHARDING = ("fsdp", "deepspeed", "modelparallel", "model_parallel")
"""Prefixes of Lightning's strategies, and of their classes, that split a model's weights."""


def check_strategy(strategy: object) -> None:
    """Refuse strategies that split the weights of a model among devices.

    An edit is solved in float64 from the whole matrix and checked by forwards through parts of the model. A shard
    allows neither.

    Args:
        strategy: A strategy of Lightning or its name.

    Raises:
        OptionError: If it does, with what to use instead.
    """
    names = [strategy] if isinstance(strategy, str) else [kind.__name__ for kind in type(strategy).__mro__]
    if any(name.lower().startswith(_SHARDING) for name in names):
        raise OptionError(
            f"strategy {names[0]} splits the model's weights among devices, but an edit needs each matrix whole. Use "
            "strategy 'ddp', where every device holds the whole model, or one device; a model too large for one may "
            "fit in model.dtype: bfloat16"
        )


def gather(items: Sequence[T]) -> list[T]:
    """Return the items of all ranks, in rank order, on every rank. A collective; tensors have to be on the CPU."""
    parts: list[list[T]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


@contextmanager
def one_after_the_other(trainer: Any) -> Iterator[None]:
    """Run the block in the first process of a Trainer, then in all others."""
    if not trainer.is_global_zero:
        trainer.strategy.barrier()
    yield
    if trainer.is_global_zero:
        trainer.strategy.barrier()


def leave_to_each_process(module: nn.Module, child: str) -> None:
    """Keep DDP from synchronising a child's parameters and from reserving memory for their gradients.

    Every process loads the language model itself, and none trains it.
    """
    part = module.get_submodule(child)
    names = [f"{child}.{name}" for name, _ in (*part.named_parameters(), *part.named_buffers())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)  # type: ignore[no-untyped-call]


@contextmanager
def independent_gradients(trainer: Any) -> Iterator[None]:
    """Do not average gradients: every rank optimises its own edits."""
    if isinstance(trainer.model, DistributedDataParallel):
        with trainer.model.no_sync():
            yield
    else:
        yield


class PeerError(RomeError):
    """Another process of the job has ended."""


@contextmanager
def _peers_there() -> Iterator[None]:
    """Explain a failed collective: the process that caused it has printed the reason."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(f"another process of this job has ended; see what it said ({error})") from error


@dataclass(frozen=True)
class Peers:
    """The processes that share a job, as seen from this one. By default it is alone, and all methods are trivial.

    Args:
        rank: Rank of this process.
        world_size: Number of processes.
        device: Device of tensors in a collective.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"

    def sum_on(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        """Sum the processes' tensors on one rank. Elsewhere the result is undefined. The argument is overwritten."""
        if self.world_size == 1:
            return tensor
        total = tensor.to(self.device)
        with _peers_there():
            torch.distributed.reduce(total, rank)
        return total.to(tensor.device)

    def mine(self, index: int) -> bool:
        """Whether this process does a piece of work; the processes take turns by ``index``."""
        return index % self.world_size == self.rank

    def from_first(self, item: T) -> T:
        """Return the first process's item on every process."""
        if self.world_size == 1:
            return item
        items = [item]
        with _peers_there():
            torch.distributed.broadcast_object_list(items, 0)
        return items[0]

    def gather(self, item: T) -> list[T]:
        """Return the items of all processes, in rank order, on every process."""
        if self.world_size == 1:
            return [item]
        with _peers_there():
            return gather([item])

    def wait(self) -> None:
        """Return once every process is here."""
        if self.world_size > 1:
            with _peers_there():
                torch.distributed.barrier()
