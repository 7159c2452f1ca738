"""The un-centred second moment of keys, ``C = E[k kᵀ]`` (Meng et al. 2022, Eq. 2 and App. A), and solves with it.

An artefact is one safetensors file (see :mod:`rome_pl.second_moments.moment_file`), whose description ties it to the
model, layer and corpus it was computed from.
"""

import logging
from collections.abc import Callable, Sequence
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
    "per_expert",
    "unpack_upper",
]

RIDGE = 1e-6
"""Ridge of every solve, as a fraction of the mean diagonal of C. It bounds the condition number by 1e6 · d_key, and is
of the order of the resolution of float32."""

NULL_SPACE = 2e-2
"""Eigenvalues of C below this count as its null space (Fang et al. 2025, AlphaEdit: ``nullspace_threshold``)."""


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MomentInfo:
    """The origin of a second moment.

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
        experts: Number of experts, each of which has a matrix of its own.
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
    experts: int = 1


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a second moment, and their meaning for solves with it.

    Args:
        eigenvalues: In descending order, ``[d_key]``, float64.
    """

    eigenvalues: Tensor

    @property
    def ridge(self) -> float:
        """The number that solves add to the diagonal."""
        return RIDGE * float(self.eigenvalues.mean())

    @property
    def condition(self) -> float:
        """Condition number of the matrix in solves, ridge included."""
        # A singular matrix has eigenvalues that rounding made slightly negative.
        return (float(self.eigenvalues[0]) + self.ridge) / (max(0.0, float(self.eigenvalues[-1])) + self.ridge)

    @property
    def effective_rank(self) -> float:
        """Participation ratio, ``(Σλ)² / Σλ²``: number of directions that share the keys' energy."""
        return float(self.eigenvalues.sum() ** 2 / self.eigenvalues.square().sum())

    @property
    def null_dimensions(self) -> int:
        """Number of eigenvalues below :data:`NULL_SPACE`."""
        return int((self.eigenvalues < NULL_SPACE).sum())


@dataclass(frozen=True)
class SecondMoment:
    r"""``C`` of one layer.

    The key of a mixture is the parts :math:`g_e k_e` of its experts one behind the other, zero where the router does
    not pick an expert. Only the experts' own blocks of ``C`` are kept, each the mean of :math:`g_e^2 k_e k_e^T` over
    **all** tokens. With the router's weights in them, :math:`\mathrm{tr}\, \Delta W C \Delta W^T` is what a write
    changes at the tokens of text, expert by expert: an expert that gets few tokens, or gets them with small weights,
    disturbs text little and takes more of a write. Left out are products of different experts at one token.

    An expert that got fewer tokens than its keys have dimensions is not known: directions that it has not seen would
    look free. Solves give zero for it, so the other picked experts take the write.

    Args:
        matrix: ``[d_key, d_key]``, float64, symmetric; of a mixture ``[experts, d_expert, d_expert]``.
        info: Its origin.
        tokens: Of a mixture: how many tokens each expert has got, ``[experts]``.
    """

    matrix: Tensor
    info: MomentInfo
    tokens: Tensor | None = None

    @property
    def typical_norm(self) -> float:
        """Root mean square of the norm of a key: the square root of the trace."""
        return float(self.matrix.diagonal(dim1=-2, dim2=-1).sum().sqrt())

    @cached_property
    def known(self) -> tuple["SecondMoment | None", ...]:
        """The second moment of each expert, ``None`` for one that got too little text. A dense layer is one expert."""
        if self.tokens is None:
            return (self,)
        enough = (self.tokens >= self.matrix.shape[-1]).tolist()
        return tuple(SecondMoment(one, self.info) if ok else None for one, ok in zip(self.matrix, enough, strict=True))

    def to(self, device: torch.device) -> "SecondMoment":
        """The same on a device."""
        return SecondMoment(self.matrix.to(device), self.info, self.tokens)

    def apply(self, keys: Tensor) -> Tensor:
        """Multiply rows ``[n, d_key]``, float64 and on its device, by ``C``."""
        if self.matrix.ndim == 2:
            return keys @ self.matrix
        return per_expert(keys, [one.__rmatmul__ for one in self.matrix])

    @cached_property
    def _factor(self) -> Tensor:
        ridged = self.matrix.clone()  # C is large: the ridge is added in place
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
        """Apply the inverse of ``C`` plus ridge to keys ``[n, d_key]``. The Cholesky factor is computed once.

        Of a mixture it is computed for experts that a key reaches, each when it is first needed.
        """
        if self.matrix.ndim == 3:
            made = per_expert(
                keys.double().to(self.matrix.device), [one.solve if one is not None else None for one in self.known]
            )
            return made.to(keys.device)
        factor = self._factor
        return torch.cholesky_solve(keys.double().to(factor.device).T, factor).T.to(keys.device)

    def spectrum(self) -> Spectrum:
        """Compute the eigenvalues, in float64."""
        return Spectrum(torch.linalg.eigvalsh(self.matrix).flatten().sort(descending=True).values.cpu())

    def save(self, path: Path) -> None:
        """Write the artefact. An older one is kept until the new one is complete.

        Raises:
            OSError: If the disk is full or the folder cannot be written. Nothing is changed then.
        """
        write_moment(path, pack_upper(self.matrix).float().cpu(), asdict(self.info), self.tokens)

    @classmethod
    def read_info(cls, path: Path) -> MomentInfo:
        """Read the description of an artefact, without its matrix. Raises like :meth:`load`."""
        return MomentInfo(**read_moment(path, matrix=False)[0])

    @classmethod
    def load(cls, path: Path) -> "SecondMoment":
        """Read an artefact.

        Raises:
            StatisticsError: If the file is missing, truncated, or not an artefact of this project.
        """
        about, packed, tokens = read_moment(path)
        try:
            return cls(unpack_upper(packed, about.get("experts", 1)), MomentInfo(**about), tokens)
        except ValueError as error:
            raise StatisticsError(f"{path}: {error}; compute it again") from error

    def check(self, *, weights: str, layer: int, where: str, config: str = "", tokenizer: str = "") -> None:
        """Refuse statistics of another layer or model. Warn if they lack a part of their identity.

        Args:
            weights: Fingerprint of the weights that the keys depend on.
            layer: The layer.
            where: Their name in messages.
            config: Fingerprint of the config.
            tokenizer: Fingerprint of the tokenizer's rules.

        Raises:
            StatisticsError: If they are, with the difference.
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


def per_expert(keys: Tensor, each: Sequence[Callable[[Tensor], Tensor] | None]) -> Tensor:
    """Apply a function of its own to the part of each expert in keys.

    Args:
        keys: ``[n, experts · d_expert]``, float64.
        each: The functions, which take parts ``[m, d_expert]`` and give the same shape; ``None`` gives zeros.

    Returns:
        The same shape. Parts that are zero stay zero, and their functions are not called.
    """
    parts = keys.reshape(len(keys), len(each), -1)
    made, reached = torch.zeros_like(parts), parts.any(2)
    for expert in reached.any(0).nonzero().flatten().tolist():
        function, rows = each[expert], reached[:, expert]
        if function is not None:
            made[rows, expert] = function(parts[rows, expert])
    return made.reshape(keys.shape)
