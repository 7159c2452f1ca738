"""Files of facts that a model may know, as causal tracing reads them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rome_pl.requests.clean_text import cut_edges, no_answer
from rome_pl.utils.hashing import hash_seed

__all__ = ["facts_to_requests"]

_KNOWN_ONLY = {"known_id", "attribute", "template", "prediction", "relation_id"}


def facts_to_requests(records: Sequence[Any], seed: int = 0) -> list[Any]:
    """Turn facts into records of the short form, each with a new target. Other records are unchanged.

    Facts are records in the form of ``known_1000.json`` (Meng et al. 2022: ``prompt``, ``subject``, ``attribute``), and
    those of the short form that have no ``target_new``. For trial edits, the new target is the answer of another fact,
    of the same relation if possible. The draw depends on the seed and the fact's own text.

    Args:
        records: The records of a file.
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
    """Turn a record of known_1000.json into the short form; leave others unchanged."""
    if not isinstance(record, Mapping) or not {"attribute", "known_id"} & set(record) or "target_new" in record:
        return record
    # Missing fields stay missing: the parser reports them.
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
        return {**fact, "target_new": None}  # the parser reports that it is missing
    drawn = others[hash_seed(seed, "new target", fact["prompt"], fact["subject"]) % len(others)]
    return {**fact, "target_new": drawn}
