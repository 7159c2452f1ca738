"""The un-centred second moment of keys, ``C = E[k kᵀ]`` (Meng et al. 2022, Eq. 2 and App. A), and solves with it.

An artefact is one safetensors file: the packed upper triangle in float32, and a JSON description in its header that
ties it to the model, layer and corpus it was computed from.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rome_pl.errors import RomeError

__all__ = ["RIDGE", "MomentAccumulator", "MomentInfo", "SecondMoment", "StatisticsError", "library_versions"]

RIDGE = 1e-6
"""Ridge of every solve, as a fraction of the mean diagonal of C. It bounds the condition number by 1e6 · d_key, and is
of the order of what float32 storage can resolve."""

BLOCK_TOKENS = 1024
"""Keys per float32 product before the sum goes on in float64."""


class StatisticsError(RomeError):
    """Statistics that are missing, damaged, or of another model or layer."""


@dataclass(frozen=True)
class MomentInfo:
    """What a second moment was computed from.

    Args:
        weights: Fingerprint of the model's weights that the keys depend on.
        tokenizer: Fingerprint of the tokenizer.
        layer: Index of the decoder layer.
        count: Number of keys summed.
        corpus: Fingerprint (or description) of the text.
        model: Name of the model, for a reader.
        versions: Versions of the libraries used, for a reader.
    """

    weights: str
    tokenizer: str
    layer: int
    count: int
    corpus: str
    model: str = ""
    versions: str = ""


@dataclass(frozen=True)
class SecondMoment:
    """``C`` of one layer.

    Args:
        matrix: ``[d_key, d_key]``, float64, symmetric.
        info: What it was computed from.
    """

    matrix: Tensor
    info: MomentInfo

    @property
    def typical_norm(self) -> float:
        """Root mean square of the norm of a key: the square root of the trace."""
        return float(self.matrix.trace().sqrt())

    @cached_property
    def _factor(self) -> Tensor:
        ridged = self.matrix.clone()  # C is large: the ridge goes in place, and no identity is built
        ridged.diagonal().add_(RIDGE * self.matrix.diagonal().mean())
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if bool(failed):
            raise StatisticsError(
                f"the second moment of layer {self.info.layer} is not positive definite: "
                f"{self.info.count} keys for a dimension of {len(self.matrix)}; compute it from more text"
            )
        return factor

    def solve(self, keys: Tensor) -> Tensor:
        """Apply the inverse of ``C`` plus ridge to keys ``[n, d_key]``, by a Cholesky factor made once."""
        factor = self._factor
        return torch.cholesky_solve(keys.double().to(factor.device).T, factor).T.to(keys.device)

    def save(self, path: Path) -> None:
        """Write the artefact; an older one stays whole until the new one is complete."""
        rows, columns = torch.triu_indices(len(self.matrix), len(self.matrix))
        packed = self.matrix.cpu()[rows, columns].float()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        try:
            save_file({"second_moment": packed}, name, metadata={"rome_pl": json.dumps(vars(self.info))})
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "SecondMoment":
        """Read an artefact.

        Raises:
            StatisticsError: If the file is missing, truncated, or no artefact of this project.
        """
        if not path.is_file():
            raise StatisticsError(f"{path}: no such statistics file")
        try:
            with safe_open(path, framework="pt") as file:
                info = MomentInfo(**json.loads(file.metadata()["rome_pl"]))
                packed = file.get_tensor("second_moment")
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise StatisticsError(
                f"{path}: damaged, or no second moment of this project ({error}); compute it again"
            ) from error
        size = int((2 * packed.numel()) ** 0.5)
        rows, columns = torch.triu_indices(size, size)
        if rows.numel() != packed.numel():
            raise StatisticsError(f"{path}: {packed.numel()} entries are no symmetric half; compute it again")
        matrix = torch.zeros(size, size, dtype=torch.float64)
        matrix[rows, columns] = packed.double()
        return cls(matrix + matrix.triu(1).T, info)

    def check(self, *, weights: str, layer: int, where: str) -> None:
        """Refuse statistics of another layer or model.

        Raises:
            StatisticsError: With what differs.
        """
        if self.info.layer != layer:
            raise StatisticsError(f"{where}: computed for layer {self.info.layer}, but layer {layer} is edited")
        if self.info.weights != weights:
            raise StatisticsError(
                f"{where}: computed from other weights ({self.info.model or 'unnamed'}, {self.info.weights[:12]}) than "
                f"those loaded ({weights[:12]}); remove the setting, and statistics of this model are computed"
            )


class MomentAccumulator:
    """Sums ``k kᵀ``: float32 products of blocks, float64 sums, exact counts.

    Args:
        d_key: Length of a key.
        device: Where the sum is kept.
    """

    def __init__(self, d_key: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(d_key, d_key, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, keys: Tensor) -> None:
        """Add keys ``[n, d_key]``.

        Raises:
            StatisticsError: If a key is not finite.
        """
        for block in torch.split(keys, BLOCK_TOKENS):
            block = block.to(torch.promote_types(block.dtype, torch.float32))
            product = block.T @ block
            if not bool(product.diagonal().isfinite().all()):
                raise StatisticsError("a key of the corpus is not finite; load the model in float32 or bfloat16")
            self.total += product
            self.count += len(block)

    def finish(self, describe: Callable[[int], MomentInfo]) -> SecondMoment:
        """Divide by the count."""
        if self.count == 0:
            raise StatisticsError("the corpus gave no keys: it is empty")
        return SecondMoment(self.total / self.count, describe(self.count))


def library_versions() -> dict[str, Any]:
    """Versions of the libraries that results depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("rome_pl", "torch", "lightning", "transformers", "safetensors")}
