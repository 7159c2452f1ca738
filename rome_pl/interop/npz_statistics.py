"""Second moments in the format of kmeng01/rome: ``.npz`` files."""

import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy
import torch

from rome_pl.errors import OptionError
from rome_pl.files.whole_files import whole_file
from rome_pl.model.architecture import RewriteSite
from rome_pl.model.language_model import LanguageModel
from rome_pl.second_moments.second_moment import MomentInfo, SecondMoment, StatisticsError

__all__ = ["export_npz", "import_npz"]

TOTAL, COUNT = "mom2.mom2", "mom2.count"
"""Names of the sum of ``k kᵀ`` and of the number of keys."""


def import_npz(path: Path, language_model: LanguageModel, site: RewriteSite) -> SecondMoment:
    """Read published statistics for one layer of a model.

    The file does not name its model; only the length of a key can be checked.

    Args:
        path: The ``.npz`` file.
        language_model: The model that it was computed from.
        site: The projection whose keys it sums.

    Raises:
        OptionError: If the layer is a mixture of experts.
        StatisticsError: If it cannot be read, has another format, or sums keys of another length.
    """
    _refuse_mixture(site)
    try:
        with path.open("rb") as file, numpy.load(file, allow_pickle=False) as arrays:
            total, count = torch.from_numpy(arrays[TOTAL]).double(), int(arrays[COUNT])
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise StatisticsError(f"{path}: no statistics in the published form ({error})") from error
    if total.shape != (site.d_key, site.d_key) or count < 1:
        raise StatisticsError(
            f"{path}: sums {count} keys as a matrix {tuple(total.shape)}, but keys of layer {site.layer} have "
            f"length {site.d_key}; it is of another model"
        )
    if not bool(total.isfinite().all()):
        raise StatisticsError(f"{path}: holds numbers that are not finite")
    info = MomentInfo(
        **language_model.moment_identity(site),
        layer=site.layer,
        count=count,
        corpus=f"imported from {path.name}",
        model=language_model.source,
        source=path.name,
    )
    mean = total / count
    return SecondMoment((mean + mean.T) / 2, info)


def export_npz(moment: SecondMoment, folder: Path, site: RewriteSite) -> Path:
    """Write statistics where kmeng01/rome and EasyEdit expect them, below their folder of a model's statistics.

    Args:
        moment: The second moment.
        folder: Folder for the file, such as ``data/stats/gpt2-xl/wikipedia_stats``.
        site: The projection whose keys it sums. It determines the name of the file.

    Returns:
        The file.

    Raises:
        OptionError: If the layer is a mixture of experts.
    """
    _refuse_mixture(site)
    count = moment.info.count
    path = folder / f"{site.name.removesuffix('.weight')}_float32_mom2_{count}.npz"
    with whole_file(path) as work, work.open("wb") as file:
        arrays: dict[str, Any] = {
            "mom2.constructor": numpy.array("util.runningstats.SecondMoment()"),
            COUNT: numpy.array(count),
            TOTAL: (moment.matrix * count).float().cpu().numpy(),
            "sample_size": numpy.array(count),
        }
        numpy.savez(file, **arrays)
    return path


def _refuse_mixture(site: RewriteSite) -> None:
    if site.experts > 1:
        raise OptionError(
            f"layer {site.layer} is a mixture of experts, each with a second moment of its own: the published form has "
            "room for one matrix of a layer; give a layer with a dense MLP"
        )
