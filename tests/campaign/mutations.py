"""What a mutation is: what is done to a fact, and what must come of it; and the register of all."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from tests.campaign.facts import FORMS, PARTS, Fact

Verdict = Literal["right", "refused", "safe"]


@dataclass(frozen=True)
class Mutated:
    """A mutated fact and what must come of it.

    Args:
        fact: The fact.
        verdict: What must come of it.
        named: Parts of the fact of which a refusal names one.
        notes: Whether the request says in its notes what was changed; ``None`` leaves that open.
        changes: Values of the record, by their path, that are not what the fact is written as.
        case_id: What the request is called, where that is not what the fact is.
        shown: What a refusal says besides.
    """

    fact: Fact
    verdict: Verdict = "right"
    named: tuple[str, ...] = ()
    notes: bool | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    case_id: Any = None
    shown: str = ""


Mutation = Callable[[Random, Fact, str], Mutated | None]
MUTATIONS: dict[str, tuple[Mutation, tuple[str, ...]]] = {}
"""By name: what it does (nothing where a fact does not suit), and the forms that it can be done to."""

SEARCHED = tuple(form for form in FORMS if form != "counterfact")
"""Forms in which the subject is searched for; CounterFact's template says where it is."""
FREE = ("short", "api", "editor")
"""Forms with every part of a request."""
EDGES = (" ", "  ", "\n", "\r\n", "\t", "\xa0", "\u3000", "\u2003", "\u2028", "\x85", "\x0b", "\u200b", "\ufeff",
         "\u2060", "\u200e", "\u200f", " \n", "\n\u200b", "\u202f", " \t \n")  # fmt: skip
BLANKS = ("", " ", "\n\t", "\u3000", "\u200b", "\ufeff \u200e")


def mutation(forms: tuple[str, ...] = FORMS) -> Callable[[Mutation], Mutation]:
    """Enter a function under its name."""

    def enter(function: Mutation) -> Mutation:
        MUTATIONS[function.__name__] = (function, forms)
        return function

    return enter


def around(random: Random, text: str) -> str:
    """A text with something at its edges that is none of it."""
    side, what = random.choice(["front", "back", "both"]), random.choice(EDGES)
    return (
        (what if side != "back" else "") + text + (random.choice(EDGES) if side == "both" else what) * (side != "front")
    )


def listed(part: str, form: str) -> bool:
    return part in PARTS[form]


def attached(fact: Fact) -> bool:
    """Whether the subject is part of a longer word in the prompt, as where Korean puts a particle after a name."""
    return "HANGUL" in unicodedata.name(fact.after[:1] or " ")
