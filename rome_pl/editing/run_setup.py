"""Everything that the edits of a run share, made once: statistics, contexts, the weights' masters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from rome_pl.encoding.text_encoder import FactToken
from rome_pl.errors import OptionError
from rome_pl.model.architecture import RewriteSite
from rome_pl.model.language_model import LanguageModel
from rome_pl.search.context_templates import generate_contexts, join_contexts
from rome_pl.second_moments.moment_store import resolve_second_moments
from rome_pl.second_moments.second_moment import SecondMoment
from rome_pl.write.edited_layers import EditedLayers
from rome_pl.write.edited_weight import EditedWeight
from rome_pl.write.key_metric import make_metric
from rome_pl.write.presets import PRESETS, Preset

__all__ = ["RunSetup", "prepare_run"]


@dataclass(frozen=True)
class RunSetup:
    """Everything that the edits of a run share and that is made before the first.

    Args:
        language_model: The model being edited.
        layers: The rewrite layers' weights with their edits.
        preset: The variant of the closed form.
        sequential: Whether edits accumulate.
        fact_token: Which token is looked up.
        contexts: Texts put before prompts, the empty one first.
        largest_update: Largest Frobenius norm of an edit's change of a layer, relative to the original weight.
            ``None`` (default): no limit.
        anchor_norm: Norm of every asserted value, see :meth:`rome_pl.write.edited_layers.EditedLayers.anchored`.
            ``None`` (default): values stay as they were found.
    """

    language_model: LanguageModel
    layers: EditedLayers
    preset: Preset
    sequential: bool
    fact_token: FactToken
    contexts: tuple[str, ...]
    largest_update: float | None = None
    anchor_norm: float | None = None


def prepare_run(
    language_model: LanguageModel, sites: Sequence[RewriteSite], main: Sequence[int], options: Mapping[str, Any]
) -> RunSetup:
    """Make what the edits of a run share: statistics, contexts, the weights' masters.

    Args:
        language_model: The model.
        sites: Every projection that an edit may be written into, the lowest first.
        main: The layers of those that edits write into unless they are searched again at others.
        options: Those of :class:`rome_pl.RomeModule`.

    Raises:
        StatisticsError: If the configured statistics do not fit, or the corpus cannot be read.
        OptionError: If an option needs statistics and there are none.
    """
    preset, adjust = PRESETS[options["preset"]], options["mom2_adjustment"]
    moments: list[SecondMoment] = []
    if preset.mom2_adjustment if adjust is None else adjust:
        moments = resolve_second_moments(
            language_model,
            sites,
            statistics=options["statistics"],
            corpus=options["corpus"],
            wanted=options["mom2_n_samples"],
            seed=options["seed"],
        )
    if options["anchor_norm"] is not None and not moments:
        raise OptionError(
            "anchor_norm: without the second moment of keys (this preset, or mom2_adjustment: false) nothing is known "
            "of an ordinary token's value; leave it out"
        )
    contexts = options["contexts"]
    if contexts is None:
        contexts = generate_contexts(language_model, options["context_template_length_params"], options["seed"])
    weight = options["mom2_update_weight"]
    metrics = [
        make_metric(
            preset.metric,
            moment,
            weight=preset.mom2_update_weight if weight is None else weight,
            ridge=options["L2"],
            threshold=options["nullspace_threshold"],
        )
        for moment in (moments or repeat(None, len(sites)))
    ]
    return RunSetup(
        language_model=language_model,
        layers=EditedLayers(list(map(EditedWeight, sites, metrics)), moments, main),
        preset=preset,
        sequential=options["sequential_edit"],
        fact_token=options["fact_token"],
        contexts=join_contexts(contexts),
        largest_update=options["largest_update"],
        anchor_norm=options["anchor_norm"],
    )
