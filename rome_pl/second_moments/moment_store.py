"""Finding the second moment that an edit needs: configured, shipped, cached, or computed."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from rome_pl.files.whole_files import local_path
from rome_pl.model.architecture import RewriteSite
from rome_pl.model.language_model import LanguageModel
from rome_pl.second_moments.corpus import Corpus
from rome_pl.second_moments.generated_corpus import GeneratedCorpus
from rome_pl.second_moments.moment_pass import KEYS_PER_DIMENSION, MomentPass, PassOptions
from rome_pl.second_moments.second_moment import MomentInfo, SecondMoment, StatisticsError
from rome_pl.second_moments.unfinished_sums import BusyError
from rome_pl.utils.console import progress_bar
from rome_pl.utils.environment import cache_folder
from rome_pl.utils.hashing import content_key

__all__ = [
    "artefact_path",
    "compute",
    "kept_statistics",
    "resolve_second_moments",
    "shipped_folder",
    "shipped_statistics",
    "statistics_files",
    "statistics_folder",
    "unfinished_folder",
]

WAIT = 5.0
"""Seconds between two checks whether another run has ended."""

log = logging.getLogger(__name__)


def statistics_folder() -> Path:
    """The default folder for second moments, below :func:`rome_pl.utils.environment.cache_folder`."""
    return cache_folder() / "statistics"


def unfinished_folder(folder: Path) -> Path:
    """The folder of the unfinished sums for artefacts in ``folder``."""
    return folder / "unfinished"


def artefact_path(
    folder: Path, language_model: LanguageModel, site: RewriteSite, corpus: Corpus, options: PassOptions
) -> Path:
    """Return the path for a second moment. Its name depends on everything that the content depends on.

    Memory options change only rounding and are left out.
    """
    key = content_key(
        language_model.moment_identity(site),
        site.layer,
        corpus.fingerprint,
        [options.tokens or KEYS_PER_DIMENSION * site.least_text, options.block_length],
        options.stop_agreement if options.split_half else None,
    )
    model = Path(language_model.source.replace(":", "/")).name.removesuffix(".gguf").replace(" ", "-")
    return folder / f"{model}.layer{site.layer}.{key}.safetensors"


def kept_statistics(folder: Path | None = None) -> Iterator[tuple[Path, MomentInfo | None]]:
    """Yield the artefacts in a folder with their descriptions; ``None`` for one that cannot be read."""
    for path in sorted((folder or statistics_folder()).glob("*.safetensors")):
        try:
            info = SecondMoment.read_info(path)
        except StatisticsError as error:
            log.warning("Passed over: %s", error)
            info = None
        yield path, info


def shipped_statistics() -> list[tuple[Path, MomentInfo]]:
    """Return the artefacts shipped with the package, with their descriptions.

    Raises:
        StatisticsError: If one is damaged. Using another one instead would give other edits.
    """
    paths = sorted(shipped_folder().glob("*.safetensors"))
    return [(path, SecondMoment.read_info(path)) for path in paths]


def shipped_folder() -> Path:
    """The folder of the files shipped with the package."""
    return Path(str(files("rome_pl") / "assets"))


def resolve_second_moments(
    language_model: LanguageModel,
    sites: Sequence[RewriteSite],
    *,
    statistics: str | Sequence[str] | None = None,
    corpus: str | None = None,
    wanted: int | None = None,
    seed: int = 0,
) -> list[SecondMoment]:
    """Return the second moment of each site's keys, on the model's device.

    The order is: the configured artefact; the artefact of the configured corpus, computed on first use; if no number of
    keys is given, the one shipped with the package for these weights, or the cached one computed from most keys; one
    computed from text that the model generates. Results are cached for these weights, text and number of keys.

    Args:
        language_model: The model.
        sites: The projections whose input is the key.
        statistics: Path of an artefact, or one path for each site in any order.
        corpus: Text, as in :class:`Corpus`.
        wanted: Number of key vectors to compute from. ``None`` (default): 30 per dimension.
        seed: Seed of a generated corpus.

    Raises:
        StatisticsError: If configured statistics are damaged or belong to another model or layer.
        CorpusError: If the corpus cannot be read.
    """
    found = statistics_files(language_model, sites, statistics=statistics, corpus=corpus, wanted=wanted, seed=seed)
    moments = []
    for site in sites:
        moment = SecondMoment.load(found[site.layer])  # as every later run will read it
        moment.check(**language_model.moment_identity(site), layer=site.layer, where=str(found[site.layer]))
        moments.append(moment.to(language_model.device))
    return moments


def statistics_files(
    language_model: LanguageModel,
    sites: Sequence[RewriteSite],
    *,
    statistics: str | Sequence[str] | None = None,
    corpus: str | None = None,
    wanted: int | None = None,
    seed: int = 0,
) -> dict[int, Path]:
    """Return the files that :func:`resolve_second_moments` reads, by layer. Compute missing ones in one pass.

    Arguments and errors are the same.
    """
    if statistics is not None:
        paths = [statistics] if isinstance(statistics, str) else list(statistics)
        found = _configured(paths, sites)
    elif corpus is None and wanted is None:
        found = _at_hand(sites, {site.layer: language_model.moment_identity(site) for site in sites})
    else:
        found = {}
    if missing := [site for site in sites if site.layer not in found]:
        found |= _of_text(language_model, missing, corpus, wanted, seed)
    return found


def _configured(paths: Sequence[str], sites: Sequence[RewriteSite]) -> dict[int, Path]:
    """The configured artefacts, by layer."""
    if len(paths) == len(sites) == 1:  # the check reports a wrong layer
        return {sites[0].layer: local_path(paths[0])}
    by_layer = {SecondMoment.read_info(path).layer: path for path in map(local_path, paths)}
    if missing := [site.layer for site in sites if site.layer not in by_layer]:
        raise StatisticsError(
            f"statistics: none of {', '.join(paths)} is of layer {missing[0]}; give one file for each rewrite layer"
        )
    return by_layer


def _at_hand(sites: Sequence[RewriteSite], identities: Mapping[int, Mapping[str, str]]) -> dict[int, Path]:
    """Shipped or cached artefacts, by layer."""
    kept = sorted(kept_statistics(), key=lambda pair: pair[1].count if pair[1] is not None else 0, reverse=True)
    found: dict[int, Path] = {}
    for path, info in (*shipped_statistics(), *kept):
        wanted = identities.get(info.layer) if info is not None else None
        if info is None or wanted is None or info.layer in found or info.weights != wanted["weights"]:
            continue
        if not info.config:
            log.warning(
                "Passed over: %s, of an earlier version, does not tell the config and the tokenizer's rules that it "
                "was computed with. To use it all the same, give it as statistics",
                path,
            )
        elif (info.config, info.tokenizer) == (wanted["config"], wanted["tokenizer"]):
            log.info("Second moment of layer %d: %d keys, from %s", info.layer, info.count, path)
            found[info.layer] = path
    return {site.layer: found[site.layer] for site in sites if site.layer in found}


def _of_text(
    language_model: LanguageModel, sites: Sequence[RewriteSite], corpus: str | None, wanted: int | None, seed: int
) -> dict[int, Path]:
    """Artefacts of a text, by layer. Compute those that are not in the cache in one pass."""
    text = (
        Corpus(corpus)
        if corpus is not None
        else GeneratedCorpus.of(language_model, wanted or KEYS_PER_DIMENSION * sites[0].least_text, seed)
    )
    options = PassOptions(tokens=wanted)
    paths = {site.layer: artefact_path(statistics_folder(), language_model, site, text, options) for site in sites}
    if missing := [site for site in sites if not paths[site.layer].is_file()]:
        if not language_model.as_first_seen:
            raise StatisticsError(
                f"layer {missing[0].layer} has no second moment yet, and one computed now would be of a model that was "
                "edited since it was loaded. Edit all layers at once (layers: [...]), give 'statistics', or run "
                "rome-pl covariance before"
            )
        compute(language_model, missing, text, options)
    return paths


def compute(
    language_model: LanguageModel,
    sites: Sequence[RewriteSite],
    corpus: Corpus,
    options: PassOptions | None = None,
    folder: Path | None = None,
) -> dict[int, Path]:
    """Compute second moments in this process and save them. Existing ones are kept.

    Waits while another process computes the same.

    Args:
        language_model: The model.
        sites: The projections whose input is the key.
        corpus: The text.
        options: Options of the pass. ``None`` (default): those of :class:`PassOptions`.
        folder: Folder of the artefacts. ``None`` (default): the cache.

    Returns:
        The artefact of each layer.
    """
    options, folder = options or PassOptions(), folder or statistics_folder()
    layers = ", ".join(str(site.layer) for site in sites)
    if isinstance(corpus, GeneratedCorpus) and not corpus.written:
        log.warning(
            "No statistics or corpus configured for layer %s: the model writes its own corpus of %d tokens first "
            "(once; kept in %s). A text file given as 'corpus' is quicker and closer to real text",
            layers,
            corpus.tokens,
            corpus.source,
        )
        corpus.write(language_model)
    started = time.monotonic()
    moments = _when_free(
        lambda: MomentPass(
            language_model,
            sites,
            corpus,
            options,
            lambda site: artefact_path(folder, language_model, site, corpus, options),
            unfinished_folder(folder),
        )
    )
    if not moments.groups:  # another run has computed them
        return {finished.layer: finished.path for finished in moments.finished}
    log.warning(
        "Computing the second moment of layer %s from %s (%d keys; once, kept in %s)",
        layers,
        corpus.source,
        moments.wanted,
        folder,
    )
    try:
        with progress_bar("second moment", moments.wanted * len(moments.groups), "keys") as advance:
            for block in moments.blocks():
                moments.step(block.to(language_model.device))
                advance(moments.packer.size)
    finally:
        moments.close()
    log.warning("Second moment of layer %s: %.0f s", layers, time.monotonic() - started)
    return {finished.layer: finished.path for finished in moments.finished}


def _when_free(begin: Callable[[], MomentPass]) -> MomentPass:
    waiting = False
    while True:
        try:
            return begin()
        except BusyError as error:
            if not waiting:
                log.warning("Waiting: %s", error)
            waiting = True
            time.sleep(WAIT)
