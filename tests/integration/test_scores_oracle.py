"""Every score of every data set against a slow computation: one prompt at a time, plain forwards, no shared code."""

import contextlib
import math
from collections import defaultdict

import pytest
import torch

from rome_pl.forward import token_trees as packs
from rome_pl.metrics import probe_scores, summarise
from rome_pl.requests.edit_request import RequestError
from rome_pl.requests.record_forms import parse_records, read_records
from tests.tiny import tiny_language_model
from tests.variants import slow

RECORDS = 100
FILES = {"counterfact": "counterfact.json", "zsre": "zsre.json", "knowedit": "knowedit_zsre.json"}

SHAPES = ((1, 1), (16, 7 * 16), (16, 64 * 16), (packs.WIDTH, packs.TOKENS))
"""Widest pack and tokens of a forward."""


def joined(prompt, answer):
    """A prompt with its answer as text, and where the answer begins.

    A space joins them, but not before a sign such as $, which the tiny tokenizer does not expect after a space.
    """
    space = " " if answer.strip()[0].isalnum() else ""
    return f"{prompt.rstrip(' ')}{space}{answer.strip(' ')}", len(prompt.rstrip(" "))


def slow_answer(language_model, prompt, answer):
    """Log-probability per token, share of likeliest tokens and likeliest tokens, from one plain forward."""
    text, border = joined(prompt, answer)
    encoded = language_model.tokenizer(text, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    first = next(place for place, (_, end) in enumerate(offsets) if end > border)
    with torch.no_grad():
        log_probs = language_model.model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    places = range(first, len(ids))
    values = [float(log_probs[place - 1, ids[place]]) for place in places]
    likeliest = [int(log_probs[place - 1].argmax()) for place in places]
    hits = [token == ids[place] for token, place in zip(likeliest, places, strict=True)]
    return sum(values) / len(values), sum(hits) / len(hits), likeliest


def slow_scores(language_model, base_model, requests):
    """Means over records, by name."""
    rows = defaultdict(list)

    def put(name, values):
        if values:
            rows[name].append(sum(values) / len(values))

    for request in requests:
        new, true = request.target_new, request.target_true

        def pair(prompt, new=new, true=true):
            return slow_answer(language_model, prompt, new)[0], slow_answer(language_model, prompt, true)[0]

        groups = {"E": ([request.prompt], 1), "P": (request.paraphrases, 1), "N": (request.neighbours, -1)}
        for letter, (prompts, sign) in groups.items():
            pairs = [pair(prompt) for prompt in prompts] if true is not None else []
            put(letter + "S", [float(sign * (a - b) > 0) for a, b in pairs])
            put(letter + "M", [sign * (math.exp(a) - math.exp(b)) for a, b in pairs])
        wanted = {
            "rewrite": [(request.prompt, new)],
            "rephrase": [(prompt, new) for prompt in request.paraphrases],
            "neighbour": [(prompt, true) for prompt in request.neighbours if true is not None],
            "locality": [(probe.prompt, probe.answer) for probe in request.locality],
            "portability": [(probe.prompt, probe.answer) for probe in request.portability],
        }
        for kind, probes in wanted.items():
            answers = [slow_answer(language_model, *probe) for probe in probes]
            put(f"{kind}_acc", [share for _, share, _ in answers])
            put(f"{kind}_match", [float(share == 1) for _, share, _ in answers])
            if kind == "locality":
                before = [slow_answer(base_model, *probe)[2] for probe in probes]
                same = [
                    sum(a == b for a, b in zip(now, then, strict=True)) / len(now)
                    for (_, _, now), then in zip(answers, before, strict=True)
                ]
                put("locality", same)
    return {name: (sum(values) / len(values), len(values)) for name, values in rows.items()}


@pytest.fixture(scope="module", params=["gpt2", slow("llama")])
def models(request):
    """A model and the one it was edited from: here one with other weights."""
    return tiny_language_model(request.param), tiny_language_model(request.param, seed=7)


def readable(language_model, requests):
    """The first records whose probes all fit into the tiny model's 128 tokens."""
    fitting = []
    for request in requests:
        with contextlib.suppress(RequestError):
            language_model.encoder.check_probes(request)
            fitting.append(request)
    return fitting[:RECORDS]


@pytest.mark.parametrize("form", FILES)
def test_every_score_equals_the_slow_one(models, form, data_folder, monkeypatch):
    model, base = models
    requests = readable(model, parse_records(read_records(data_folder / FILES[form])[: 2 * RECORDS], form, form)[0])
    assert len(requests) == RECORDS
    slow = slow_scores(model, base, requests)
    names = [str(request.case_id) for request in requests]
    before = dict(zip(names, probe_scores(base, requests), strict=True))
    # Every text by itself, some seven or sixty-four short rows a forward, and as it comes.
    for (width, tokens), side in zip(SHAPES, ("left", "right", "left", "right"), strict=True):
        monkeypatch.setattr(packs, "WIDTH", width)
        monkeypatch.setattr(packs, "TOKENS", tokens)
        monkeypatch.setattr(packs, "PADDING", tokens)
        model.tokenizer.padding_side = side
        table = summarise(dict(zip(names, probe_scores(model, requests), strict=True)), before)
        for name, (value, n) in slow.items():
            assert table[name]["value"] == pytest.approx(value, abs=1e-5), name
            assert table[name]["n"] == n, name
        rates = [slow[name][0] for name in ("ES", "PS", "NS") if name in slow]
        if len(rates) == 3:
            assert table["S"]["value"] == pytest.approx(3 / sum(1 / rate for rate in rates), abs=1e-2)
        assert {name for name, entry in table.items() if entry["n"]} - {"S"} == set(slow)
