"""Facts in several scripts, and the forms and files that they are written in."""

import json
import re
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import yaml

FILE_FORMS = ("short", "flat", "counterfact", "zsre", "knowedit")
FORMS = (*FILE_FORMS, "easyedit", "api", "editor")
SUFFIXES = (".json", ".jsonl", ".yaml")


@dataclass(frozen=True)
class Answer:
    """A probe: a prompt with its answer."""

    prompt: str
    answer: str
    kind: str = ""


@dataclass(frozen=True)
class Fact:
    """A fact as somebody writes it down.

    Args:
        before: The prompt up to the subject.
        written: The subject as it stands in the prompt.
        after: The rest of the prompt.
        subject: The subject as it is named beside the prompt.
    """

    before: str
    written: str
    after: str
    subject: str
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    locality: tuple[Answer, ...] = ()
    portability: tuple[Answer, ...] = ()
    subject_span: tuple[int, int] | None = None
    target_space: bool | None = None
    relation: str | None = None
    case_id: Any = None

    @property
    def prompt(self) -> str:
        return self.before + self.written + self.after

    def respelled(self, subject: str) -> "Fact":
        """The same with another subject, in the prompt too."""
        return replace(self, written=subject, subject=subject)


SUBJECTS = {
    "latin": ["Miss Vane", "Korrin", "Dunholt bread", "Zoë Brontë", "José Núñez", "Saint-Étienne", "O'Neil", "C++",
              "Area 51", "Jean-Luc Marten", "Gödel", "3 Monocerotis", "Tamsel {x}", "naïve Bayes", "St. John's Wood"],
    "chinese": ["王小明", "北京", "上海大学"],
    "japanese": ["山田さくら", "東京タワー", "カメラ"],
    "thai": ["กรุงเทพ", "สมชาย", "แม่น้ำปิง"],
    "arabic": ["القاهرة", "سليم حداد"],
    "hindi": ["दिल्ली", "मीरा शर्मा"],
    "korean": ["김민수", "서울 타워"],
    "russian": ["Анна Петрова", "Москва"],
    "emoji": ["👩‍🚀", "🇫🇷", "👨‍👩‍👧 family", "🙂", "❤️"],
}  # fmt: skip
AROUND = {
    "latin": [("", " plays the"), ("The lighthouse of ", " stands in"), ("Everybody knows that ", " was born in"),
              ('He said "', '" and went to'), ("(", ") speaks"), ("In the town of ", ", people speak"),
              ("We left for ", ""),
              ("¿Dónde está ", "? En"), ("Q: Who wrote about ", "?\nA:")],
    "chinese": [("", "位于"), ("", "会弹"), ("我们都知道", "的首都是")],
    "japanese": [("", "の首都は"), ("", "は"), ("彼は", "で")],
    "thai": [("", "อยู่ใน"), ("แม่ของ", "พูดภาษา")],
    "arabic": [("ولد ", " في"), ("", " تقع في")],
    "hindi": [("", " की भाषा"), ("कल ", " ने कहा")],
    "korean": [("", "의 수도는"), ("", "은 ")],
    "russian": [("", " играет на"), ("Город ", " стоит на")],
    "emoji": [("The sign ", " means"), ("", " stands for")],
}  # fmt: skip
TARGETS = {
    "latin": ["violin", "Oslo", "rye bread", "Málaga", "1990", "10,000 metres", "L'Aquila", "the blue {} house",
              "Évian"],
    "chinese": ["南京", "钢琴", "意大利"],
    "japanese": ["大阪", "ピアノ", "カタカナ"],
    "thai": ["เชียงใหม่", "ลาว"],
    "arabic": ["دمشق", "الفرنسية"],
    "hindi": ["उर्दू", "सितार"],
    "korean": ["부산", "일본어"],
    "russian": ["скрипке", "Волге"],
    "emoji": ["👍", "hope", "🇯🇵", "(unknown)", '"Hamlet"'],
}  # fmt: skip
SIDE = {
    "latin": ["The mill of Dunmore stands in", "Where does one go? To", "Her brother plays the"],
    "chinese": ["这条河流过", "他住在"],
    "japanese": ["城は", "首都は"],
    "thai": ["เมืองอยู่ใน"],
    "arabic": ["المدينة في"],
    "hindi": ["नदी की"],
    "korean": ["바다가"],
    "russian": ["Она говорит на"],
    "emoji": ["The flag shows"],
}  # fmt: skip


