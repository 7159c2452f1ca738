# ruff: noqa: RUF001 -- characters that look alike are what this is about
"""Where the subject is: given by its place, several times, inside words, not at all, or spelled in another way."""

import unicodedata
from dataclasses import replace
from random import Random
from typing import Any

from tests.campaign.facts import Fact
from tests.campaign.mutations import EDGES, FREE, SEARCHED, Mutated, attached, mutation

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
