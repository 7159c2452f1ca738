# ruff: noqa: RUF001 -- characters that look alike are what this is about
"""White space at edges, what joins a prompt and its target, answers that are none, texts that no tokenizer reads."""

from dataclasses import replace
from random import Random

from tests.campaign.facts import Answer, Fact
from tests.campaign.judge import FILLER
from tests.campaign.mutations import BLANKS, EDGES, FREE, Mutated, around, listed, mutation

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


# ---- what joins prompt and target


@mutation()
def target_opens_with_a_sign(random: Random, fact: Fact, form: str) -> Mutated:
    targets = ("-27 degrees", ".NET", "'N Sync", "’N Sync", "%20", "/usr/bin", "–5", "…and so on", ":30", "!important",
               "?x", ",5", ";b", "—x", "'Til dawn", "'sup", "'Tis", "-é", "-Ж", "€5", "+47", "#1",
               "@home", '"Hamlet"', "“Hamlet”", "‘Til dawn", "\u221227 degrees", "±5", "¿Qué", "_x", "<b>",
               "~5")  # fmt: skip
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
    long = random.choice(["word " * 900, "x y " * 1500, "東京" * 2000, "\n".join("abcdefgh" * 90)]).strip()
    if part == "subject":
        return Mutated(fact.respelled(long), "refused", ("subject", "prompt", "target_new"))
    fact = replace(fact, **{part: long + " " * (part == "before") + getattr(fact, part)})
    return Mutated(fact, "refused", ("prompt", "target_new"))


@mutation()
def signs_of_other_languages(random: Random, fact: Fact, form: str) -> Mutated:
    """Braces, percent signs and markup are text."""
    sign = random.choice(["{0}", "%s", "{{}}", "$x$", "<b>", "\\n", "[MASK]", "#", "&amp;", "{x!r}", "!!set", "*a"])
    return Mutated(replace(fact, before=f"In {sign}, {fact.before}", target_new=f"so {sign} it"), notes=False)
