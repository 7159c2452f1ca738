"""Records whose fields hold what they cannot hold, or are missing, or are called otherwise."""

import datetime
import math
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np

from tests.campaign.facts import FILE_FORMS, FORMS, PARTS, Fact
from tests.campaign.mutations import FREE, Mutated, mutation

MISSING = object()
"""Stands for a field that is left out."""
WHOLE = "(record)"
"""The path of the record itself."""

PLAIN = (5, 0, 1.5, float("nan"), float("inf"), True, False, ["a", 5], {"a": "b"}, {}, [[]], 10**30)
"""What JSON can hold in the place of a text."""
OF_YAML = (datetime.date(2024, 1, 2), datetime.datetime(2024, 1, 2, 3, 4), b"bytes", {"a", "b"})
OF_PYTHON = (object(), np.int64(3), np.float64(1.5), b"bytes", {1}, iter("ab"), str, ("a", "b"), lambda: "x", 1j)

TEXT_PATHS = {
    "short": ("prompt", "subject", "target_new", "target_true"),
    "flat": ("prompt", "subject", "target_new", "ground_truth"),
    "counterfact": ("requested_rewrite.prompt", "requested_rewrite.subject", "requested_rewrite.target_new",
                    "requested_rewrite.target_true", "requested_rewrite.target_new.str",
                    "requested_rewrite.target_true.str", "requested_rewrite"),
    "zsre": ("src", "subject", "alt"),
    "knowedit": ("prompt", "subject", "target_new"),
    "easyedit": ("prompts", "subject", "target_new"),
    "api": ("prompt", "subject", "target_new", "target_true"),
    "editor": ("prompt", "subject", "target_new", "target_true"),
}  # fmt: skip
OPTIONAL = ("target_true", "ground_truth", "requested_rewrite.target_true", "requested_rewrite.target_true.str")
LISTS = {
    "short": ("paraphrases", "neighbours", "generation_prompts", "references"),
    "flat": ("locality_prompt",),
    "counterfact": ("paraphrase_prompts", "neighborhood_prompts", "generation_prompts"),
    "zsre": ("rephrase", "answers"),
    "knowedit": ("rephrase_prompt", "ground_truth"),
    "easyedit": ("rephrase_prompts", "ground_truth"),
}  # fmt: skip
LISTS["api"] = LISTS["editor"] = LISTS["short"]


def odd_values(form: str) -> list[Any]:
    """What may stand in the place of a text; what JSON cannot hold is written as YAML."""
    return [*PLAIN, *(OF_YAML if form in FILE_FORMS else OF_PYTHON)]


@mutation()
def text_of_a_wrong_type(random: Random, fact: Fact, form: str) -> Mutated:
    path = random.choice(TEXT_PATHS[form])
    fact = replace(fact, target_true=fact.target_true or "Lima", target_new="Oslo")
    value = random.choice([*odd_values(form), *([] if path in OPTIONAL else [None])])
    if path in ("requested_rewrite", "requested_rewrite.target_new") and value == {}:
        value = 5
    if form == "easyedit":  # a list of one entry for each fact
        value = [value]
    return Mutated(fact, "refused", _named(path, value[0] if form == "easyedit" else value), changes={path: value})


def _named(path: str, value: Any) -> tuple[str, ...]:
    """What a refusal names: the field, or the line of what no JSON can hold."""
    return (_last(path), "line") if isinstance(value, float) and not math.isfinite(value) else (_last(path),)


def _last(path: str) -> str:
    """The name that a refusal has to hold: the last but for CounterFact's ``str``."""
    return path.removesuffix(".str").split(".")[-1]


@mutation()
def list_of_a_wrong_type(random: Random, fact: Fact, form: str) -> Mutated:
    path = random.choice(LISTS[form])
    fact = replace(fact, target_true="Lima", target_new="Oslo")
    value = random.choice([5, 1.5, True, {"a": "b"}, [5], ["a", 5], ["a", None], [["a"], 5], [{"a": "b"}], ["a", 1.5]])
    if form == "easyedit":
        value = random.choice([5, {"a": "b"}, [], ["a", "b", "c"], [5]])
    return Mutated(fact, "refused", (path,), changes={path: value})


