"""Files of edit requests: reading them, recognising their form, turning each record into an :class:`EditRequest`.

Known are CounterFact as published (Meng et al. 2022, section 3.2), zsRE's evaluation form (Mitchell et al. 2022),
KnowEdit's (Zhang et al. 2024), EasyEdit's flat form, and a short list.
A record that cannot be used becomes an :class:`InvalidRecord`; the others are not lost.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from rome_pl.errors import RomeError
from rome_pl.requests import EditRequest, Probe, RequestError

__all__ = ["SUFFIXES", "DataError", "InvalidRecord", "parse_records", "read_records"]


SUFFIXES = (".json", ".jsonl", ".yaml", ".yml")
"""Files that hold records."""


class DataError(RomeError):
    """A file or data set that cannot be used at all."""


@dataclass(frozen=True)
class InvalidRecord:
    """A record that was skipped, with the reason."""

    index: int
    case_id: str | int | None
    field: str
    message: str


@dataclass(frozen=True)
class _Malformed:
    """A line that is no record; kept in place so that positions stay those of the file."""

    place: str
    message: str


def read_records(path: str | Path) -> list[Any]:
    """Read the raw records of a JSON, JSONL or YAML file.

    Args:
        path: File ending in ``.json``, ``.jsonl``, ``.yaml`` or ``.yml``.

    Returns:
        One entry per record, in file order. A malformed JSONL line is kept as a marker that
        :func:`parse_records` reports as an invalid record.

    Raises:
        DataError: If the file is missing, not UTF-8, not parseable as a whole, empty, or no list of records.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a JSON, JSONL or YAML file of edit requests")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    match path.suffix.lower():
        case ".jsonl":
            records = _read_json_lines(path, text)
        case ".json":
            try:
                records = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}: malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}"
                ) from error
        case ".yaml" | ".yml":
            try:
                records = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError) as error:  # ValueError: an unquoted date such as 2024-13-45
                raise DataError(f"{path}: malformed YAML: {error}") from error
        case suffix:
            raise DataError(f"{path}: unknown file type '{suffix}'; expected one of {', '.join(SUFFIXES)}")
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list of records, got {type(records).__name__}")
    if not records:
        raise DataError(f"{path}: holds no records")
    return records


def _read_json_lines(path: Path, text: str) -> list[Any]:
    records: list[Any] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            place = f"{path}, line {number}"
            records.append(_Malformed(place, f"malformed JSON at column {error.colno}: {error.msg}"))
    return records


def parse_records(
    records: Iterable[Any], source: str, form: str | None = None
) -> tuple[list[EditRequest], list[InvalidRecord]]:
    """Turn raw records into requests.

    Args:
        records: Mappings, as :func:`read_records` or a ``datasets`` data set gives them.
        source: File or data set name, for error messages.
        form: ``counterfact``, ``zsre``, ``knowedit``, ``flat`` or ``short``; ``None`` recognises it from the first
            record.

    Returns:
        The valid requests in order, and the records that were refused with the field and reason.

    Raises:
        DataError: If the form is unknown; the message lists the fields seen.
    """
    if form is not None and form not in _FORMS:
        raise DataError(f"form: expected one of {sorted(_FORMS)}, got {form!r}")
    requests: list[EditRequest] = []
    invalid: list[InvalidRecord] = []
    seen: set[str] = set()
    for index, record in enumerate(records):
        if isinstance(record, _Malformed):
            invalid.append(InvalidRecord(index, None, "(line)", f"{record.place}: {record.message}"))
            continue
        if not isinstance(record, Mapping):
            message = f"{source}, record {index}: expected a mapping of fields, got {type(record).__name__}"
            invalid.append(InvalidRecord(index, None, "(record)", message))
            continue
        form = form or _recognise(record, source)
        case_id = record.get("case_id", index)
        try:
            if not isinstance(case_id, int | str):
                raise RequestError("case_id", f"expected a number or text, got {type(case_id).__name__}")
            if str(case_id) in seen:
                raise RequestError("case_id", f"{case_id!r} occurs twice; results could not be told apart")
            values = _FORMS[form](record)
            requests.append(EditRequest(case_id=case_id, source=source, **values))
            seen.add(str(case_id))
        except RequestError as error:
            field = _WRITTEN.get(form, {}).get(error.field, error.field)
            complete = RequestError(field, error.message, case_id=str(case_id), source=source)
            invalid.append(InvalidRecord(index, str(case_id), field, str(complete)))
    return requests, invalid


