"""The un-centred second moment of keys, ``C = E[k kᵀ]`` (Meng et al. 2022, Eq. 2 and App. A), and solves with it.

An artefact is one safetensors file: the packed upper triangle in float32, and a JSON description in its header that
ties it to the model, layer and corpus it was computed from.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rome_pl.errors import RomeError
from rome_pl.files import whole_file

__all__ = [
    "NULL_SPACE",
    "RIDGE",
    "MomentInfo",
    "SecondMoment",
    "Spectrum",
    "StatisticsError",
    "library_versions",
    "pack_upper",
    "unpack_upper",
]

RIDGE = 1e-6
"""Ridge of every solve, as a fraction of the mean diagonal of C. It bounds the condition number by 1e6 · d_key, and is
of the order of what float32 storage can resolve."""

NULL_SPACE = 2e-2
"""Eigenvalues of C below this count as its null space (Fang et al. 2025, AlphaEdit: ``nullspace_threshold``)."""


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
        dtype: Precision of the stored matrix.
        date: When it was computed, ISO 8601, for a reader.
        source: Name of the corpus, for a reader.
        agreement: Mean cosine of ``C⁻¹k`` from two halves of the text over probe keys, where it was measured.
    """

    weights: str
    tokenizer: str
    layer: int
    count: int
    corpus: str
    model: str = ""
    versions: str = ""
    dtype: str = "float32"
    date: str = ""
    source: str = ""
    agreement: float | None = None


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a second moment and what they say about solves with it.

    Args:
        eigenvalues: Falling; float64, ``[d_key]``.
    """

    eigenvalues: Tensor

    @property
    def ridge(self) -> float:
        """What solves add to the diagonal."""
        return RIDGE * float(self.eigenvalues.mean())

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue of the matrix that solves use, ridge included."""
        # A singular matrix has eigenvalues that rounding made slightly negative.
        return (float(self.eigenvalues[0]) + self.ridge) / (max(0.0, float(self.eigenvalues[-1])) + self.ridge)

    @property
    def effective_rank(self) -> float:
        """Participation ratio, ``(Σλ)² / Σλ²``: how many directions share the keys' energy."""
        return float(self.eigenvalues.sum() ** 2 / self.eigenvalues.square().sum())

    @property
    def null_dimensions(self) -> int:
        """Eigenvalues below :data:`NULL_SPACE`."""
        return int((self.eigenvalues < NULL_SPACE).sum())


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

    def spectrum(self) -> Spectrum:
        """The eigenvalues, in float64."""
        return Spectrum(torch.linalg.eigvalsh(self.matrix).flip(0).cpu())

    def null_space(self, threshold: float = NULL_SPACE) -> Tensor:
        """Projector onto the directions that keys of ordinary text hardly have (Fang et al. 2025, Eq. 5-7).

        Args:
            threshold: Eigenvalues below it belong to the null space.

        Returns:
            ``[d_key, d_key]``, float64, symmetric and idempotent.
        """
        values, vectors = torch.linalg.eigh(self.matrix)
        kept = vectors[:, values < threshold]
        projector: Tensor = kept @ kept.T
        return projector

    def save(self, path: Path) -> None:
        """Write the artefact; an older one stays whole until the new one is complete.

        Raises:
            OSError: If the disk is full or the folder cannot be written; nothing is changed then.
        """
        packed = pack_upper(self.matrix).float().cpu()
        with whole_file(path) as work:
            save_file({"second_moment": packed}, work, metadata={"rome_pl": json.dumps(asdict(self.info))})

    @classmethod
    def read_info(cls, path: Path) -> MomentInfo:
        """What an artefact says of itself, without its matrix; raises as :meth:`load` does."""
        return _open(path)[0]

    @classmethod
    def load(cls, path: Path) -> "SecondMoment":
        """Read an artefact.

        Raises:
            StatisticsError: If the file is missing, truncated, or no artefact of this project.
        """
        info, packed = _open(path, matrix=True)
        try:
            return cls(unpack_upper(packed), info)
        except ValueError as error:
            raise StatisticsError(f"{path}: {error}; compute it again") from error

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


def _open(path: Path, matrix: bool = False) -> tuple[MomentInfo, Tensor]:
    if not path.is_file():
        raise StatisticsError(f"{path}: no such statistics file")
    try:
        with safe_open(path, framework="pt") as file:
            info = MomentInfo(**json.loads(file.metadata()["rome_pl"]))
            return info, file.get_tensor("second_moment") if matrix else torch.empty(0)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise StatisticsError(
            f"{path}: damaged, or no second moment of this project ({error}); compute it again"
        ) from error


def pack_upper(matrix: Tensor) -> Tensor:
    """The upper triangle of ``[d, d]``, row after row, ``[d (d + 1) / 2]``."""
    return torch.cat([row[index:] for index, row in enumerate(matrix)])


def unpack_upper(packed: Tensor) -> Tensor:
    """The symmetric float64 matrix whose upper triangle is ``packed``.

    Raises:
        ValueError: If its length is that of no triangle.
    """
    size = int((2 * packed.numel()) ** 0.5)
    if size * (size + 1) // 2 != packed.numel():
        raise ValueError(f"{packed.numel()} entries are no symmetric half")
    matrix = torch.zeros(size, size, dtype=torch.float64)
    start = 0
    for index in range(size):
        matrix[index, index:] = packed[start : start + size - index]
        start += size - index
    return symmetric(matrix)


def symmetric(upper: Tensor) -> Tensor:
    """The symmetric matrix with the upper triangle of ``upper``."""
    matrix = upper.triu()
    return matrix + matrix.triu(1).T


def library_versions() -> dict[str, Any]:
    """Versions of the libraries that results depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("rome_pl", "torch", "lightning", "transformers", "safetensors")}
