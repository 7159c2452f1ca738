"""The cache folder, and the installed versions of libraries."""

import os
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from rome_pl.files.whole_files import local_path

__all__ = ["cache_folder", "library_versions"]


def cache_folder() -> Path:
    """The folder for converted weights, statistics and measurements: ``ROME_PL_CACHE``, else the user cache."""
    configured = os.environ.get("ROME_PL_CACHE")
    return local_path(configured) if configured else user_cache_path("rome_pl")


def library_versions() -> dict[str, Any]:
    """Versions of the libraries that results depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("rome_pl", "torch", "lightning", "transformers", "safetensors")}
