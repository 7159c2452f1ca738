"""The arguments and the return value of EasyEdit's ``edit``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from rome_pl.errors import OptionError, named, shortened
from rome_pl.requests.clean_text import cut_edges, first_accepted
from rome_pl.requests.edit_request import EditRequest, Probe, RequestError
from rome_pl.utils.did_you_mean import did_you_mean

__all__ = ["ELSEWHERE", "EasyEditResult", "accumulates", "easyedit_requests", "place_errors"]


class EasyEditResult(NamedTuple):
    """The result of EasyEdit's ``edit``, in its order.

    Args:
        metrics: One entry per fact, with ``pre`` and ``post``.
        model: The model, with the edits in it.
        undo: Undoes the edits of this call. EasyEdit returns a copy of the weights here.
    """

    metrics: list[dict[str, Any]]
    model: Any
    undo: Callable[[], None]


ELSEWHERE = {
    "requests": "give prompts, target_new and subject",
    "verbose": "nothing is printed; look at the metrics",
    "target_neg": "rank-one edits have no use for it",
    "loc_prompts": "rank-one edits have no use for it",
    "train_ds": "rank-one edits have no use for it",
    "eval_metric": "answers are always measured token by token, teacher-forced",
    "test_generation": "fluency is measured by rome-pl evaluate",
    "metric_kwargs": "no sentence metric is measured",
    "pre_edit": "the model is always measured before",
    "pre_file": "write what the metrics hold",
}
"""Arguments of EasyEdit's ``edit`` that have no meaning here, with what to do instead."""

# Names of a request's fields in EasyEdit.
_WRITTEN = {
    "prompt": "prompts",
    "target_true": "ground_truth",
    "paraphrases": "rephrase_prompts",
    "locality": "locality_inputs",
    "portability": "portability_inputs",
}
_KNOWN = {*_WRITTEN.values(), "target_new", "subject", "sequential_edit", "keep_original_weight", "verify"}


def easyedit_requests(
    prompts: str | Sequence[str],
    target_new: str | Sequence[str],
    subject: str | Sequence[str],
    ground_truth: str | Sequence[str | None] | None = None,
    rephrase_prompts: str | Sequence[str | Sequence[str] | None] | None = None,
    locality_inputs: Mapping[str, Any] | None = None,
    portability_inputs: Mapping[str, Any] | None = None,
    *,
    first: int = 0,
    **others: Any,
) -> list[EditRequest]:
    """Make requests from the arguments of EasyEdit's ``edit``: lists with one entry per fact, or texts for one fact.

    Args:
        prompts: Texts that end right before the answers.
        target_new: The answers that the model should give.
        subject: The entities, each exactly as in its prompt.
        ground_truth: The answers before; an entry may be ``None``. Empty text and ``<|endoftext|>``, here and as an
            answer below, mean no answer.
        rephrase_prompts: Paraphrases; an entry may be a list of several, or ``None``.
        locality_inputs: By kind ``{"prompt": ..., "ground_truth": ...}`` of unrelated facts; an entry of either may be
            a list of several, or ``None``.
        portability_inputs: By kind the same for consequences of the new fact.
        first: ``case_id`` of the first request.
        others: Other arguments, which are refused with the reason.

    Raises:
        RequestError: If a request is not valid, naming argument and position.
        OptionError: If an argument has no meaning here.
    """
    for name in others:
        raise OptionError(f"{named(name)}: {ELSEWHERE.get(name) or f'no argument of edit{did_you_mean(name, _KNOWN)}'}")
    number = 1 if isinstance(prompts, str) or not isinstance(prompts, Sequence) else len(prompts)
    if not number:
        raise RequestError("prompts", "is empty; give at least one")
    for name, value in (("target_new", target_new), ("subject", subject)):
        if value is None:
            raise RequestError(name, "is missing; an edit needs one for each prompt")
    nothing = [None] * number
    columns = zip(
        _entries("prompts", prompts, number),
        _entries("target_new", target_new, number),
        _entries("subject", subject, number),
        nothing if ground_truth is None else _entries("ground_truth", ground_truth, number),
        nothing if rephrase_prompts is None else _entries("rephrase_prompts", rephrase_prompts, number),
        _probes("locality_inputs", locality_inputs or {}, number),
        _probes("portability_inputs", portability_inputs or {}, number),
        strict=True,
    )
    requests = []
    for place, (prompt, new, entity, true, rephrased, locality, portability) in enumerate(columns):
        with place_errors(place):
            request = EditRequest(
                prompt=prompt,
                subject=entity,
                target_new=new,
                target_true=true,
                paraphrases=[rephrased] if isinstance(rephrased, str) else rephrased or (),
                locality=locality,
                portability=portability,
                case_id=first + place,
            )
        requests.append(request)
    return requests