_SHORT_FIELDS = {field.name for field in fields(EditRequest)} - {"source"}
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
        f"{source}: unknown form of record, with the fields {sorted(map(str, record))}. Known forms: CounterFact "
        "('requested_rewrite', …), zsRE ('src', 'alt', …), KnowEdit ('locality', 'portability', …), EasyEdit's flat "
        "form ('prompt', 'subject', 'target_new', 'ground_truth', …), and "
        "the short form ('prompt', 'subject', 'target_new', optional 'target_true', 'paraphrases', 'neighbours')"
    )


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
        raise RequestError(parent + "prompt", f"expected exactly one '{{}}' in the template, got {template!r}")
    if not subject.strip():
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
    truth = record.get("ground_truth")
    shares_answer = truth is not None and record.get("locality_ground_truth") == truth
    return {
        "prompt": _required(record, "prompt"),
        "subject": _required(record, "subject"),
        "target_new": _required(record, "target_new"),
        "target_true": truth,
        "neighbours": _prompts(record, "locality_prompt") if shares_answer else (),
    }


def _from_zsre(record: Mapping[str, Any]) -> dict[str, Any]:
    new = _required(record, "alt")
    portability = record.get("portability")
    follow_up = portability if isinstance(portability, Mapping) else {}
    return {
        "prompt": _required(record, "src"),
        "subject": _required(record, "subject"),
        "target_new": new,
        "target_true": _other_than(new, record.get("answers")),
        "paraphrases": _prompts(record, "rephrase"),
        "locality": _probes([{"prompt": record.get("loc"), "answer": record.get("loc_ans")}], "answer", "locality"),
        "portability": _probes(
            [{"prompt": follow_up.get("New Question"), "answer": follow_up.get("New Answer")}], "answer", "portability"
        ),
    }


def _from_knowedit(record: Mapping[str, Any]) -> dict[str, Any]:
    new = _required(record, "target_new")
    probes: dict[str, tuple[Probe, ...]] = {}
    for name in ("locality", "portability"):
        kinds = record.get(name) or {}
        if not isinstance(kinds, Mapping):
            raise RequestError(name, f"expected kinds with lists of prompts, got {type(kinds).__name__}")
        probes[name] = tuple(
            probe
            for kind, entries in kinds.items()
            for probe in _probes(entries or (), "ground_truth", f"{name}.{kind}", kind)
        )
    return {
        "prompt": _required(record, "prompt"),
        "subject": _required(record, "subject"),
        "target_new": new,
        "target_true": _other_than(new, record.get("ground_truth")),
        "paraphrases": _prompts(record, "rephrase_prompt") or _prompts(record, "rephrase"),
        **probes,
    }


def _other_than(new: Any, answers: Any) -> str | None:
    """The first of several accepted answers that is not the new one."""
    accepted = [answers] if isinstance(answers, str) else answers or []
    if not isinstance(accepted, Sequence) or not all(isinstance(answer, str) for answer in accepted):
        raise RequestError("target_true", f"expected text or a list of texts, got {answers!r}")
    return next((answer for answer in accepted if answer.strip() and answer.strip() != str(new).strip()), None)


def _probes(entries: Any, answer_name: str, field: str, kind: str = "") -> tuple[Probe, ...]:
    """Prompts with answers; of several accepted answers the first. An entry without both is none."""
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise RequestError(field, f"expected a list of prompts, got {type(entries).__name__}")
    probes = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise RequestError(field, f"expected a prompt with its answer, got {type(entry).__name__}")
        prompt, answer = entry.get("prompt"), entry.get(answer_name)
        while isinstance(answer, list) and answer:
            answer = answer[0]
        if isinstance(prompt, str) and isinstance(answer, str) and prompt.strip() and answer.strip():
            probes.append(Probe(prompt, answer, kind))
    return tuple(probes)


def _from_short(record: Mapping[str, Any]) -> dict[str, Any]:
    unknown = set(map(str, record)) - _SHORT_FIELDS
    if unknown:
        name = sorted(unknown)[0]
        raise RequestError(name, f"unknown field; known fields are {sorted(_SHORT_FIELDS)}")
    for name in ("prompt", "subject", "target_new"):
        _required(record, name)
    values = {name: value for name, value in record.items() if name != "case_id" and value is not None}
    return values | {
        name: _prompts(record, name) for name in ("paraphrases", "neighbours", "generation_prompts", "references")
    }


# What the fields of a request are called in the file, where the names differ.
_WRITTEN = {
    "counterfact": {
        "target_new": "requested_rewrite.target_new",
        "target_true": "requested_rewrite.target_true",
        "paraphrases": "paraphrase_prompts",
        "neighbours": "neighborhood_prompts",
        "generation_prompts": "generation_prompts",
    },
    "flat": {"target_true": "ground_truth", "neighbours": "locality_prompt"},
    "zsre": {"prompt": "src", "target_new": "alt", "target_true": "answers", "paraphrases": "rephrase"},
    "knowedit": {"target_true": "ground_truth", "paraphrases": "rephrase_prompt"},
}
_FORMS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "counterfact": _from_counterfact,
    "flat": _from_flat,
    "knowedit": _from_knowedit,
    "zsre": _from_zsre,
    "short": _from_short,
}