@mutation(tuple(form for form in FORMS if form != "easyedit"))
def field_missing(random: Random, fact: Fact, form: str) -> Mutated:
    path = random.choice([path for path in TEXT_PATHS[form] if path not in OPTIONAL])
    return Mutated(fact, "refused", (_last(path),), changes={path: MISSING})


@mutation(FREE)
def field_unknown(random: Random, fact: Fact, form: str) -> Mutated:
    name = random.choice(["target_old", "paraphrase", "Prompt", "subject ", "x" * 2000, "\u202eprompt", "notes"])
    return Mutated(fact, "refused", (name.strip()[:6].lstrip("\u202e"),), changes={name: "x"})


@mutation(("flat", "counterfact", "zsre", "knowedit"))
def field_unknown_to_an_open_form(random: Random, fact: Fact, form: str) -> Mutated:
    """Published data sets carry fields that nobody needs here."""
    return Mutated(fact, changes={random.choice(["attribute_prompts", "cond", "pred"]): random.choice([5, "x", ["y"]])})


@mutation(tuple(form for form in FORMS if "case_id" in PARTS[form]))
def case_id(random: Random, fact: Fact, form: str) -> Mutated:
    given, called = random.choice(
        [(7, 7), (-3, -3), (0, 0), ("x", "x"), (" x ", "x"), ("x\n", "x"), ("東京", "東京"), ("a b", "a b"),
         ("7", "7"), ("ALL ", "ALL"), (10**18, 10**18), ("x" * 60, "x" * 60)]
    )  # fmt: skip
    if called == "ALL":
        return Mutated(replace(fact, case_id=given), "safe", ("case_id",), case_id=called)
    return Mutated(replace(fact, case_id=given), case_id=called)


@mutation(tuple(form for form in FORMS if "case_id" in PARTS[form]))
def case_id_is_none(random: Random, fact: Fact, form: str) -> Mutated:
    bad: list[Any] = [True, False, 1.5, float("nan"), "", " ", "\u200b", "all", " all", "1,2", ",", [1], {"a": 1}]
    bad += OF_YAML if form in FILE_FORMS else OF_PYTHON
    value = random.choice(bad)
    return Mutated(replace(fact, case_id=None), "refused", _named("case_id", value), changes={"case_id": value})


@mutation(FILE_FORMS)
def case_id_twice(random: Random, fact: Fact, form: str) -> Mutated:
    """Each of these is what the record before it is called."""
    return Mutated(
        replace(fact, case_id=random.choice(["good", " good", "good\n", "\ufeffgood"])), "refused", ("case_id",)
    )


@mutation(("short", "counterfact", "api", "editor"))
def relation_of_a_wrong_type(random: Random, fact: Fact, form: str) -> Mutated:
    bad: list[Any] = [5, 0, 1.5, True, ["P36"], {"P36": 1}, []]
    bad += OF_YAML if form in FILE_FORMS else OF_PYTHON
    path = "requested_rewrite.relation_id" if form == "counterfact" else "relation"
    return Mutated(replace(fact, relation=None), "refused", ("relation",), changes={path: random.choice(bad)})


@mutation(FREE)
def space_of_a_wrong_type(random: Random, fact: Fact, form: str) -> Mutated:
    return Mutated(
        fact, "refused", ("target_space",), changes={"target_space": random.choice(["yes", 1, 0, [], "", {}, 0.0])}
    )


@mutation(FREE)
def probes_of_a_wrong_type(random: Random, fact: Fact, form: str) -> Mutated:
    name = random.choice(["locality", "portability"])
    good = {"prompt": "It is", "answer": "good", "kind": "K"}
    bad: Any = random.choice(
        [5, "text", True, ["text"], [5], [None], [good, 5], [good | {"kind": 5}], [good | {"kind": ["K"]}],
 [good | {"prompt": 5}], [good | {"answer": ["good"]}], [good | {"other": 1}],
         [{"prompt": "It is"}], [{"answer": "good", "kind": "K"}], [good | {"answer": {"a": 1}}], [[good]],
         [good | {"kind": datetime.date(2024, 1, 2)}], [good | {"answer": 5}], [good | {"prompt": " "}], [{}]]
    )  # fmt: skip
    return Mutated(fact, "refused", (name,), changes={name: bad})


