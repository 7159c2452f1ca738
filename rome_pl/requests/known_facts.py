"""Files of facts that a model may know: what causal tracing reads, where an edit's request asks for something new."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rome_pl.requests.clean_text import cut_edges, no_answer
from rome_pl.utils.hashing import hash_seed

__all__ = ["facts_to_requests"]

_KNOWN_ONLY = {"known_id", "attribute", "template", "prediction", "relation_id"}


def facts_to_requests(records: Sequence[Any], seed: int = 0) -> list[Any]:
    """Turn facts into records of the short form, each with a new target; all other records stay as they are.

    Facts are records in the form of ``known_1000.json`` (Meng et al. 2022: ``prompt``, ``subject``, ``attribute``), and
    those of the short form that have no ``target_new``. Their new target, for a trial edit, is another fact's answer:
    one of the same relation where there is one, else any other; drawn by the seed and the fact's own text.

    Args:
        records: What a file holds.
        seed: Seed of the draw.
    """
    facts = [_as_short(record) for record in records]
    answers: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        if _is_fact(fact) and isinstance(answer := fact.get("target_true"), str) and not no_answer(answer):
            answers[str(fact.get("relation"))].add(cut_edges(answer)[1])
    everything = {answer for group in answers.values() for answer in group}
    return [
        _with_target(fact, answers[str(fact.get("relation"))], everything, seed) if _is_fact(fact) else fact
        for fact in facts
    ]


def _is_fact(record: Any) -> bool:
    return isinstance(record, Mapping) and {"prompt", "subject"} <= set(record) and "requested_rewrite" not in record


def _as_short(record: Any) -> Any:
    """A record of known_1000.json in the short form; what is none stays as it is."""
    if not isinstance(record, Mapping) or not {"attribute", "known_id"} & set(record) or "target_new" in record:
        return record
    # What is missing stays so, under its name: the parser tells.
    kept = {"prompt": None, "subject": None}
    kept |= {name: value for name, value in record.items() if name not in _KNOWN_ONLY}
    relation = record.get("relation_id") or record.get("template")
    if "known_id" in record:
        kept.setdefault("case_id", record["known_id"])
    return kept | {"target_true": record.get("attribute"), "relation": relation}


def _with_target(fact: Mapping[str, Any], related: set[str], everything: set[str], seed: int) -> Mapping[str, Any]:
    if fact.get("target_new") is not None:
        return fact
    own = cut_edges(str(fact.get("target_true")))[1]
    others = sorted(related - {own}) or sorted(everything - {own})
    if not others:
        return {**fact, "target_new": None}  # the parser says that it is missing
    drawn = others[hash_seed(seed, "new target", fact["prompt"], fact["subject"]) % len(others)]
    return {**fact, "target_new": drawn}
