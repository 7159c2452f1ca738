"""Files that are odd as files: how they are encoded, nested, repeated, or that they are none.

Each maker writes one file of a fact in a form and says what must come of it. What could hang or fill the memory is
marked, and read by a process of its own.
"""

import gzip
import json
import os
import random as randoms
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.campaign.facts import Fact, record
from tests.campaign.mutations import Verdict
from tests.campaign.wrong_types import changed


@dataclass(frozen=True)
class OddFile:
    """A file and what must come of it.

    Args:
        path: Where it is.
        verdict: What must come of it.
        named: Of which a refusal names one.
        fact: What the record says, where it is read.
        notes: As of a mutated fact.
        alone: Whether a process of its own reads it.
    """

    path: Path
    verdict: Verdict
    named: tuple[str, ...] = ()
    fact: Fact | None = None
    notes: bool | None = None
    alone: bool = False


Maker = Callable[[Random, Fact, str, Path], OddFile]
ODD_FILES: dict[str, Maker] = {}


def maker(function: Maker) -> Maker:
    ODD_FILES[function.__name__] = function
    return function


def as_json(fact: Fact, form: str) -> str:
    return json.dumps([record(fact, form)], ensure_ascii=False)


def as_yaml(fact: Fact, form: str) -> str:
    return yaml.safe_dump([record(fact, form)], allow_unicode=True, sort_keys=False)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def _any(random: Random, fact: Fact, form: str) -> tuple[str, str]:
    suffix = random.choice([".json", ".jsonl", ".yaml", ".yml"])
    if suffix == ".json":
        return as_json(fact, form), suffix
    return (as_json(fact, form)[1:-1], suffix) if suffix == ".jsonl" else (as_yaml(fact, form), suffix)


def _name(form: str) -> str:
    return {"counterfact": "paraphrase_prompts", "zsre": "src"}.get(form, "prompt")


# ---- encodings and line ends


