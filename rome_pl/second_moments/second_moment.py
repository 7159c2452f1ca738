"""The un-centred second moment of keys, ``C = E[k kᵀ]`` (Meng et al. 2022, Eq. 2 and App. A), and solves with it.

An artefact is one safetensors file (see :mod:`rome_pl.second_moments.moment_file`), whose description ties it to the
model, layer and corpus it was computed from.
"""

import logging
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rome_pl.second_moments.moment_file import StatisticsError, pack_upper, read_moment, unpack_upper, write_moment

__all__ = [
    "NULL_SPACE",
    "RIDGE",
    "MomentInfo",
    "SecondMoment",
    "Spectrum",
    "StatisticsError",
    "pack_upper",
    "unpack_upper",
]

RIDGE = 1e-6
"""Ridge of every solve, as a fraction of the mean diagonal of C. It bounds the condition number by 1e6 · d_key, and is
of the order of what float32 storage can resolve."""

NULL_SPACE = 2e-2
"""Eigenvalues of C below this count as its null space (Fang et al. 2025, AlphaEdit: ``nullspace_threshold``)."""


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MomentInfo:
    """What a second moment was computed from.

    Args:
        weights: Fingerprint of the model's weights that the keys depend on.
        tokenizer: Fingerprint of the tokenizer's rules.
        layer: Index of the decoder layer.
        count: Number of keys summed.
        corpus: Fingerprint (or description) of the text.
        model: Name of the model, for a reader.
        versions: Versions of the libraries used, for a reader.
        dtype: Precision of the stored matrix.
        date: When it was computed, ISO 8601, for a reader.
        source: Name of the corpus, for a reader.
        agreement: Mean cosine of ``C⁻¹k`` from two halves of the text over probe keys, where it was measured.
        config: Fingerprint of the model's config; empty in files of earlier versions, whose ``tokenizer`` is a hash of
            the vocabulary alone.
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
    config: str = ""


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

    def save(self, path: Path) -> None:
        """Write the artefact; an older one stays whole until the new one is complete.

        Raises:
            OSError: If the disk is full or the folder cannot be written; nothing is changed then.
        """
        write_moment(path, pack_upper(self.matrix).float().cpu(), asdict(self.info))

    @classmethod
    def read_info(cls, path: Path) -> MomentInfo:
        """What an artefact says of itself, without its matrix; raises as :meth:`load` does."""
        return MomentInfo(**read_moment(path, matrix=False)[0])

    @classmethod
    def load(cls, path: Path) -> "SecondMoment":
        """Read an artefact.

        Raises:
            StatisticsError: If the file is missing, truncated, or no artefact of this project.
        """
        about, packed = read_moment(path)
        try:
            return cls(unpack_upper(packed), MomentInfo(**about))
        except ValueError as error:
            raise StatisticsError(f"{path}: {error}; compute it again") from error

    def check(self, *, weights: str, layer: int, where: str, config: str = "", tokenizer: str = "") -> None:
        """Refuse statistics of another layer or model; say so if they do not tell all that is to be compared.

        Args:
            weights: Fingerprint of the weights that the keys depend on.
            layer: The layer.
            where: What to call them in messages.
            config: Fingerprint of the config.
            tokenizer: Fingerprint of the tokenizer's rules.

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
        if not self.info.config:
            log.warning(
                "%s: does not tell the config and the tokenizer's rules it was computed with, as files of earlier "
                "versions; they are not compared. Compute it again to be sure",
                where,
            )
            return
        for what, theirs, ours in (
            ("config", self.info.config, config),
            ("tokenizer", self.info.tokenizer, tokenizer),
        ):
            if ours and theirs != ours:
                raise StatisticsError(
                    f"{where}: computed from the same weights with another {what} ({theirs[:12]}) than the one loaded "
                    f"({ours[:12]}); remove the setting, and statistics of this model are computed"
                )
