"""Files that only YAML can be odd like."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

from tests.campaign.facts import Fact, record
from tests.campaign.mutations import Verdict
from tests.campaign.odd_files import OddFile, as_json, maker, write

# ---- what only YAML has


@maker
def block_scalars(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    """They end in a line break, which is none of the text."""
    style = random.choice([">", "|", "|+", ">+"])
    sources = {"zsre": ("src", "alt")}.get(form, ("prompt", "target_new"))
    lines = [f"- subject: {json.dumps(fact.subject, ensure_ascii=False)}"]
    texts = (fact.prompt.replace("\n", " "), fact.target_new)
    if form == "counterfact":
        lines = ["- requested_rewrite:", f"    subject: {style}", f"      {fact.subject}", f"    prompt: {style}"]
        lines += [f"      {fact.before}{{}}{fact.after}".replace("\n", " ").rstrip()]
        lines += ["    target_new:", f"      str: {style}", f"        {fact.target_new}"]
    else:
        for name, text in zip(sources, texts, strict=True):
            lines += [f"  {name}: {style}", f"    {text}"]
    lines += ["", ""]
    if form == "flat":
        lines.insert(1, "  ground_truth: null")
    if form == "knowedit":
        lines.insert(1, "  locality: {}")
    before, after = (text.replace("\n", " ") for text in (fact.before, fact.after))
    plain = Fact(before, fact.written, after, fact.subject, fact.target_new)
    if form == "counterfact":
        plain = replace(plain, subject=fact.subject + "\n" * (1 + style.endswith("+") * 0))
    odd = any(text != text.strip() or text[:1] in "\"'" for text in (*texts, fact.subject))
    return OddFile(write(folder, "facts.yaml", "\n".join(lines)), "safe" if odd else "right", fact=plain, notes=True)


@maker
def values_of_yaml(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    """What YAML makes of words without quotes is no text, and is not made one."""
    name = {"zsre": "alt", "counterfact": "str"}.get(form, "target_new")
    value = random.choice(
        ["no", "yes", "1990", "2024-01-02", "2024-01-02 03:04:05", "3.14", "1_000", "0x1F", "12:30:45", "~", "null",
         ".nan", ".inf", "!!binary aGVsbG8=", "!!set {a, b}", "{a, b}", "[a]", "!!omap [a: 1]", "!!pairs [a: 1]", "off",
         "1e5", "0o17"]
    )  # fmt: skip
    quoted = json.dumps(fact.target_new, ensure_ascii=False)
    text = as_json(fact, form).replace(f'"{name}": {quoted}', f'"{name}": {value}', 1)
    verdict: Verdict = "safe" if value in ("1e5", "0o17", "12:30:45") else "refused"  # YAML 1.1 and 1.2 differ
    return OddFile(
        write(folder, "facts.yaml", text), verdict, (name, "target_new"),
        fact=replace(fact, target_new=value) if verdict == "safe" else None,
    )  # fmt: skip


@maker
def anchors(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    """A text given once and named twice is an ordinary text."""
    made = record(replace(fact, paraphrases=(), case_id=fact.case_id), form)
    text = json.dumps([made], ensure_ascii=False)
    subject = json.dumps(fact.subject, ensure_ascii=False)
    text = text.replace(f'"subject": {subject}', f'"subject": &a {subject}, "note": *a', 1)
    verdict: Verdict = "refused" if form == "short" else "right"  # the short form knows its fields
    return OddFile(
        write(folder, "facts.yaml", text), verdict, ("note",), fact=replace(fact, paraphrases=()), notes=False
    )


@maker
def merged_keys(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    text = "- &base " + json.dumps(record(fact, form), ensure_ascii=False) + "\n- {<<: *base, case_id: second}\n"
    return OddFile(write(folder, "facts.yaml", text), "safe", ("<<",), fact=fact)


@maker
def an_anchor_in_itself(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    name = random.choice(["locality", "portability", "paraphrases", "ground_truth", "answers", "case_id", "target_new"])
    value = random.choice(["&a [*a]", "&a {K: *a}", "{K: [{prompt: x, ground_truth: &a [*a]}]}", "&a {prompt: *a}"])
    made = record(fact, form)
    made.pop(name, None)
    text = "- " + json.dumps(made, ensure_ascii=False)[:-1] + f', "{name}": {value}}}\n'
    return OddFile(write(folder, "facts.yaml", text), "safe", (), fact=None, alone=True)


@maker
def aliases_without_end(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    """A few hundred bytes that stand for more than any memory holds."""
    width, depth = random.choice([(9, 9), (10, 12), (2, 40)])
    lines = ["- &a0 [x, x]"] + [f"- &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    name = random.choice(["target_new", "case_id", "paraphrases", "relation", "unknown", "locality", "subject_span"])
    made = record(replace(fact, case_id=None), form)
    made.pop(name, None)
    last = "- " + json.dumps(made, ensure_ascii=False)[:-1] + f', "{name}": *a{depth - 1}}}\n'
    return OddFile(write(folder, "facts.yaml", "\n".join(lines) + "\n" + last), "safe", (), alone=True)