@maker
def byte_order_mark(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    text, suffix = _any(random, fact, form)
    return OddFile(write(folder, f"facts{suffix}", "\ufeff" + text), "right", fact=fact, notes=False)


@maker
def windows_line_ends(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    _, suffix = _any(random, fact, form)
    records = [record(fact, form), record(replace(fact, case_id="second"), form)]
    text = {
        ".json": lambda: json.dumps(records, indent=2, ensure_ascii=False),
        ".jsonl": lambda: "\n".join(json.dumps(one) for one in records) + "\n\n",
    }.get(suffix, lambda: yaml.safe_dump(records, allow_unicode=True))()
    mark = random.choice(["", "\ufeff"])
    return OddFile(write(folder, f"facts{suffix}", mark + text.replace("\n", "\r\n")), "right", fact=fact, notes=False)


@maker
def another_encoding(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    text, suffix = _any(random, replace(fact, references=(), target_new="Évian"), form)
    how = random.choice(["utf-16", "utf-16-le", "utf-32", "latin-1", "cut"])
    content = text.encode("latin-1", "replace") if how == "latin-1" else text.encode()[:-1] + b"\xe4\xb8"
    if how.startswith("utf"):
        content = text.encode(how)
    return OddFile(write(folder, f"facts{suffix}", content), "refused", ("facts",))


@maker
def compressed_or_of_another_kind(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    text, suffix = _any(random, fact, form)
    name = random.choice([f"facts{suffix}.gz", f"facts{suffix}", "facts.csv", "facts.txt", "facts", "facts.parquet"])
    content = gzip.compress(text.encode()) if suffix in name else text.encode()
    return OddFile(write(folder, name, content), "refused", ("facts",))


@maker
def cut_short(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    text = as_json(fact, form)
    place = random.randint(1, len(text) - 2)
    return OddFile(write(folder, "facts.json", text[:place]), "refused", ("facts.json",))


@maker
def malformed(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    good = as_json(fact, form)
    text, name = random.choice(
        [(good[:-1] + ",]", "a.json"), (good + good, "a.json"), (good.replace('"', "'", 2), "a.json"),
         (good[1:-1] + "\n" + good[1:-1], "a.json"), ("{", "a.jsonl"), ("- prompt: [", "a.yaml"),
         ("\t- a: b", "a.yaml"),
         ("- {a: b", "a.yaml"), ("- a: 'b", "a.yaml"), ("- !!python/object/apply:os.getcwd []", "a.yaml"),
         ("- !custom {a: b}", "a.yaml"), ("- *nothing", "a.yaml"),
         (as_yaml(fact, form) + "---\n" + as_yaml(fact, form), "a.yaml"),
         ("%YAML 9.9\n---\n- a", "a.yaml"), ("// comment\n" + good, "a.json"), ("\x00" + good, "a.json"),
         ("- a: \x07", "a.yaml"), ("- target_new: 2024-13-45", "a.yaml"), ("- a: !!int x", "a.yaml"),
         ("- a: !!timestamp x", "a.yaml"), ("- a: !!binary é", "a.yaml"), ("- {[a, b]: c}", "a.yaml"),
         ("- a: !!float x", "a.yaml"), ("- {{a: b}: c}", "a.yaml"), ("- ? !!set {a}\n  : x", "a.yaml"),
         ("- &a [*b]", "a.yaml"), ("- <<: 5", "a.yaml"), ("- a: !!bool maybe", "a.yaml")]
    )  # fmt: skip
    return OddFile(write(folder, name, text), "refused", ("a.",))


@maker
def no_list_of_records(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    text, name = random.choice(
        [("", "a.json"), ("", "a.jsonl"), ("", "a.yaml"), ("[]", "a.json"), ("{}", "a.json"), ("5", "a.json"),
         ('"text"', "a.json"), ("null", "a.json"), ("true", "a.yaml"), ("5", "a.jsonl"), ('"text"', "a.jsonl"),
         ("NaN", "a.json"),
         ("\n \n", "a.jsonl"), ("# nothing", "a.yaml"), ("text", "a.yaml"), ("2024-01-02", "a.yaml"),
         ("!!set {a, b}", "a.yaml"), ("!!binary aGk=", "a.yaml"), ("!!omap [a: 1]", "a.yaml"), ("[[]]", "a.json"),
         (json.dumps({"data": [record(fact, form)]}), "a.json"), ("[1, 2]", "a.json"), ("[null]", "a.json"),
         ("\ufeff", "a.json"), ("---\n...\n", "a.yaml")]
    )  # fmt: skip
    return OddFile(write(folder, name, text), "refused", ("a.",))


@maker
def a_lone_record(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    text, name = random.choice(
        [(as_json(fact, form)[1:-1], "a.json"), (yaml.safe_dump(record(fact, form), allow_unicode=True), "a.yaml")]
    )
    return OddFile(write(folder, name, text), "refused", ("a.",))


# ---- a field twice


@maker
def field_twice(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    """The second would win, and the first be gone without a word."""
    name = _name(form)
    kind = random.choice([".json", ".jsonl", ".yaml", "flow.yaml"])
    if kind == ".yaml":
        lines = as_yaml(fact, form).splitlines()
        text = "\n".join([*lines, f"  {name}: Another one is"])
    else:
        text = as_json(fact, form)
        text = text[:-2] + f', "{name}": "Another one is"}}]'
        text = text[1:-1] if kind == ".jsonl" else text
    return OddFile(write(folder, f"facts{kind}", text), "refused", (name,))


@maker
def forgotten_dash(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    other = yaml.safe_dump(record(replace(fact, case_id="second"), form), allow_unicode=True, sort_keys=False)
    indented = "\n".join("  " + line for line in other.splitlines())
    text = as_yaml(fact, form) + "\n" + indented + "\n"
    names = ("requested_rewrite",) if form == "counterfact" else (_name(form), "subject")
    return OddFile(write(folder, "facts.yaml", text), "refused", names)


@maker
def inner_field_twice(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    """Twice within a field, whatever the form makes of it."""
    if form == "counterfact":
        text = as_json(fact, form).replace('"subject":', '"subject": "Nobody", "subject":', 1)
        name = "subject"
    else:
        text = (
            as_json(fact, form)[:-2]
            + ', "locality": {"K": [{"prompt": "It is", "prompt": "x", "ground_truth": "y"}]}}]'
        )
        text = text.replace('"locality": ', '"was": ', 1) if text.count('"locality": ') > 1 else text
        name = "prompt"
    suffix = random.choice([".json", ".jsonl", ".yaml"])
    return OddFile(write(folder, f"facts{suffix}", text[1:-1] if suffix == ".jsonl" else text), "refused", (name,))


@maker
def field_twice_spelled_in_two_ways(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    name = _name(form)
    escaped = f'"\\u{ord(name[0]):04x}{name[1:]}"'
    text = as_json(fact, form)[:-2] + f', {escaped}: "Another one is"}}]'
    suffix = random.choice([".json", ".jsonl", ".yaml"])
    return OddFile(write(folder, f"facts{suffix}", text[1:-1] if suffix == ".jsonl" else text), "refused", (name,))


# ---- depth and size


@maker
def deep(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    depth = random.choice([600, 2000, 100_000])
    opening, closing = random.choice([("[", "]"), ('{"a":', "}")])
    inside = "1" if opening != "[" else ""
    name = random.choice(["target_new", "locality", "ground_truth", "unknown"])
    made = record(fact, form)
    made.pop(name, None)
    nest = opening * depth + inside + closing * depth
    if random.random() < 0.3:
        nest = '{"K": [{"prompt": "x", "ground_truth": ' + "[" * 3000 + '"x"' + "]" * 3000 + "}]}"
    text = json.dumps(made)[:-1] + f', "{name}": {nest}}}'
    suffix = random.choice([".json", ".jsonl", ".yaml"])
    if suffix == ".yaml":
        text = text.replace('{"a":', '{"a": ')
    content = text if suffix == ".jsonl" else f"[{text}]"
    return OddFile(write(folder, f"facts{suffix}", content), "safe", (), alone=True)


@maker
def long_numbers(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    name = random.choice(["case_id", "target_new", "subject_span", "relation"])
    suffix = random.choice([".json", ".jsonl", ".yaml"])
    made = record(replace(fact, case_id=None), form)
    made.pop(name, None)
    number = random.choice(["-", ""]) + "9" * random.choice([5000, 100_000])
    text = json.dumps(made)[:-1] + f', "{name}": {number}}}'
    content = text if suffix == ".jsonl" else f"[{text}]"
    # Where the form has no such field, a number that is not read does no harm.
    return OddFile(write(folder, f"facts{suffix}", content), "safe", ("facts",), alone=True)


@maker
def long_values(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    """What a message quotes of them has an end."""
    value: Any = random.choice(
        [list(range(50_000)), {str(place): place for place in range(20_000)}, ["x" * 100_000], 10**3000]
    )
    path = {"counterfact": "requested_rewrite.target_new", "zsre": "alt"}.get(form, "target_new")
    made = changed(record(fact, form), {path: value})
    return OddFile(write(folder, "facts.json", json.dumps([made])), "refused", (path.split(".")[-1], "digits"))


@maker
def many_fields(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    names = {f"{name}{place}": 1 for place in range(5000) for name in ("field",)}
    return OddFile(write(folder, "facts.json", json.dumps([names])), "refused", ("facts.json",))


# ---- no file at all


@maker
def no_file(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    path = folder / random.choice(["missing.json", "facts.yaml/x.json", "x" * 300 + ".json", "a\nb.json"])
    return OddFile(path, "refused", ("x" * 20, "missing", "facts", "a"), alone=True)


@maker
def pipe_or_device(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    path = folder / f"facts{random.choice(['.json', '.jsonl', '.yaml'])}"
    match random.choice(
        ["fifo", "socket", "folder", "zero", "null", "link to nothing", "link to itself", "link to fifo"]
    ):
        case "fifo":
            os.mkfifo(path)
        case "socket":
            bound = socket.socket(socket.AF_UNIX)
            here = Path.cwd()
            os.chdir(folder)  # names of sockets are short
            try:
                bound.bind(path.name)
            finally:
                os.chdir(here)
                bound.close()
        case "folder":
            path.mkdir()
        case "zero":
            path.symlink_to("/dev/zero")
        case "null":
            path.symlink_to("/dev/null")
        case "link to nothing":
            path.symlink_to(folder / "nowhere")
        case "link to itself":
            path.symlink_to(path)
        case _:
            os.mkfifo(folder / "pipe")
            path.symlink_to(folder / "pipe")
    return OddFile(path, "refused", ("facts",), alone=True)


@maker
def a_link_to_a_file(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    text, suffix = _any(random, fact, form)
    target = write(folder, "elsewhere", text)
    path = folder / f"facts{suffix}"
    path.symlink_to(target)
    return OddFile(path, "right", fact=fact, notes=False)


@maker
def no_bytes_of_text(random: Random, fact: Fact, form: str, folder: Path) -> OddFile:
    noise = randoms.Random(random.random()).randbytes(random.choice([1, 30, 4000]))
    return OddFile(write(folder, f"facts{random.choice(['.json', '.jsonl', '.yaml'])}", noise), "refused", ("facts",))


__all__ = ["ODD_FILES", "OddFile"]