def ordinary(random: Random) -> Fact:
    """A valid request with something in every part."""
    script = random.choice(["latin"] * 4 + list(SUBJECTS))
    other = script if random.random() < 0.8 else random.choice(list(SUBJECTS))
    subject = random.choice(SUBJECTS[script])
    before, after = random.choice(AROUND[script])
    new, true = random.sample([*TARGETS[other], *TARGETS["latin"]][:8], 2)
    side = SIDE[other]

    def some(most: int) -> tuple[str, ...]:
        return tuple(random.choice(side) for _ in range(random.randint(0, most)))

    def probes() -> tuple[Answer, ...]:
        return tuple(
            Answer(random.choice(side), random.choice(TARGETS[other]), random.choice(["Reasoning", "近い", "K 1"]))
            for _ in range(random.randint(0, 2))
        )

    return Fact(
        before,
        subject,
        after.rstrip(),
        subject,
        new,
        true if random.random() < 0.8 else None,
        some(2),
        some(2),
        some(1),
        some(1),
        probes(),
        probes(),
        relation=random.choice([None, "P30", "native language"]),
        case_id=random.choice(["eiffel", 12, "b 7", "東京-1"]),
    )


def record(fact: Fact, form: str) -> dict[str, Any]:
    """The fact as a record of a form, not yet a file; as arguments for ``easyedit``, ``api`` and ``editor``."""
    match form:
        case "counterfact":
            made = {
                "requested_rewrite": {
                    "prompt": fact.before + "{}" + fact.after,
                    "subject": fact.subject,
                    "relation_id": fact.relation,
                    "target_new": {"str": fact.target_new, "id": "Q1"},
                    "target_true": None if fact.target_true is None else {"str": fact.target_true, "id": "Q2"},
                },
                "paraphrase_prompts": list(fact.paraphrases),
                "neighborhood_prompts": list(fact.neighbours),
                "generation_prompts": list(fact.generation_prompts),
            }
        case "flat":
            made = _core(fact) | {
                "ground_truth": fact.target_true,
                "rephrase_prompt": "Some say so, and",
                "locality_prompt": list(fact.neighbours),
                "locality_ground_truth": fact.target_true,
            }
        case "zsre":
            made = {
                "src": fact.prompt, "subject": fact.subject, "alt": fact.target_new,
                "answers": [] if fact.target_true is None else [fact.target_true],
                "rephrase": list(fact.paraphrases),
            }  # fmt: skip
            if fact.locality:
                made |= {"loc": fact.locality[0].prompt, "loc_ans": fact.locality[0].answer}
            if fact.portability:
                first = fact.portability[0]
                made["portability"] = {"New Question": first.prompt, "New Answer": first.answer}
        case "knowedit":
            made = _core(fact) | {
                "ground_truth": [] if fact.target_true is None else [fact.target_true],
                "rephrase_prompt": list(fact.paraphrases),
                "locality": _kinds(fact.locality),
                "portability": _kinds(fact.portability),
            }
        case "easyedit":
            return {
                "prompts": [fact.prompt], "subject": [fact.subject], "target_new": [fact.target_new],
                "ground_truth": [fact.target_true], "rephrase_prompts": [list(fact.paraphrases)],
                "locality_inputs": _columns(fact.locality), "portability_inputs": _columns(fact.portability),
            }  # fmt: skip
        case _:
            made = _core(fact) | {
                "target_true": fact.target_true,
                "paraphrases": list(fact.paraphrases),
                "neighbours": list(fact.neighbours),
                "generation_prompts": list(fact.generation_prompts),
                "references": list(fact.references),
                "locality": [_probe(probe) for probe in fact.locality],
                "portability": [_probe(probe) for probe in fact.portability],
                "relation": fact.relation,
            }
            if fact.subject_span is not None:
                made["subject_span"] = list(fact.subject_span)
            if fact.target_space is not None:
                made["target_space"] = fact.target_space
    if fact.case_id is not None:
        made["case_id"] = fact.case_id
    return made


