"""Second moments in the form that kmeng01/rome published: taken over into the cache, and written from it."""

import logging
from pathlib import Path

from rome_pl.errors import OptionError
from rome_pl.interop.npz_statistics import export_npz, import_npz
from rome_pl.model.architecture import RewriteSite
from rome_pl.modules.covariance_module import CovarianceModule
from rome_pl.second_moments.second_moment import SecondMoment

__all__ = ["export_moments", "import_moment"]

log = logging.getLogger(__name__)


def _loaded_sites(model: CovarianceModule) -> list[RewriteSite]:
    model.load()
    return model.sites()


def import_moment(model: CovarianceModule, path: Path, folder: Path) -> None:
    """Keep a file as the second moment of the one layer that the module asks for.

    Raises:
        OptionError: If it asks for several layers.
    """
    sites = _loaded_sites(model)
    if len(sites) != 1:
        raise OptionError(f"import_npz: one file is of one layer; give model.layers one layer, not {len(sites)}")
    moment = import_npz(path, model.load(), sites[0])
    target = folder / f"{path.stem}.layer{sites[0].layer}.{moment.info.weights[:12]}.safetensors"
    moment.save(target)
    log.warning(
        "%s: taken for layer %d of %s, which the file itself does not say. Kept as %s; edits of this model find it",
        path,
        sites[0].layer,
        model.load().source,
        target,
    )


def export_moments(model: CovarianceModule, folder: Path) -> None:
    """Write the second moments that were computed in that form too."""
    sites = {site.layer: site for site in model.sites()}
    for done in model.finished:
        path = export_npz(SecondMoment.load(done.path), folder, sites[done.layer])
        log.info("Layer %d: %s", done.layer, path)
