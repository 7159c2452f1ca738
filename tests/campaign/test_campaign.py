# ruff: noqa: RUF001 -- characters that look alike are what this is about
"""The campaign itself: a seeded part of it always, all of it with ``-m slow``."""

import json
import time
from itertools import pairwise
from random import Random

import pytest
import torch

from rome_pl import KnowledgeEditor
from rome_pl.editor import EditRejectedError
from rome_pl.errors import RomeError
from tests.campaign import judge, models
from tests.campaign.facts import ordinary, record
from tests.campaign.figures import complaints, describe
from tests.campaign.mutations import MUTATIONS
from tests.campaign.trials import names, try_case
from tests.campaign.vocabularies import NAMES, TEXT, vocabulary
from tests.integration.helpers import called

SEED = 7


def check(cases):
    started = time.monotonic()
    outcomes = [try_case(name) for name in cases]
    print(describe(outcomes), f"\nin {time.monotonic() - started:.0f} s")
    assert not [outcome for outcome in outcomes if outcome.faults], complaints(outcomes)
    return outcomes


def test_a_part_of_the_campaign_finds_nothing():
    """Every mutation at least once, in forms that the seed draws, and a few edits."""
    every = [name for name in names(SEED, 2, 1) if "/easyedit/" not in name or not name.endswith("/0")]
    edits = [name for name in every if "/editor/" in name]
    others = [name for name in every if "/editor/" not in name]
    random = Random(SEED)
    random.shuffle(others)
    chosen = {name.split("/")[2]: name for name in others}
    cases = {*chosen.values(), *random.sample(edits, 8)}
    cases |= set(random.sample([name for name in others if name.split("/")[2] in MUTATIONS], 150 - len(cases)))
    check(sorted(cases))


@pytest.mark.slow
def test_the_campaign_finds_nothing():
    cases = names(SEED, 4, 1)
    assert len(cases) >= 1500
    outcomes = check(cases)
    got = [outcome.got for outcome in outcomes]
    assert min(got.count("right"), got.count("refused")) > 500  # neither is all that is tried


@pytest.mark.parametrize("name", NAMES)
def test_the_judge_reads_every_token(name):
    """The tokens cover the text without a gap, which is what its positions rest on."""
    made = vocabulary(name)
    for text in (*TEXT, "a", "3 \n東京 🦄ℵ", "Cafe\u0301 is"):
        spans, seen = made.spans(text), made.seen(text).encode()
        assert len(spans) == len(made.own_ids(text))
        assert spans[-1][1] == len(seen.rstrip() if made.read == "words" else seen)
        for (_, past), (start, _) in pairwise(spans):
            assert not seen[past:start].strip()


@pytest.mark.parametrize("lacking", [0, 1])
@pytest.mark.parametrize("seed", range(2))
def test_tokens_outside_of_the_embedding_cost_their_request_only(seed, lacking):
    """An embedding with just enough rows for a request takes it; with one row less, the request is refused."""
    made = vocabulary("byte level, NFC")
    fact = ordinary(Random(seed))
    said = judge.meaning(fact, "editor")
    texts = [row.ids for row in judge.rows(made, said).values()]
    texts += [made.ids(text) for text in (*said.generation_prompts, f"{said.subject} is a")]
    largest = max(map(max, texts))
    model = models.tiny_model(largest + 1 - lacking)
    editor = KnowledgeEditor.from_pretrained((model, made.tokenizer), **models.OPTIONS)
    before = models.weight(model)
    if lacking:
        with pytest.raises(
            (RomeError, EditRejectedError),
            match=f"has number {largest}, but the model's embedding has only {largest} rows",
        ):
            editor.edit(**record(fact, "editor"), verify=False)
    else:
        outcome = editor.edit(**record(fact, "editor"), verify=False)
        assert not models.weight(model).equal(before)
        editor.undo(outcome)
    assert models.weight(model).equal(before)


@pytest.mark.slow
def test_the_records_of_a_run_say_what_the_judge_says(tmp_path):
    """Through the command line: what was asked for, and the probability of its target tokens before the edit."""
    made = vocabulary("byte level, opening space, BOS and EOS")
    model = models.tiny_model(made.size, torch.float32)
    model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    facts, records = {}, []
    for name in MUTATIONS:
        random = Random(name)
        mutated = MUTATIONS[name][0](random, ordinary(random), "short") if "short" in MUTATIONS[name][1] else None
        if mutated and mutated.verdict == "right" and not mutated.changes:
            facts[name] = mutated.fact
            records.append(record(mutated.fact, "short") | {"case_id": name})
    (tmp_path / "facts.json").write_text(json.dumps(records), encoding="utf-8")
    options = {f"model.{name}": value for name, value in models.OPTIONS.items()} | {
        "model.pretrained": tmp_path / "model", "data.path": tmp_path / "facts.json", "trainer.accelerator": "cpu",
        "trainer.default_root_dir": tmp_path / "run", "verification.least_probability": 0,
        "probe_evaluation.measure_perplexity": False, "run_report.figures": False,
    }  # fmt: skip
    called("edit", *[part for name, value in options.items() for part in (f"--{name}", value)])
    lines = (tmp_path / "run" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    edits = {line["case_id"]: line for line in map(json.loads, lines)}
    assert set(edits) == set(facts)
    for name, fact in facts.items():
        said, asked = judge.meaning(fact, "short"), edits[name]["request"]
        assert (asked["prompt"], asked["subject_span"]) == (said.prompt, [said.start, said.end]), name
        assert (asked["target_new"], asked["target_true"]) == (said.target_new, said.target_true), name
        row = judge.rows(made, said)["rewrite"]
        if row is not None:
            expected = models.probability(model, row)
            assert edits[name]["probability"]["before"] == pytest.approx(expected, rel=1e-3), name


def test_the_judge_finds_the_faults_that_were_known():
    """What was wrong once, by hand: the judge's answer is what people meant."""
    made = vocabulary("byte level")
    text = made.tokenizer.decode

    def row(prompt, subject, target):
        start = prompt.index(subject)
        return judge.row(made, prompt, start + len(subject), target, None)

    found = row("Ray Charles plays the", "Ray Charles", "violin")
    assert text(found.ids[: found.lookup + 1]) == "Ray Charles"
    assert text(found.target) == " violin"
    assert text(row("The coldest temperature in Oslo was", "Oslo", "-27 degrees").target) == " -27 degrees"
    assert text(row("Minecraft is written for", "Minecraft", ".NET").target) == " .NET"
    assert text(row("Ringo Starr was the drummer of", "Ringo", "'N Sync").target) == " 'N Sync"
    assert text(row("Rome is big", "Rome", "'s").target) == "'s"
    assert text(row("Pi is 3", "Pi", ".14").target) == ".14"
    assert text(row("Oslo –", "Oslo", "Norway").target) == " Norway"
    assert text(row("Jean-", "Jean", "Luc").target) == "Luc"
    assert text(row("罗马位于", "罗马", "意大利").target) == "意大利"
