"""What all edits of a run share, made once: statistics, contexts, the weight's master, and how to run suffixes."""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any, Literal

import torch

from rome_pl.architecture import RewriteSite
from rome_pl.contexts import generate_contexts, join_contexts
from rome_pl.distributed import check_strategy
from rome_pl.edited_layers import EditedLayers
from rome_pl.errors import OptionError
from rome_pl.language_model import LanguageModel
from rome_pl.metric import make_metric
from rome_pl.rank_one import PRESETS
from rome_pl.related_requests import touched_neighbours
from rome_pl.requests import EditRequest, RequestError
from rome_pl.rows import EncodedEdit
from rome_pl.second_moment import SecondMoment
from rome_pl.session import EditSession
from rome_pl.statistics import resolve_second_moments
from rome_pl.weights import EditedWeight

__all__ = [
    "admit_requests",
    "check_joint_solve",
    "check_limits",
    "check_trainer",
    "prepare_session",
]

log = logging.getLogger(__name__)


def check_trainer(trainer: Any, sequential: bool) -> None:
    """Refuse Trainers that would edit something else than was asked for.

    Raises:
        OptionError: With the setting that works.
    """
    if torch.is_inference_mode_enabled():
        raise OptionError("inside torch.inference_mode() nothing can be optimised: call Trainer.fit outside of it")
    check_strategy(trainer.strategy)
    if trainer.max_epochs != 1:
        raise OptionError(
            f"max_epochs is {trainer.max_epochs}: the stream of edits runs once. Use Trainer(max_epochs=1)"
        )
    if trainer.world_size > 1 and sequential:
        raise OptionError(
            f"{trainer.world_size} devices cannot share a sequential stream: each edit starts from the weights that "
            "the one before left. Use Trainer(devices=1), or sequential_edit: false"
        )
    if trainer.precision not in ("32-true", "bf16-mixed"):
        raise OptionError(
            f"precision is {trainer.precision}: use '32-true', or 'bf16-mixed' to optimise values under autocast, "
            "and set the weights' precision by model.dtype"
        )
    if trainer.strategy.root_device.type == "mps":
        raise OptionError("Apple's MPS has no float64, in which edits are solved; use Trainer(accelerator='cpu')")


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


def admit_requests(
    session: EditSession, requests: Sequence[EditRequest], encode: Callable[[EditRequest], EncodedEdit]
) -> tuple[dict[str, int], dict[str, RequestError], list[int]]:
    """Encode every request and its probes once, so that what cannot be edited is known before the first edit.

    Args:
        session: Gets the valid requests.
        requests: The stream.
        encode: Encodes one.

    Returns:
        The place in the stream of every request, and why some are refused, both by name; and the number of tokens from
        the lookup token on, 0 for a refused one.

    Raises:
        RequestError: If two requests have one name.
    """
    places: dict[str, int] = {}
    refused: dict[str, RequestError] = {}
    valid: list[EditRequest] = []
    lengths: list[int] = []
    for place, request in enumerate(requests):
        name = str(request.case_id)
        if name in places:
            raise RequestError("case_id", "occurs twice: results could not be told apart", case_id=request.case_id)
        places[name] = place
        lengths.append(0)
        try:
            encoded = encode(request)
            session.language_model.encoder.check_probes(request)
            valid.append(request)
            lengths[-1] = max(len(row.ids) - row.lookup for row in encoded.rows)
        except RequestError as error:
            refused[name] = error
    session.requests, session.num_refused = tuple(valid), len(refused)
    session.touched = touched_neighbours(valid, {request.subject for request in valid}) if session.sequential else {}
    return places, refused, lengths


def check_joint_solve(session: EditSession, size: int) -> None:
    """Refuse what sequential batches cannot do, and say before the first what they do.

    Args:
        session: The run.
        size: Most edits of a batch.

    Raises:
        OptionError: If the preset asserts values at other keys than those that shape its updates.
    """
    if session.preset.shape != session.preset.at:
        name = next(name for name, preset in PRESETS.items() if preset == session.preset)
        raise OptionError(
            f"preset {name} asserts values at other keys than those that shape its updates, which several edits at "
            "once cannot do; use data.batch_size: 1, or preset r_rome"
        )
    log.warning(
        "Sequential edits in batches of %d: the values of a batch are optimised on the same weights and solved "
        "jointly, which is not what edits one after the other give",
        size,
    )
