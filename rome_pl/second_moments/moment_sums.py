"""Sums of ``k kᵀ`` for several layers, and their unfinished state on disk.

Products of at most 1,024 keys are computed in float32 and summed in float64: float64 products would cost as much as the
model, and float32 sums would lose late text. The text is summed in two halves, so that a run can tell how accurate the
result is.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rome_pl.files.checksums import is_intact, sealed, tensor_checksum
from rome_pl.files.schemas import parsed
from rome_pl.files.whole_files import check_regular, whole_file
from rome_pl.forward.partial import stopped_before
from rome_pl.model.architecture import RewriteSite
from rome_pl.second_moments.moment_file import StatisticsError, pack_upper, symmetric, unpack_upper
from rome_pl.utils.distributed import Peers

__all__ = ["MomentSums", "PartialSums", "Place", "half_of", "keys_of", "place_for"]

Place = Literal["auto", "device", "host"]

PRODUCT_KEYS = 1024
"""Largest number of keys in one float32 product."""

PANELS = 6
"""Products are computed in panels, without those below the diagonal: 7/12 of the whole square."""

TENSORS = "tensors"
"""Header field with the checksum of each tensor in a file of partial sums."""

HALF_RUN = 4
"""Number of consecutive blocks that go to the same half: neighbours share documents."""


def half_of(block: int, halves: int, blocks: int) -> int:
    """Return the half of the text that a block belongs to.

    Args:
        block: Its number.
        halves: 2, or 1 if the text is not divided.
        blocks: Number of blocks in all. If there are few, fewer in a row go to the same half.
    """
    run = min(HALF_RUN, max(1, blocks // (4 * halves)))
    return (block // run) % halves


class MomentSums:
    """Sums of ``k kᵀ`` of several layers.

    Args:
        sizes: Length of a key, by layer.
        halves: 2 to divide the text into halves, 1 to save memory.
        device: Device of the sums.
        experts: Number of experts of the layers that are mixtures. Each expert has a sum of its own.
    """

    def __init__(
        self,
        sizes: Mapping[int, int],
        halves: int,
        device: torch.device | str = "cpu",
        experts: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        shapes = {layer: (size, size) for layer, size in sizes.items()} | {
            layer: (number, sizes[layer] // number, sizes[layer] // number) for layer, number in experts.items()
        }
        self.totals = {
            layer: [torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(halves)]
            for layer, shape in shapes.items()
        }
        self.tokens = {
            layer: [torch.zeros(number, dtype=torch.int64) for _ in range(halves)] for layer, number in experts.items()
        }
        self.counts = [0] * halves
        self.blocks: set[int] = set()

    @classmethod
    def of(cls, sites: Sequence[RewriteSite], halves: int, device: torch.device | str = "cpu") -> "MomentSums":
        """Sums for the keys of rewrite sites."""
        mixtures = {site.layer: site.experts for site in sites if site.experts > 1}
        return cls({site.layer: site.d_key for site in sites}, halves, device, mixtures)

    @property
    def halves(self) -> int:
        """Number of parts that the text is divided into."""
        return len(self.counts)

    def add(self, layer: int, half: int, keys: Tensor) -> Tensor:
        """Add keys ``[n, d_key]`` to a layer's sum. The caller updates counts and blocks.

        Returns:
            Whether all keys were finite, a scalar on their device.
        """
        total = self.totals[layer][half]
        if total.ndim == 2:
            return self._add(total, keys)
        finite = torch.ones((), dtype=torch.bool, device=keys.device)
        parts = keys.reshape(len(keys), len(total), -1)
        reached = parts.any(2)
        for expert in reached.any(0).nonzero().flatten().tolist():
            own = parts[reached[:, expert], expert]
            self.tokens[layer][half][expert] += len(own)
            finite = finite & self._add(total[expert], own)
        return finite

    @staticmethod
    def _add(total: Tensor, keys: Tensor) -> Tensor:
        width = -(-len(total) // PANELS)
        finite = torch.ones((), dtype=torch.bool, device=keys.device)
        for block in torch.split(keys, PRODUCT_KEYS):
            block = block.to(torch.promote_types(block.dtype, torch.float32))
            # The sum of squares is not finite if a key or its square is not.
            finite = finite & block.square().sum().isfinite()
            for start in range(0, len(total), width):
                panel = block[:, start : start + width].T @ block[:, start:]
                total[start : start + width, start:] += panel.to(total.device)
        return finite

    def matrix(self, layer: int, half: int) -> Tensor:
        """Return a copy of one half's sum, ``[d_key, d_key]`` or ``[experts, d_expert, d_expert]``, symmetric."""
        return symmetric(self.totals[layer][half])

    def tokens_of_all(self, peers: Peers) -> dict[int, list[Tensor]]:
        """How many tokens each expert of a mixture got in all processes, half by half, by layer. A collective."""
        if not self.tokens:
            return {}
        found = peers.gather(self.tokens)
        return {
            layer: [torch.stack(parts).sum(0) for parts in zip(*(one[layer] for one in found), strict=True)]
            for layer in self.tokens
        }

    def dealt_out(self, layers: Sequence[int], peers: Peers) -> Iterator[tuple[int, list[Tensor]]]:
        """Sum some layers over all processes, each layer on one process. A collective.

        As many layers as there are processes are gathered before any process continues with its own. So processes work
        in parallel, and none holds more than one layer.

        Args:
            layers: The layers, the same on every process.
            peers: The processes.

        Yields:
            This process's layers, each with the halves as by :meth:`matrix`.
        """
        for start in range(0, len(layers), peers.world_size):
            mine: tuple[int, list[Tensor]] | None = None
            for turn, layer in enumerate(layers[start : start + peers.world_size]):
                halves = [self._brought_together(layer, half, peers, turn) for half in range(self.halves)]
                if peers.mine(turn):
                    mine = layer, halves
            if mine is not None:
                yield mine

    def _brought_together(self, layer: int, half: int, peers: Peers, turn: int) -> Tensor:
        """Sum one half over all processes, on process ``turn``. The result is undefined on the others.

        Only the upper triangle is sent.
        """
        if peers.world_size == 1:
            return self.matrix(layer, half)
        total = self.totals[layer][half]
        width = -(-total.shape[-1] // PANELS)
        starts = range(0, total.shape[-1], width)
        panels = [total[..., start : start + width, start:] for start in starts]
        packed = torch.cat([panel.reshape(-1) for panel in panels])
        packed = peers.sum_on(turn, packed)
        if not peers.mine(turn):
            return packed
        whole, taken = torch.zeros_like(total), 0
        for start, panel in zip(starts, panels, strict=True):
            whole[..., start : start + width, start:] = packed[taken : taken + panel.numel()].reshape(panel.shape)
            taken += panel.numel()
        return symmetric(whole)

    def merge(self, other: "PartialSums") -> None:
        """Add the sums that an earlier run has left.

        Raises:
            StatisticsError: If a block would be counted twice.
        """
        if overlap := self.blocks & other.blocks:
            raise StatisticsError(
                f"{other.path}: holds block {min(overlap)}, as another file there does; delete {other.path.parent} and "
                "start again"
            )
        first = not self.blocks
        for (layer, half), tensor in other.sums():
            total = self.totals[layer][half]
            # Copied, not added to zero, so that a resumed sum has the same bits as the interrupted one.
            total.copy_(tensor) if first else total.add_(tensor.to(total.device))
        for (layer, half), tokens in other.tokens():
            self.tokens[layer][half] += tokens
        self.counts = [count + more for count, more in zip(self.counts, other.counts, strict=True)]
        self.blocks |= other.blocks


@contextmanager
def keys_of(sites: Sequence[RewriteSite], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Pass the keys of each site to ``take(layer, keys)`` while a model runs. The forward ends at the deepest site.

    Args:
        sites: The projections, by rising layer.
        take: Called with the layer and the projection's input, ``[tokens, d_key]``.
    """

    def hook(site: RewriteSite) -> Any:
        def hand_over(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take(site.layer, site.keys(args, kwargs, lambda tensor: tensor.reshape(-1, tensor.shape[-1])))

        return hand_over

    handles = [site.projection.register_forward_pre_hook(hook(site), with_kwargs=True) for site in sites]
    try:
        with stopped_before(sites[-1].projection):
            yield
    finally:
        for handle in handles:
            handle.remove()


def place_for(
    groups: Sequence[Sequence[int]], halves: int, device: torch.device, place: Place = "auto"
) -> torch.device:
    """Return the device for the sums.

    Args:
        groups: Lengths of keys of the layers in each pass.
        halves: Number of sums per layer.
        device: Device of the model.
        place: ``device``, ``host``, or ``auto``: the device if the sums fit there.

    Raises:
        StatisticsError: If they do not fit, with what to do.
    """
    host = torch.device("cpu")
    if not groups:
        return host
    sums = max(sum(size**2 for size in group) for group in groups) * 8 * halves
    work = 5 * max(size for group in groups for size in group) ** 2 * 8  # two halves, a factor, copies
    candidates = {"auto": [device, host], "device": [device], "host": [host]}[place]
    free = {candidate: _free(candidate) for candidate in candidates}
    for candidate in candidates:
        if sums + work <= free[candidate]:
            return candidate
    found = ", ".join(f"{room / 2**30:.1f} GiB on {where}" for where, room in free.items())
    raise StatisticsError(
        f"the second moments of {max(map(len, groups))} layers take {(sums + work) / 2**30:.1f} GiB "
        f"({halves} sums of d_key² float64 numbers a layer), but free are {found}. "
        "Take fewer layers_per_pass, split_half: false (which halves it), or accumulate_on: host"
    )


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


class PartialSums:
    """The sums of one process, as last saved to disk.

    Args:
        path: The file.

    Raises:
        StatisticsError: If it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            check_regular(path)
            with safe_open(path, framework="pt") as file:
                notes: dict[str, Any] = parsed(file.metadata()["rome_pl"])
                if not is_intact(notes):
                    raise ValueError("its checksum does not fit")
                self._checksums: dict[str, str] = notes.pop(TENSORS)
                self.notes: dict[str, Any] = notes.pop("notes")
                self.counts: list[int] = self._read(file, "counts").tolist()
                self.blocks: set[int] = set(self._read(file, "blocks").tolist())
                self._experts = {
                    (int(layer), int(half)): self._read(file, name)
                    for name in file.keys()  # noqa: SIM118  # no mapping
                    if name.startswith("tokens.")
                    for _, layer, half in [name.split(".")]
                }
                self._names = [name for name in file.keys() if name.startswith("sum.")]  # noqa: SIM118  # no mapping
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise StatisticsError(f"{path}: damaged partial sums ({error}); delete the file and start again") from error

    def _read(self, file: Any, name: str) -> Tensor:
        tensor: Tensor = file.get_tensor(name)
        if tensor_checksum({name: tensor}) != self._checksums[name]:
            raise StatisticsError(
                f"{self.path}: damaged partial sums (the checksum of {name} does not fit); delete the file and start "
                "again"
            )
        return tensor

    def tokens(self) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Yield layer and half of mixtures, and how many tokens each expert has got."""
        yield from self._experts.items()

    def sums(self) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Yield layer and half, and the sum's upper triangle as a matrix ``[d_key, d_key]``.

        Raises:
            StatisticsError: If one is damaged.
        """
        with safe_open(self.path, framework="pt") as file:
            for name in self._names:
                _, layer, half = name.split(".")
                place = int(layer), int(half)
                yield place, unpack_upper(self._read(file, name), len(self._experts.get(place, [0])))

    @staticmethod
    def save(path: Path, sums: MomentSums, notes: Mapping[str, Any]) -> None:
        """Write sums and notes. An older file is kept until the new one is complete."""
        tensors = {
            f"sum.{layer}.{half}": pack_upper(total).cpu()
            for layer, totals in sums.totals.items()
            for half, total in enumerate(totals)
        }
        for layer, halves in sums.tokens.items():
            tensors |= {f"tokens.{layer}.{half}": tokens for half, tokens in enumerate(halves)}
        tensors["counts"] = torch.tensor(sums.counts, dtype=torch.int64)
        tensors["blocks"] = torch.tensor(sorted(sums.blocks), dtype=torch.int64)
        checksums = {name: tensor_checksum({name: tensor}) for name, tensor in tensors.items()}
        about = sealed({"notes": dict(notes), TENSORS: checksums})
        with whole_file(path) as work:
            save_file(tensors, work, metadata={"rome_pl": json.dumps(about)})
