"""What all edits of a run share, made once: statistics, contexts, the weight's master, and how to run suffixes."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import repeat
from typing import Any

from rome_pl.architecture import RewriteSite
from rome_pl.contexts import generate_contexts, join_contexts
from rome_pl.distributed import check_strategy
from rome_pl.edited_layers import EditedLayers
from rome_pl.encoding import EncodedEdit
from rome_pl.errors import OptionError
from rome_pl.language_model import LanguageModel
from rome_pl.metric import make_metric
from rome_pl.rank_one import PRESETS
from rome_pl.requests import EditRequest, RequestError
from rome_pl.second_moment import SecondMoment
from rome_pl.session import EditSession
from rome_pl.statistics import resolve_second_moments
from rome_pl.weights import EditedWeight

__all__ = [
    "admit_requests",
    "check_joint_solve",
    "check_trainer",
    "conflicts",
    "prepare_session",
    "touched_neighbours",
]

log = logging.getLogger(__name__)


def check_trainer(trainer: Any, sequential: bool) -> None:
    """Refuse Trainers that would edit something else than was asked for.

    Raises:
        OptionError: With the setting that works.
    """
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


def prepare_session(
    language_model: LanguageModel, sites: Sequence[RewriteSite], options: Mapping[str, Any]
) -> EditSession:
    """Prepare a session from the options of :class:`rome_pl.RomeModule`.

    Raises:
        StatisticsError: If the configured statistics do not fit, or the corpus cannot be read.
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
        layers=EditedLayers(list(map(EditedWeight, sites, metrics)), moments),
        preset=preset,
        sequential=options["sequential_edit"],
        fact_token=options["fact_token"],
        contexts=join_contexts(contexts),
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
        size: Edits of the batch.

    Raises:
        OptionError: If the preset asserts values at other keys than those that shape its updates.
    """
    if session.preset.shape != session.preset.at:
        name = next(name for name, preset in PRESETS.items() if preset == session.preset)
        raise OptionError(
            f"preset {name} asserts values at other keys than those that shape its updates, which several edits at "
            "once cannot do; use data.batch_size: 1, or preset r_rome"
        )
    if not session.edits:
        log.warning(
            "Sequential edits in batches of %d: the values of a batch are optimised on the same weights and solved "
            "jointly, which is not what edits one after the other give",
            size,
        )


def touched_neighbours(requests: Sequence[EditRequest], subjects: Set[str]) -> dict[str, tuple[bool, ...]]:
    """Which neighbourhood prompts that are measured name a subject that another request edits, by name of the edit.

    Args:
        requests: The requests whose prompts are looked at.
        subjects: Those of the whole stream.
    """
    found: dict[str, tuple[bool, ...]] = {}
    for request in requests:
        if request.target_true is None:  # nothing to measure after its neighbours
            continue
        others = subjects - {request.subject}
        marks = tuple(
            any(subject in prompt and _names(prompt, subject) for subject in others) for prompt in request.neighbours
        )
        if any(marks):
            found[str(request.case_id)] = marks
    return found


def conflicts(requests: Sequence[EditRequest]) -> dict[str, str]:
    """What is odd about requests in the light of those before them in a stream, by name of the edit.

    Two requests are about one fact if they have the same subject and the same prompt, or the same relation. The later
    one contradicts the earlier or repeats it.

    Args:
        requests: The stream.
    """
    found: dict[str, str] = {}
    earlier: dict[tuple[str, str, str], EditRequest] = {}
    for request in requests:
        facts = [(request.subject, "prompt", request.prompt)]
        if request.relation is not None:
            facts.append((request.subject, "relation", request.relation))
        for fact in facts:
            other = earlier.get(fact)
            if other is not None and other.target_new == request.target_new:
                found[str(request.case_id)] = f"asks for what record {other.case_id} asks for already"
            elif other is not None:
                found[str(request.case_id)] = (
                    f"contradicts record {other.case_id}, which asks for {other.target_new!r} of the same subject and "
                    f"{fact[1]}: the later edit wins, and the earlier one counts as lost"
                )
            if str(request.case_id) in found:
                break
        earlier.update(dict.fromkeys(facts, request))
    return found


def _names(prompt: str, subject: str) -> bool:
    """Whether a subject stands in a prompt as whole words."""
    return re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt) is not None