@mutation(("knowedit",))
def kinds_of_a_wrong_type(random: Random, fact: Fact, form: str) -> Mutated:
    name = random.choice(["locality", "portability"])
    bad: Any = random.choice(
        [["x"], 5, "text", {"K": "text"}, {"K": ["text"]}, {"K": 5}, {"K": [5]}, {"K": [["x"]]}, {"K": {"prompt": "x"}}]
    )
    return Mutated(fact, "refused", (name,), changes={name: bad})


@mutation(("easyedit",))
def columns_of_a_wrong_type(random: Random, fact: Fact, form: str) -> Mutated:
    name = random.choice(["locality_inputs", "portability_inputs"])
    good = {"prompt": ["It is"], "ground_truth": ["good"]}
    bad: Any = random.choice(
        [5, "text", ["x"], {"K": 5}, {"K": ["x"]}, {"K": {"prompt": ["It is"]}}, {"K": good | {"other": []}},
         {"K": good | {"prompt": ["a", "b"]}}, {"K": good | {"prompt": [5]}}, {"K": good | {"ground_truth": [5]}},
         {"K": {"prompt": [["a", "b"]], "ground_truth": [["x"]]}}, {"K": {"prompt": [["a"]], "ground_truth": ["x"]}},
         {"K": good | {"ground_truth": 5}}, {"K" * 3000: 5}, {"K\ud800": good}]
    )  # fmt: skip
    return Mutated(fact, "refused", (name,), changes={name: bad})


@mutation(("easyedit",))
def columns_of_other_lengths(random: Random, fact: Fact, form: str) -> Mutated:
    name = random.choice(["subject", "target_new", "ground_truth", "rephrase_prompts"])
    bad = random.choice([[], ["a", "b"], [fact.subject] * 50])
    return Mutated(fact, "refused", (name,), changes={name: bad})


@mutation(("easyedit",))
def texts_instead_of_lists(random: Random, fact: Fact, form: str) -> Mutated:
    """A text is a list of one."""
    changes = {"prompts": fact.prompt, "subject": fact.subject, "target_new": fact.target_new}
    return Mutated(fact, changes=changes, notes=False)


@mutation(("easyedit", "editor"))
def argument_unknown(random: Random, fact: Fact, form: str) -> Mutated:
    name = random.choice(["requests", "target_neg", "loc_prompts", "train_ds", "promts", "max_tokens", "_"])
    return Mutated(fact, "refused", (name,), changes={name: "x"})


@mutation(("counterfact",))
def template(random: Random, fact: Fact, form: str) -> Mutated:
    bad = random.choice(["Rome is in", "{} and {} are", "{0} is in", "{", "{subject} is", "{} {}", "{ } is"])
    return Mutated(fact, "refused", ("prompt",), changes={"requested_rewrite.prompt": bad})


@mutation(FILE_FORMS)
def record_is_none(random: Random, fact: Fact, form: str) -> Mutated:
    """Not a field, but the whole record is something else."""
    bad = random.choice([None, 5, "text", ["prompt"], True, [], float("nan"), ""])
    return Mutated(fact, "refused", ("record", "line"), changes={WHOLE: bad})


def changed(record: dict[str, Any], changes: dict[str, Any]) -> Any:
    """The record with other values in places."""
    for path, value in changes.items():
        if path == WHOLE:
            return value
        *parents, name = path.split(".") if path.startswith("requested_rewrite") else [path]
        place = record
        for parent in parents:
            place[parent] = dict(place[parent])
            place = place[parent]
        if value is MISSING:
            place.pop(name)
        else:
            place[name] = value
    return record


__all__ = ["MISSING", "changed"]
