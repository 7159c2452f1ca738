"""Recognising the form of records, and turning each into an :class:`EditRequest`.

Known forms are CounterFact as published (Meng et al. 2022, section 3.2), zsRE's evaluation form (Mitchell et al. 2022),
KnowEdit's (Zhang et al. 2024), EasyEdit's flat form, and a short form. A record that cannot be used becomes an
:class:`InvalidRecord`; the others are kept.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rome_pl.errors import named, shortened
from rome_pl.requests.clean_text import cut_edges, first_accepted, no_answer
from rome_pl.requests.edit_request import EditRequest, Probe, RequestError
from rome_pl.requests.record_files import SUFFIXES, DataError, Malformed, read_records

__all__ = ["SUFFIXES", "DataError", "InvalidRecord", "parse_records", "read_records"]

MOST_LISTED, LONGEST_LIST = 30, 200
"""Largest number of fields in an error, and of characters of their list."""


@dataclass(frozen=True)
class InvalidRecord:
    """A record that was skipped, with the reason."""

    index: int
    case_id: str | int | None
    field: str
    message: str


def parse_records(
    records: Iterable[Any], source: str, form: str | None = None
) -> tuple[list[EditRequest], list[InvalidRecord]]:
    """Turn raw records into requests.

    Args:
        records: Mappings, as :func:`read_records` or a ``datasets`` data set gives them.
        source: File or data set name, for error messages.
        form: ``counterfact``, ``zsre``, ``knowedit``, ``flat`` or ``short``. ``None`` (default): recognised from the
            first record.

    Returns:
        The valid requests in order, and the refused records, each with field and reason.

    Raises:
        DataError: If the form is unknown; the message lists the fields seen.
    """
    if form is not None and form not in _FORMS:
        raise DataError(f"form: expected one of {sorted(_FORMS)}, got {form!r}")
    requests: list[EditRequest] = []
    invalid: list[InvalidRecord] = []
    seen: set[str] = set()
    for index, record in enumerate(records):
        if isinstance(record, Malformed):
            invalid.append(InvalidRecord(index, None, record.field, f"{record.place}: {record.message}"))
            continue
        if not isinstance(record, Mapping):
            message = f"{source}, record {index}: expected a mapping of fields, got {type(record).__name__}"
            invalid.append(InvalidRecord(index, None, "(record)", message))
            continue
        form = form or _recognise(record, source)
        case_id = record.get("case_id", index)
        name = case_id if isinstance(case_id, str) and case_id.isprintable() else shortened(case_id)
        try:
            values = _FORMS[form](record)
            left_out = values.pop("left_out", {})
            request = EditRequest(case_id=case_id, source=source, **values)
            written = _WRITTEN.get(form, {})
            request = request.noted(f"{written.get(field, field)}: {reason}" for field, reason in left_out.items())
            if (name := str(request.case_id)) in seen:
                raise RequestError("case_id", f"{request.case_id!r} occurs twice; results could not be told apart")
            requests.append(request)
            seen.add(name)
        except RequestError as error:
            field = _WRITTEN.get(form, {}).get(error.field, error.field)
            complete = RequestError(field, error.message, case_id=name, source=source)
            invalid.append(InvalidRecord(index, name[:80], field, str(complete)))
    return requests, invalid


_SHORT_FIELDS = {field.name for field in fields(EditRequest) if field.init} - {"source"}
_FLAT_ONLY = {"ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth"}


def _recognise(record: Mapping[str, Any], source: str) -> str:
    if "requested_rewrite" in record:
        return "counterfact"
    if {"src", "alt", "subject"} <= set(record):
        return "zsre"
    if {"prompt", "subject", "target_new"} <= set(record):
        if any(isinstance(record.get(name), Mapping) for name in ("locality", "portability")):
            return "knowedit"
        return "flat" if _FLAT_ONLY & set(record) else "short"
    raise DataError(
        f"{source}: unknown form of record, with the fields {_listed(map(named, record))}. Known forms: "
        "CounterFact ('requested_rewrite', …), zsRE ('src', 'alt', …), KnowEdit ('locality', 'portability', …), "
        "EasyEdit's flat form ('prompt', 'subject', 'target_new', 'ground_truth', …), and "
        "the short form ('prompt', 'subject', 'target_new', optional 'target_true', 'paraphrases', 'neighbours')"
    )


def _listed(names: Iterable[str]) -> str:
    """Sorted names, shortened for a message."""
    every = sorted(names)
    shown = every[:MOST_LISTED]
    while len(shown) > 1 and len(str(shown)) > LONGEST_LIST:
        shown.pop()
    return str(shown) + (f" and {len(every) - len(shown)} more" if len(every) > len(shown) else "")


def _required(record: Mapping[str, Any], name: str, parent: str = "") -> Any:
    if record.get(name) is None:
        raise RequestError(parent + name, "is missing")
    return record[name]


def _prompts(record: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = record.get(name)
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


def _from_counterfact(record: Mapping[str, Any]) -> dict[str, Any]:
    rewrite = _required(record, "requested_rewrite")
    if not isinstance(rewrite, Mapping):
        raise RequestError("requested_rewrite", f"expected a mapping, got {type(rewrite).__name__}")
    parent = "requested_rewrite."
    template, subject = _required(rewrite, "prompt", parent), _required(rewrite, "subject", parent)
    if not isinstance(template, str) or not isinstance(subject, str):
        raise RequestError(parent + "prompt", "prompt and subject must be text")
    if template.count("{}") != 1:
        raise RequestError(parent + "prompt", f"expected exactly one '{{}}' in the template, got {shortened(template)}")
    if not cut_edges(subject)[1]:
        raise RequestError(parent + "subject", "is empty; give the text or remove the record")
    head, tail = template.split("{}")
    targets = {}
    for name in ("target_new", "target_true"):
        target = rewrite.get(name)
        if target is None and name == "target_true":
            continue
        if not isinstance(target, Mapping) or "str" not in target:
            raise RequestError(parent + name, "expected a mapping with the text under 'str'")
        targets[name] = target["str"]
    return {
        "prompt": head + subject + tail,
        "subject": subject,
        "subject_span": (len(head), len(head) + len(subject)),
        "paraphrases": _prompts(record, "paraphrase_prompts"),
        "neighbours": _prompts(record, "neighborhood_prompts"),
        "generation_prompts": _prompts(record, "generation_prompts"),
        "relation": rewrite.get("relation_id"),
        **targets,
    }


def _from_flat(record: Mapping[str, Any]) -> dict[str, Any]:
    # The flat form's rephrase_prompt is most often one of CounterFact's generation prompts, not a paraphrase, so it
    # is not scored as one. Its locality prompt is a neighbour only if it shares the true answer.
    truth, theirs = record.get("ground_truth"), record.get("locality_ground_truth")
    shares_answer = (
        isinstance(truth, str)
        and isinstance(theirs, str)
        and not no_answer(truth)
        and cut_edges(truth)[1] == cut_edges(theirs)[1]
    )
    return {
        "prompt": _required(record, "prompt"),
        "subject": _required(record, "subject"),
        "target_new": _required(record, "target_new"),
        "target_true": truth,
        "neighbours": _prompts(record, "locality_prompt") if shares_answer else (),
    }


def _from_zsre(record: Mapping[str, Any]) -> dict[str, Any]:
    new = _required(record, "alt")
    left_out: dict[str, str] = {}
    follow_up = _or_none(record.get("portability"), {})
    if not isinstance(follow_up, Mapping):
        expected = f"expected 'New Question' and 'New Answer', got {type(follow_up).__name__}"
        follow_up, left_out["portability"] = {}, f"left out: {expected}"
    unrelated = [{"prompt": record.get("loc"), "answer": record.get("loc_ans")}]
    follows = [{"prompt": follow_up.get("New Question"), "answer": follow_up.get("New Answer")}]
    return {
        "prompt": _required(record, "src"),
        "subject": _required(record, "subject"),
        "target_new": new,
        "target_true": _other_than(new, record.get("answers")),
        "paraphrases": _prompts(record, "rephrase"),
        "locality": _probes(unrelated, "answer", "locality", left_out),
        "portability": _probes(follows, "answer", "portability", left_out),
        "left_out": left_out,
    }


def _from_knowedit(record: Mapping[str, Any]) -> dict[str, Any]:
    new = _required(record, "target_new")
    left_out: dict[str, str] = {}
    probes: dict[str, tuple[Probe, ...]] = {}
    for name in ("locality", "portability"):
        kinds = _or_none(record.get(name), {})
        if not isinstance(kinds, Mapping):
            raise RequestError(name, f"expected kinds with lists of prompts, got {type(kinds).__name__}")
        probes[name] = tuple(
            probe
            for kind, entries in kinds.items()
            for probe in _probes(_or_none(entries, ()), "ground_truth", f"{name}.{named(kind)}", left_out, kind)
        )
    return {
        "prompt": _required(record, "prompt"),
        "subject": _required(record, "subject"),
        "target_new": new,
        "target_true": _other_than(new, record.get("ground_truth")),
        "paraphrases": _prompts(record, "rephrase" if _is_none(record.get("rephrase_prompt")) else "rephrase_prompt"),
        "left_out": left_out,
        **probes,
    }


def _other_than(new: Any, answers: Any) -> str | None:
    """Return the first of several accepted answers that differs from the new one."""
    accepted = [answers] if isinstance(answers, str) else _or_none(answers, [])
    if not isinstance(accepted, Sequence) or not all(isinstance(answer, str) for answer in accepted):
        raise RequestError("target_true", f"expected text or a list of texts, got {shortened(answers)}")
    wanted = cut_edges(new)[1] if isinstance(new, str) else None
    return next((answer for answer in accepted if not no_answer(answer) and cut_edges(answer)[1] != wanted), None)


def _probes(entries: Any, answer_name: str, field: str, left_out: dict[str, str], kind: str = "") -> tuple[Probe, ...]:
    """Return prompts with the first of their accepted answers. Skip entries without a prompt or answer.

    If a prompt or answer is not text, such as a year without quotes, skip it and write the reason to ``left_out``.
    """
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise RequestError(field, f"expected a list of prompts, got {type(entries).__name__}")
    probes = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise RequestError(field, f"expected a prompt with its answer, got {type(entry).__name__}")
        prompt, answer = entry.get("prompt"), entry.get(answer_name)
        answer = first_accepted(answer)
        for part, text in (("prompt", prompt), (answer_name, answer)):
            if not isinstance(text, str) and not _is_none(text):
                left_out[f"{field}.{part}"] = f"left out: expected text, got {type(text).__name__}; put it in quotes"
        if isinstance(prompt, str) and isinstance(answer, str) and cut_edges(prompt)[1]:
            probes.append(Probe(prompt, answer, kind))
    return tuple(probes)


def _is_none(value: Any) -> bool:
    """Whether a field is empty: null, or an empty text, list or mapping. 0 and false are not empty."""
    return value is None or (isinstance(value, str | Sequence | Mapping) and not value)


def _or_none(value: Any, nothing: Any) -> Any:
    """Return a field's value, or ``nothing`` if it is empty."""
    return nothing if _is_none(value) else value


