"""The scores of a run's records, one entry each, in the formats of EasyEdit and kmeng01/rome.

The formats are those of zjunlp/EasyEdit's ``BaseEditor.edit`` and of the ``case_*.json`` that kmeng01/rome's
``experiments.summarize`` reads, so that results can be compared with the same tools.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from rome_pl.editing.edit import Edit
from rome_pl.editing.session import EditSession
from rome_pl.metrics import ProbeScores
from rome_pl.requests.edit_request import EditRequest, Probe

__all__ = ["CASE_FORMS", "FormatName", "easyedit_case", "easyedit_cases", "kmeng01_cases"]

FormatName = Literal["easyedit", "kmeng01"]


def easyedit_cases(session: EditSession) -> list[dict[str, Any]]:
    """Return one entry per edit as EasyEdit's ``edit`` does.

    As in EasyEdit, ``post`` is measured on the final model of a sequential stream, otherwise right after the edit.
    Every accuracy is teacher-forced, by token. Locality compares predictions with those before and has no ``pre``.
    Neighbours are EasyEdit's locality of the kind ``neighborhood``.
    """
    return [easyedit_case(edit, before, after) for edit, before, after in _measured(session)]


def easyedit_case(edit: Edit, before: ProbeScores, after: ProbeScores) -> dict[str, Any]:
    """Return one edit's entry as EasyEdit's ``edit`` does.

    Args:
        edit: The edit.
        before: Its probe scores without the edit.
        after: Its probe scores with the edit.
    """
    return {
        "pre": _easyedit_scores(edit.request, before, None),
        "case_id": edit.request.case_id,
        "requested_rewrite": _easyedit_request(edit.request),
        "time": _seconds(edit),
        "post": _easyedit_scores(edit.request, after, before),
    }


def kmeng01_cases(session: EditSession) -> list[dict[str, Any]]:
    """Return one entry per edit as in kmeng01/rome's ``case_*.json``: its probabilities are negative log-probabilities.

    ``post`` is as in :func:`easyedit_cases`. Probes that need a true target are left out if there is none.
    """
    return [
        {
            "case_id": edit.request.case_id,
            "requested_rewrite": _kmeng01_request(edit.request),
            "time": _seconds(edit),
            "post": _kmeng01_scores(after),
            "pre": _kmeng01_scores(before),
        }
        for edit, before, after in _measured(session)
    ]


CASE_FORMS: dict[FormatName, Callable[[EditSession], list[dict[str, Any]]]] = {
    "easyedit": easyedit_cases,
    "kmeng01": kmeng01_cases,
}
"""Formats of other projects, by the name of their file."""


def _measured(session: EditSession) -> list[tuple[Edit, ProbeScores, ProbeScores]]:
    """Edits that were measured before and after, in order."""
    return [
        (edit, edit.scores["base"], edit.scores.get("final", edit.scores["immediate"]))
        for edit in sorted(session.edits, key=lambda edit: edit.index)
        if "base" in edit.scores and "immediate" in edit.scores
    ]


def _seconds(edit: Edit) -> float:
    """The seconds of the edit itself, without measurements."""
    return sum(seconds for stage, seconds in edit.seconds.items() if stage not in ("verify", "evaluate"))


def _easyedit_request(request: EditRequest) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "prompt": request.prompt,
        "target_new": request.target_new,
        "ground_truth": request.target_true,
        "portability": _by_kind(request.portability, "portability"),
        "locality": _by_kind(request.locality, "locality"),
        "subject": request.subject,
    }
    if request.neighbours:
        truth = [request.target_true] * len(request.neighbours)
        shown["locality"]["neighborhood"] = {"prompt": list(request.neighbours), "ground_truth": truth}
    if request.paraphrases:
        shown["rephrase_prompt"] = list(request.paraphrases)
    return shown


def _by_kind(probes: Sequence[Probe], default: str) -> dict[str, dict[str, list[str]]]:
    kinds: dict[str, dict[str, list[str]]] = {}
    for probe in probes:
        kind = kinds.setdefault(probe.kind or default, {"prompt": [], "ground_truth": []})
        kind["prompt"].append(probe.prompt)
        kind["ground_truth"].append(probe.answer)
    return kinds


def _easyedit_scores(request: EditRequest, now: ProbeScores, base: ProbeScores | None) -> dict[str, Any]:
    scores: dict[str, Any] = {
        f"{shown}_acc": [answer.accuracy for answer in now.answers[kind]]
        for shown, kind in (("rewrite", "rewrite"), ("rephrase", "paraphrase"))
        if kind in now.answers
    }
    if base is not None:
        scores["locality"] = {}
        for kind, names in (
            ("locality", [probe.kind or "locality" for probe in request.locality]),
            ("neighbour", ["neighborhood"] * len(request.neighbours)),
        ):
            pairs = zip(now.answers.get(kind, ()), base.answers.get(kind, ()), strict=True)
            for name, (after, before) in zip(names, pairs, strict=False):
                same = [a == b for a, b in zip(after.predicted, before.predicted, strict=True)]
                scores["locality"].setdefault(f"{name}_acc", []).append(sum(same) / len(same))
    scores["portability"] = {}
    for probe, answer in zip(request.portability, now.answers.get("portability", ()), strict=True):
        scores["portability"].setdefault(f"{probe.kind or 'portability'}_acc", []).append(answer.accuracy)
    return scores


def _kmeng01_request(request: EditRequest) -> dict[str, Any]:
    start, end = request.span
    # Their template is filled by str.format, so braces in the text have to be doubled.
    head, tail = (part.replace("{", "{{").replace("}", "}}") for part in (request.prompt[:start], request.prompt[end:]))
    shown = {
        "prompt": f"{head}{{}}{tail}",
        "relation_id": request.relation,
        "target_new": {"str": request.target_new},
        "target_true": {"str": request.target_true},
        "subject": request.subject,
    }
    return {name: value for name, value in shown.items() if value not in (None, {"str": None})}


def _kmeng01_scores(scores: ProbeScores) -> dict[str, Any]:
    new, true = scores.rewrite
    pairs = {
        "rewrite": () if true is None else ((new, true),),
        "paraphrase": scores.paraphrases,
        "neighborhood": scores.neighbours,
    }
    return {
        f"{kind}_prompts_probs": [{"target_new": -new, "target_true": -true} for new, true in found]
        for kind, found in pairs.items()
        if found
    }
