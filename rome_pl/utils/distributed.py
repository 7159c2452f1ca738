"""Several processes: taking turns, and bringing together what they found."""

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
"""How the names begin of Lightning's strategies, and of their classes, that split a model's weights."""


def check_strategy(strategy: object) -> None:
    """Refuse strategies that split the weights of a model among devices.

    An edit is solved in float64 from the whole matrix, and checked by forwards through parts of the model, neither of
    which a shard allows.

    Args:
        strategy: Lightning's name of one, or the strategy itself.

    Raises:
        OptionError: With what to use instead.
    """
    names = [strategy] if isinstance(strategy, str) else [kind.__name__ for kind in type(strategy).__mro__]
    if any(name.lower().startswith(_SHARDING) for name in names):
        raise OptionError(
            f"strategy {names[0]} splits the model's weights among devices, but an edit needs each matrix whole. Use "
            "strategy 'ddp', where every device holds the whole model, or one device; a model too large for one may "
            "fit in model.dtype: bfloat16"
        )


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


class PeerError(RomeError):
    """Another process of the job has ended."""


@contextmanager
def _peers_there() -> Iterator[None]:
    """Say what it means if a collective fails: whatever was wrong was said by the process that it happened in."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(f"another process of this job has ended; see what it said ({error})") from error


@dataclass(frozen=True)
class Peers:
    """This process among those that share a job; alone by default, and then every method is at hand at no cost.

    Args:
        rank: This process.
        world_size: Number of processes.
        device: Where tensors have to be for a collective.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"

    def sum_on(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the processes' tensors, on one; elsewhere nothing of use. The argument is used up."""
        if self.world_size == 1:
            return tensor
        total = tensor.to(self.device)
        with _peers_there():
            torch.distributed.reduce(total, rank)
        return total.to(tensor.device)

    def mine(self, index: int) -> bool:
        """Whether a piece of work that one process does alone is this one's; they take turns."""
        return index % self.world_size == self.rank

    def from_first(self, item: T) -> T:
        """What the first process gives, on every one."""
        if self.world_size == 1:
            return item
        items = [item]
        with _peers_there():
            torch.distributed.broadcast_object_list(items, 0)
        return items[0]

    def gather(self, item: T) -> list[T]:
        """What every process gives, by rank, on every one."""
        if self.world_size == 1:
            return [item]
        with _peers_there():
            return gather([item])

    def wait(self) -> None:
        """Return once every process is here."""
        if self.world_size > 1:
            with _peers_there():
                torch.distributed.barrier()