def _from_short(record: Mapping[str, Any]) -> dict[str, Any]:
    unknown = set(record) - _SHORT_FIELDS
    if unknown:
        name = min(map(named, unknown))
        raise RequestError(name, f"unknown field; known fields are {sorted(_SHORT_FIELDS)}")
    for name in ("prompt", "subject", "target_new"):
        _required(record, name)
    values = {name: value for name, value in record.items() if name != "case_id" and value is not None}
    return values | {
        name: _prompts(record, name) for name in ("paraphrases", "neighbours", "generation_prompts", "references")
    }


# Names of a request's fields in the file, where they differ.
_WRITTEN = {
    "counterfact": {
        "target_new": "requested_rewrite.target_new",
        "target_true": "requested_rewrite.target_true",
        "paraphrases": "paraphrase_prompts",
        "neighbours": "neighborhood_prompts",
        "generation_prompts": "generation_prompts",
    },
    "flat": {"target_true": "ground_truth", "neighbours": "locality_prompt"},
    "zsre": {
        "prompt": "src",
        "target_new": "alt",
        "target_true": "answers",
        "paraphrases": "rephrase",
        "locality.prompt": "loc",
        "locality.answer": "loc_ans",
        "portability.prompt": "portability.New Question",
        "portability.answer": "portability.New Answer",
    },
    "knowedit": {"target_true": "ground_truth", "paraphrases": "rephrase_prompt"},
}
_FORMS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "counterfact": _from_counterfact,
    "flat": _from_flat,
    "knowedit": _from_knowedit,
    "zsre": _from_zsre,
    "short": _from_short,
}
