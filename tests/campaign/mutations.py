"""What is done to the text of a fact, and what must come of it."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal

from tests.campaign.facts import FORMS, PARTS, Answer, Fact
from tests.campaign.judge import FILLER

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


# ---- white space


@mutation()
def nothing(random: Random, fact: Fact, form: str) -> Mutated:
    return Mutated(fact, notes=False)


@mutation()
def subject_edges(random: Random, fact: Fact, form: str) -> Mutated:
    return Mutated(replace(fact, subject=around(random, fact.subject)), notes=True)


@mutation()
def prompt_edges(random: Random, fact: Fact, form: str) -> Mutated:
    front, back = around(random, "|").split("|")
    return Mutated(replace(fact, before=front + fact.before, after=fact.after + back), notes=True)


@mutation()
def target_edges(random: Random, fact: Fact, form: str) -> Mutated:
    return Mutated(replace(fact, target_new=around(random, fact.target_new)), notes=True)


@mutation()
def target_opens_with_a_space(random: Random, fact: Fact, form: str) -> Mutated:
    return Mutated(replace(fact, target_new=random.choice(" \n\t\xa0") + fact.target_new))


@mutation()
def truth_edges(random: Random, fact: Fact, form: str) -> Mutated | None:
    if fact.target_true is None:
        return None
    return Mutated(replace(fact, target_true=around(random, fact.target_true)), notes=True)


@mutation()
def side_prompt_edges(random: Random, fact: Fact, form: str) -> Mutated | None:
    names = [name for name in ("paraphrases", "neighbours", "generation_prompts", "references") if listed(name, form)]
    if not names or (form == "flat" and fact.target_true is None):
        return None
    name = random.choice(names)
    texts = ("The harp plays", around(random, "The violin plays"), *getattr(fact, name))
    return Mutated(replace(fact, **{name: texts}), notes=True)


@mutation()
def probe_edges(random: Random, fact: Fact, form: str) -> Mutated | None:
    name = random.choice(["locality", "portability"])
    if not listed(name, form):
        return None
    prompt, answer = random.choice(
        [(around(random, "It is"), "good"), ("It is", around(random, "good")), (around(random, "彼は"), "大阪")]
    )
    probe = Answer(prompt, answer, "Reasoning")
    return Mutated(replace(fact, **{name: (probe, *getattr(fact, name))}), notes=True)


@mutation()
def every_edge(random: Random, fact: Fact, form: str) -> Mutated:
    fact = replace(
        fact,
        before=random.choice(EDGES) + fact.before,
        after=fact.after + random.choice(EDGES),
        subject=around(random, fact.subject),
        target_new=around(random, fact.target_new),
        target_true=None if fact.target_true is None else around(random, fact.target_true),
    )
    return Mutated(fact, notes=True)


@mutation()
def inner_white_space_stays(random: Random, fact: Fact, form: str) -> Mutated:
    inner = random.choice(["  ", "\xa0", "\n", "\u3000", "\u200b"])
    return Mutated(replace(fact, before=f"Yes{inner}now {fact.before}", target_new=f"big{inner}house"), notes=False)


# ---- where the subject is


@mutation(FREE)
def span(random: Random, fact: Fact, form: str) -> Mutated:
    """The first of two subjects, by its place; the place moves with what is cut off before it."""
    fact = replace(fact, after=f"{fact.after} and {fact.subject} also")
    start = len(fact.before)
    front = random.choice(["", "", *EDGES])
    place = (start + len(front), start + len(front) + len(fact.subject))
    return Mutated(replace(fact, before=front + fact.before, subject_span=place), notes=bool(front))


@mutation(FREE)
def span_with_white_space(random: Random, fact: Fact, form: str) -> Mutated | None:
    front, back = random.choice([(" ", ""), ("", " "), (" ", " ")])
    if (front and not fact.before.endswith(" ")) or (back and not fact.after.startswith(" ")):
        return None
    start = len(fact.before) - len(front)
    place = (start, start + len(front + fact.subject + back))
    return Mutated(replace(fact, subject=front + fact.subject + back, subject_span=place), notes=True)


@mutation(FREE)
def span_is_wrong(random: Random, fact: Fact, form: str) -> Mutated:
    start, end = len(fact.before), len(fact.before + fact.written)
    wrong: Any = random.choice(
        [[start + 1, end + 1], [end, start], [start, start], [-1, end], [start, 10**6], [start], [start, end, end],
         [float(start), float(end)], [str(start), str(end)], f"{start}-{end}", start, {"start": start}, [None, None],
         [start, 10**30], [start, end - 1]]
    )  # fmt: skip
    return Mutated(replace(fact, subject_span=None), "refused", ("subject_span",), changes={"subject_span": wrong})


@mutation()
def several_subjects(random: Random, fact: Fact, form: str) -> Mutated | None:
    if attached(fact):
        return None
    word = random.choice(["and", "near", "—"])
    return Mutated(replace(fact, before=f"{fact.subject} {word} {fact.before}"), notes=False)


@mutation()
def subject_inside_a_word_after(random: Random, fact: Fact, form: str) -> Mutated | None:
    if attached(fact):
        return None
    subject = random.choice(["Korrin", "Gödel", "Москва", "سليم", "김민수", "मीरा"])
    tail = random.choice(["ville", "7", "_x", "ов", "s"])
    return Mutated(replace(fact.respelled(subject), after=f"{fact.after} or {subject}{tail} is"), notes=False)


@mutation()
def subject_inside_a_word_alone(random: Random, fact: Fact, form: str) -> Mutated:
    subject = random.choice(["Korrin", "Gödel", "kon"])
    before, after = random.choice([("", "ville"), ("Neu", ""), ("_", "7"), ("Ko", "s")])
    fact = replace(fact.respelled(subject), before=f"They say {before}", after=f"{after} was in")
    return Mutated(fact, notes=False)


@mutation()
def subject_in_a_script_without_spaces(random: Random, fact: Fact, form: str) -> Mutated:
    subject, before, after = random.choice(
        [("京都", "京都の", "市は"), ("王", "王先生和", "小姐是"), ("สม", "สมและ", "ชายอยู่"), ("ດ", "ດີ", "າວ")]
    )
    return Mutated(replace(fact.respelled(subject), before=before, after=after), notes=False)


@mutation(SEARCHED)
def subject_absent(random: Random, fact: Fact, form: str) -> Mutated:
    subject = random.choice(["Nobody Else", "Ko", "ミライ", "x" * 3000, "🦄", f"{fact.subject} {fact.subject} no"])
    if subject in fact.prompt:
        subject = "Nobody Else"
    return Mutated(replace(fact, subject=subject), "refused", ("subject",))


@mutation()
def subject_cuts_a_character(random: Random, fact: Fact, form: str) -> Mutated:
    """The letter without its accent is another letter."""
    subject = random.choice(["Cafe", "Kore", "मर", "Ане"])
    mark = random.choice("\u0301\u0308\u0323") if subject != "मर" else "\u0940"
    fact = replace(fact.respelled(subject), before="In the ", after=f"{mark} is")
    return Mutated(fact, "refused", ("subject", "prompt"))


@mutation(SEARCHED)
def subject_whole_beside_one_that_is_cut(random: Random, fact: Fact, form: str) -> Mutated:
    return Mutated(replace(fact.respelled("Kore"), before="Here ", after=" and Kore\u0301 are"), notes=False)


# ---- look-alikes

ACCENTED = ("Zoë Brontë", "José Núñez", "Gödel", "서울 타워", "東京ドーム", "Николай", "naïve Bayes")


def look_alike(random: Random, fact: Fact, one: str, other: str) -> Mutated | None:
    """The subject spelled in one way, and in another in the prompt."""
    if one == other:
        return None
    named, written = random.choice([(one, other), (other, one)])
    return Mutated(replace(fact, subject=named, written=written), notes=True)


@mutation(SEARCHED)
def composed_and_decomposed(random: Random, fact: Fact, form: str) -> Mutated | None:
    subject = random.choice(ACCENTED)
    return look_alike(random, fact, unicodedata.normalize("NFC", subject), unicodedata.normalize("NFD", subject))


@mutation(SEARCHED)
def other_spaces(random: Random, fact: Fact, form: str) -> Mutated | None:
    subject = random.choice(["Miss Vane", "Dunholt bread", "서울 타워", "Анна Петрова"])
    return look_alike(random, fact, subject, subject.replace(" ", random.choice("\xa0\u2009\u202f\u3000\u2003")))


@mutation(SEARCHED)
def curly_quotes(random: Random, fact: Fact, form: str) -> Mutated | None:
    subject, sign, other = random.choice(
        [("O'Neil", "'", "’"), ("O'Neil", "'", "‘"), ("St. John's Wood", "'", "’"), ('the "Star"', '"', "”")]
    )
    return look_alike(random, fact, subject, subject.replace(sign, other))


@mutation(SEARCHED)
def hyphens(random: Random, fact: Fact, form: str) -> Mutated | None:
    subject = random.choice(["Jean-Luc Marten", "Saint-Étienne"])
    return look_alike(random, fact, subject, subject.replace("-", random.choice("\u2010\u2011\u2212")))


@mutation(SEARCHED)
def hidden_characters(random: Random, fact: Fact, form: str) -> Mutated | None:
    subject = random.choice(["Korrin", "Miss Vane", "王小明", "Москва"])
    place = random.randint(1, len(subject) - 1)
    return look_alike(
        random, fact, subject, subject[:place] + random.choice("\u200b\u2060\ufeff\xad") + subject[place:]
    )


@mutation(SEARCHED)
def other_case(random: Random, fact: Fact, form: str) -> Mutated | None:
    subject = random.choice(["Miss Vane", "Korrin", "Анна Петрова", "Gödel", "Straße", "O'Neil"])
    return look_alike(random, fact, subject, random.choice([str.lower, str.upper, str.swapcase])(subject))


@mutation(SEARCHED)
def several_differences(random: Random, fact: Fact, form: str) -> Mutated | None:
    subject = "Zoë O'Neil-Brontë"
    other = unicodedata.normalize("NFD", subject).replace("'", "’").replace(" ", "\xa0")
    return look_alike(random, fact, subject, random.choice([other, other.upper(), other.replace("-", "\u2011")]))


@mutation(SEARCHED)
def look_alike_twice(random: Random, fact: Fact, form: str) -> Mutated | None:
    """Both spelled in the same way: the last one counts, as where it is spelled as named."""
    if attached(fact):
        return None
    written = random.choice(["Zoe\u0308 Vane", "Miss\xa0Vane", "O’Neil", "KORRIN"])
    named = {"Z": "Zoë Vane", "M": "Miss Vane", "O": "O'Neil", "K": "Korrin"}[written[0]]
    fact = replace(fact, subject=named, written=written, before=f"{written} and {fact.before}")
    return Mutated(fact, notes=True)


@mutation(SEARCHED)
def look_alikes_that_differ(random: Random, fact: Fact, form: str) -> Mutated:
    named, one, other = random.choice(
        [("miss vane", "Miss Vane", "MISS VANE"), ("Miss Vane", "Miss\xa0Vane", "Miss\u2009Vane"),
         ("O'Neil", "O’Neil", "O‘Neil"), ("korrin", "Korrin", "KORRIN")]
    )  # fmt: skip
    return Mutated(
        replace(fact, subject=named, written=one, before=f"{other} and {fact.before}"), "refused", ("subject",)
    )


@mutation(SEARCHED)
def exact_before_look_alike(random: Random, fact: Fact, form: str) -> Mutated:
    named, other = random.choice([("Miss Vane", "Miss\xa0Vane"), ("Korrin", "korrin"), ("Gödel", "Go\u0308del")])
    return Mutated(replace(fact.respelled(named), after=f"{fact.after} and {other} too"), notes=False)


@mutation(SEARCHED)
def other_alphabet(random: Random, fact: Fact, form: str) -> Mutated:
    """A letter of another alphabet is another letter, however it looks; the refusal says which."""
    return Mutated(replace(fact, subject="K\u043errin", written="Korrin"), "refused", ("subject",), shown="U+043E")


# ---- what joins prompt and target


@mutation()
def target_opens_with_a_sign(random: Random, fact: Fact, form: str) -> Mutated:
    targets = ("-27 degrees", ".NET", "'N Sync", "’N Sync", "%20", "/usr/bin", "–5", "…and so on", ":30", "!important",
               "?x", ",5", ";b", "—x", "'Til dawn", "'sup", "'Tis", "-é", "-Ж")  # fmt: skip
    return Mutated(replace(fact, target_new=random.choice(targets)), notes=False)


@mutation()
def target_is_a_clitic(random: Random, fact: Fact, form: str) -> Mutated:
    sign = random.choice("'’")
    clitic = random.choice(["s", "t", "re", "ve", "ll", "d", "m"]) + random.choice(["", " capital", ", they say", "."])
    return Mutated(replace(fact, target_new=sign + clitic), notes=False)


@mutation()
def digits_on_both_sides(random: Random, fact: Fact, form: str) -> Mutated:
    target = random.choice([".14", ",000", "–1995", "-95", "/8", ":30", "%2"])
    return Mutated(replace(fact, after=f"{fact.after} {random.choice(['3', '1990', '10'])}", target_new=target))


@mutation()
def digit_before_a_letter(random: Random, fact: Fact, form: str) -> Mutated:
    return Mutated(replace(fact, after=f"{fact.after} 3", target_new=random.choice([".NET", "-b", "'s", "/a"])))


@mutation()
def target_of_signs(random: Random, fact: Fact, form: str) -> Mutated:
    target = random.choice([".", "!", "...", ", and so", "%", "' he said", "?!", "–", "…", "-- x", ": (", ") b", "”."])
    return Mutated(replace(fact, target_new=target, target_true=None), notes=False)


@mutation()
def prompt_ends_in_a_sign(random: Random, fact: Fact, form: str) -> Mutated:
    end = random.choice([" –", " -", " —", " /", " Jean-", " a/", " (", " “", " «", " '", ' "', " $", " so'", ":", "?",
                         " ¿", " the parents'", "。", "「", ",", " @", " 5%"])  # fmt: skip
    target = random.choice([fact.target_new, "Oslo", "1990", "-27 degrees", "東京"])
    truth = None if fact.target_true == target else fact.target_true
    paraphrases = (f"They say{end}", *fact.paraphrases)
    fact = replace(fact, after=fact.after + end, target_new=target, target_true=truth, paraphrases=paraphrases)
    return Mutated(fact, notes=False)


@mutation(FREE)
def space_is_given(random: Random, fact: Fact, form: str) -> Mutated:
    target = random.choice([fact.target_new, "-27 degrees", "'s", ".", "東京", "(b)"])
    truth = None if fact.target_true == target else fact.target_true
    return Mutated(replace(fact, target_new=target, target_true=truth, target_space=random.random() < 0.5), notes=False)


@mutation(FREE)
def space_is_given_and_typed(random: Random, fact: Fact, form: str) -> Mutated:
    return Mutated(replace(fact, target_new=f" {fact.target_new}", target_space=random.random() < 0.5))


@mutation()
def target_opens_with_a_mark(random: Random, fact: Fact, form: str) -> Mutated:
    """An accent without a letter: whatever a tokenizer makes of it, the lookup token stays the subject's."""
    return Mutated(replace(fact, target_new="\u0301" + fact.target_new), "safe", ("target_new", "prompt"))


