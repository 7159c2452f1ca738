"""What all edits of a run share, made once: statistics, contexts, the weight's master, and how to run suffixes."""

import logging
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any, Literal

from rome_pl.editing.session import EditSession
from rome_pl.errors import OptionError
from rome_pl.model.architecture import RewriteSite
from rome_pl.model.language_model import LanguageModel
from rome_pl.search.context_templates import generate_contexts, join_contexts
from rome_pl.second_moments.moment_store import resolve_second_moments
from rome_pl.second_moments.second_moment import SecondMoment
from rome_pl.write.edited_layers import EditedLayers
from rome_pl.write.edited_weight import EditedWeight
from rome_pl.write.key_metric import make_metric
from rome_pl.write.presets import PRESETS

__all__ = ["check_limits", "prepare_session"]

log = logging.getLogger(__name__)


def check_limits(trainer: Any, loop: Literal["fit", "predict"] = "fit") -> None:
    """Refuse limits of a Trainer under which nothing would be done.

    Args:
        trainer: The Trainer.
        loop: Which of its loops is to run: edits are made by ``fit``, all else by ``predict``.

    Raises:
        OptionError: With the option.
    """
    if loop == "predict":
        if trainer.limit_predict_batches == 0:
            raise OptionError("trainer.limit_predict_batches: 0 ends the run before anything is done; leave it out")
        return
    left = [callback.time_remaining() for callback in trainer.callbacks if hasattr(callback, "time_remaining")]
    limits = {
        "max_time": min((seconds for seconds in left if seconds is not None), default=1.0),
        "max_steps": trainer.max_steps,
        "limit_train_batches": trainer.limit_train_batches,
    }
    if ended := [name for name, limit in limits.items() if limit == 0]:
        raise OptionError(f"trainer.{ended[0]}: 0 ends the stream before its first edit; leave it out")


def prepare_session(
    language_model: LanguageModel, sites: Sequence[RewriteSite], main: Sequence[int], options: Mapping[str, Any]
) -> EditSession:
    """Prepare a session.

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
    return EditSession(
        language_model=language_model,
        layers=EditedLayers(list(map(EditedWeight, sites, metrics)), moments, main),
        preset=preset,
        sequential=options["sequential_edit"],
        fact_token=options["fact_token"],
        contexts=join_contexts(contexts),
        largest_update=options["largest_update"],
        anchor_norm=options["anchor_norm"],
    )