def _core(fact: Fact) -> dict[str, Any]:
    return {"prompt": fact.prompt, "subject": fact.subject, "target_new": fact.target_new}


def _probe(probe: Answer) -> dict[str, str]:
    return {"prompt": probe.prompt, "answer": probe.answer, "kind": probe.kind}


def _kinds(probes: tuple[Answer, ...]) -> dict[str, list[dict[str, Any]]]:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for probe in probes:
        kinds.setdefault(probe.kind, []).append({"prompt": probe.prompt, "ground_truth": [[probe.answer]]})
    return kinds


def _columns(probes: tuple[Answer, ...]) -> dict[str, dict[str, Any]]:
    return {
        kind: {
            "prompt": [[entry["prompt"] for entry in entries]],
            "ground_truth": [[entry["ground_truth"][0] for entry in entries]],
        }
        for kind, entries in _kinds(probes).items()
    }


GOOD = Fact("The bakery of ", "Ashmere", " sells", "Ashmere", "rolls", "cakes", case_id="good")
"""Stands before each record in its file: its form is the file's, and what follows it must not cost it."""


def file_content(records: list[Any], suffix: str, random: Random) -> bytes:
    """Records as the bytes of a file, in one of the ways in which programs write them."""
    halves = re.search("[\ud800-\udfff]", json.dumps(records, ensure_ascii=False, default=str))
    ascii_only = random.random() < 0.5 or halves is not None  # halves of characters need escapes
    if suffix == ".json":
        text = json.dumps(records, ensure_ascii=ascii_only, indent=random.choice([None, 1]))
    elif suffix == ".jsonl":
        text = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records) + "\n"
    else:
        text = yaml.safe_dump(records, allow_unicode=not ascii_only, width=random.choice([40, 1000]), sort_keys=False)
    return text.encode()


WRITTEN = {
    "counterfact": {
        "paraphrases": "paraphrase_prompts", "neighbours": "neighborhood_prompts", "relation": "relation",
    },
    "flat": {"target_true": "ground_truth", "neighbours": "locality_prompt"},
    "zsre": {"prompt": "src", "target_new": "alt", "target_true": "answers", "paraphrases": "rephrase",
             "locality": "loc"},
    "knowedit": {"target_true": "ground_truth", "paraphrases": "rephrase_prompt"},
    "easyedit": {"prompt": "prompts", "target_true": "ground_truth", "paraphrases": "rephrase_prompts",
                 "locality": "locality_inputs", "portability": "portability_inputs"},
}  # fmt: skip
"""What parts of a fact are called in a form, where that differs."""

PARTS = {
    "short": {"paraphrases", "neighbours", "generation_prompts", "references", "locality", "portability", "relation",
              "case_id", "subject_span", "target_space"},
    "flat": {"neighbours", "case_id"},
    "counterfact": {"paraphrases", "neighbours", "generation_prompts", "relation", "case_id"},
    "zsre": {"paraphrases", "locality", "portability", "case_id"},
    "knowedit": {"paraphrases", "locality", "portability", "case_id"},
    "easyedit": {"paraphrases", "locality", "portability"},
}  # fmt: skip
PARTS["api"] = PARTS["editor"] = PARTS["short"]
"""Which parts of a fact a form holds, beside prompt, subject and the two targets."""


def written_name(part: str, form: str) -> str:
    """What a part is called in a form."""
    return WRITTEN.get(form, {}).get(part, part)