# ---- answers that are none


@mutation()
def truth_is_none(random: Random, fact: Fact, form: str) -> Mutated:
    return Mutated(replace(fact, target_true=random.choice([*BLANKS, FILLER, f" {FILLER}\n", None])))


@mutation()
def probe_without_answer(random: Random, fact: Fact, form: str) -> Mutated | None:
    name = random.choice(["locality", "portability"])
    if not listed(name, form):
        return None
    answer = random.choice([*BLANKS, FILLER, f"{FILLER} "])
    return Mutated(replace(fact, **{name: (Answer("It is", answer, "K 1"), *getattr(fact, name))}), notes=True)


@mutation()
def target_is_the_truth(random: Random, fact: Fact, form: str) -> Mutated:
    """Nothing to change; where several answers are accepted, the one that equals the new one is not the old one."""
    fact = replace(fact, target_true=around(random, fact.target_new))
    if form in ("zsre", "knowedit"):
        return Mutated(fact)
    return Mutated(fact, "refused", ("target_new",))


@mutation()
def empty_text(random: Random, fact: Fact, form: str) -> Mutated | None:
    blank = random.choice(BLANKS)
    part = random.choice(
        ["prompt", "subject", "target_new", "paraphrases", "neighbours", "generation_prompts", "references"]
    )
    if part == "prompt":
        if form == "counterfact":
            return None
        fact = replace(fact, before="", written="", after=blank)
        return Mutated(fact, "refused", ("prompt", "subject"))
    if part in ("subject", "target_new"):
        return Mutated(replace(fact, **{part: blank}), "refused", (part,))
    if not listed(part, form) or (form == "flat" and fact.target_true is None):
        return None
    return Mutated(replace(fact, **{part: ("It is", blank)}), "refused", (part,))