def accumulates(sequential_edit: bool | None, keep_original_weight: bool | None) -> bool:
    """Whether edits stay in the model; by default they do.

    Args:
        sequential_edit: Whether they do.
        keep_original_weight: Whether they do not.

    Raises:
        OptionError: If the two contradict each other, or are not booleans.
    """
    given = {"sequential_edit": sequential_edit, "keep_original_weight": keep_original_weight}
    for name, value in given.items():
        if value is not None and not isinstance(value, bool):
            raise OptionError(f"{name}: expected true, false or nothing, got {shortened(value)}")
    if sequential_edit is not None and sequential_edit is keep_original_weight:
        raise OptionError(f"sequential_edit and keep_original_weight are opposites; both are {sequential_edit}")
    return sequential_edit is not False and keep_original_weight is not True


@contextmanager
def place_errors(place: int) -> Iterator[None]:
    """Let errors about a request's field name EasyEdit's argument and the position in it."""
    try:
        yield
    except RequestError as error:
        name, dot, rest = error.field.partition(".")
        raise RequestError(f"{_WRITTEN.get(name, name)}[{place}]{dot}{rest}", error.message) from None


def _entries(name: str, value: object, number: int) -> list[Any]:
    """Return an argument's entries, one for each prompt."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence):
        raise RequestError(name, f"expected text or a list of texts, got {type(value).__name__}")
    if len(values) != number:
        raise RequestError(
            name,
            f"has {len(values)} entries for {number} prompts; give one for each (several for one fact are a list in "
            "the list)",
        )
    return list(values)


def _probes(name: str, inputs: Mapping[str, Any], number: int) -> list[list[Probe]]:
    """Return the probes of each fact: by kind, prompts with answers."""
    if not isinstance(inputs, Mapping):
        raise RequestError(name, f"expected kinds with prompt and ground_truth, got {type(inputs).__name__}")
    found: list[list[Probe]] = [[] for _ in range(number)]
    for kind, given in inputs.items():
        where = f"{name}[{shortened(kind)}]"
        if not isinstance(given, Mapping) or set(given) != {"prompt", "ground_truth"}:
            raise RequestError(where, f"expected a mapping with prompt and ground_truth, got {shortened(given)}")
        prompts = _entries(f"{where}['prompt']", given["prompt"], number)
        answers = _entries(f"{where}['ground_truth']", given["ground_truth"], number)
        for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if prompt is None:
                continue
            several = [prompt] if isinstance(prompt, str) else prompt
            wanted = [answer] if isinstance(prompt, str) else answer
            if not isinstance(several, Sequence) or not isinstance(wanted, Sequence) or isinstance(wanted, str):
                raise RequestError(f"{where}[{place}]", "expected texts, or lists of texts, as prompt and ground_truth")
            if len(several) != len(wanted):
                raise RequestError(f"{where}[{place}]", f"has {len(several)} prompts and {len(wanted)} answers")
            firsts = [first_accepted(its) for its in wanted]
            # A request leaves out a prompt with an empty answer, and notes it.
            for part, texts in (("prompt", several), ("ground_truth", firsts)):
                if not all(isinstance(text, str) and (part != "prompt" or cut_edges(text)[1]) for text in texts):
                    raise RequestError(
                        f"{where}['{part}'][{place}]", "is empty or no text; give it, or None as the prompt"
                    )
            found[place] += [Probe(one, its, str(kind)) for one, its in zip(several, firsts, strict=True)]
    return found