# ---- texts that no tokenizer should meet

TEXTS = ("before", "subject", "target_new", "target_true", "paraphrases", "neighbours", "relation", "case_id", "kind",
         "locality")  # fmt: skip


@mutation()
def half_a_character_or_nul(random: Random, fact: Fact, form: str) -> Mutated | None:
    bad = "a" + random.choice(["\ud800", "\udfff", "\x00", "\udc80\ud800"]) + "b"
    part = random.choice(TEXTS)
    named: tuple[str, ...] = (part,)
    match part:
        case "before":
            fact, named = replace(fact, before=f"{bad} {fact.before}"), ("prompt",)
        case "subject":
            fact = fact.respelled(bad)
            named = ("subject", "prompt")
        case "paraphrases" | "neighbours":
            if not listed(part, form) or (form == "flat" and fact.target_true is None):
                return None
            fact = replace(fact, **{part: (bad,)})
        case "kind" | "locality":
            if not listed("locality", form) or (form == "zsre" and part == "kind"):
                return None
            probe = Answer("It is", "good", bad) if part == "kind" else Answer("It is", bad, "K")
            fact, named = replace(fact, locality=(probe,)), ("locality",)
        case "relation" | "case_id":
            if not listed(part, form):
                return None
            fact = replace(fact, **{part: bad})
        case _:
            fact = replace(fact, **{part: bad})
    return Mutated(fact, "refused", named)


@mutation()
def texts_that_are_long(random: Random, fact: Fact, form: str) -> Mutated:
    part = random.choice(["before", "target_new", "subject"])
    long = random.choice(["word " * 900, "x" * 5000, "東京" * 2000, "\n".join("abcdefgh" * 90)]).strip()
    if part == "subject":
        return Mutated(fact.respelled(long), "refused", ("subject", "prompt", "target_new"))
    fact = replace(fact, **{part: long + " " * (part == "before") + getattr(fact, part)})
    return Mutated(fact, "refused", ("prompt", "target_new"))


@mutation()
def signs_of_other_languages(random: Random, fact: Fact, form: str) -> Mutated:
    """Braces, percent signs and markup are text."""
    sign = random.choice(["{0}", "%s", "{{}}", "$x$", "<b>", "\\n", "[MASK]", "#", "&amp;", "{x!r}", "!!set", "*a"])
    return Mutated(replace(fact, before=f"In {sign}, {fact.before}", target_new=f"so {sign} it"), notes=False)


__all__ = ["FREE", "MUTATIONS", "Mutated", "Verdict", "mutation"]
