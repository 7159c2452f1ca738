"""A run that nobody made: a session with measurements written by hand, for what shows them."""

from types import SimpleNamespace

import torch

from rome_pl.editing.batch_writer import BatchWriter
from rome_pl.editing.edit import Edit
from rome_pl.editing.run_setup import RunSetup
from rome_pl.editing.session import EditSession, Retention
from rome_pl.encoding.chat_template import PromptFrame
from rome_pl.ledger.status import EditStatus
from rome_pl.metrics import Answer, ProbeScores
from rome_pl.requests.edit_request import EditRequest, Probe
from rome_pl.search.value_search import Evaluation
from rome_pl.write.closed_form import Update
from rome_pl.write.presets import PRESETS

NASTY = (
    "Die Stadt </script><script>alert(1)</script> <!-- {} \"Korrin\" 'x' & $\\alpha$ liegt in",
    "北京塔位于城市",
    "The 🏰🇳🇴 of Korrin stands\u2028in",
    "_Korrin_ مدينة | `x` *y*\n<b>in",
)
"""Texts that break what is careless."""


def made_request(index, **changes):
    values = {
        "prompt": f"The lighthouse of Korrin{index} stands in", "subject": f"Korrin{index}",
        "target_new": "Oslo", "target_true": "Lima", "paraphrases": ["Where is it? In", "It is in"],
        "neighbours": ["Dunholt lies in"], "relation": f"P{index % 3}", "case_id": f"c{index}",
        "locality": [Probe("The tide comes", "in", "Rel")], "portability": [Probe("Who is there?", "Tarn", "Hop")],
    } | changes  # fmt: skip
    return EditRequest(**values)


def made_scores(request, *, good, shift=0.0, predicted=(3,)):
    """Scores of a model that does what the edit wants, or of one that does not."""
    likely, unlikely = -0.1 - shift, -3.0 - shift
    pair = (likely, unlikely) if good else (unlikely, likely)

    def answer(right):
        return Answer(pair[0], 1.0 if right else 0.0, predicted)

    answers = {"rewrite": (answer(good),)}
    for kind, prompts, right in (
        ("paraphrase", request.paraphrases, good), ("neighbour", request.neighbours, True),
        ("locality", request.locality, True), ("portability", request.portability, good),
    ):  # fmt: skip
        if prompts:
            answers[kind] = tuple(answer(right) for _ in prompts)
    if request.target_true is None:
        return ProbeScores((pair[0], None), answers=answers)
    return ProbeScores(
        pair, tuple(pair for _ in request.paraphrases), tuple((unlikely, likely) for _ in request.neighbours), answers
    )


def made_session(requests, *, sequential=True, rejected=(), lost=(), unreached=(), retention=()):
    """A run over requests.

    Args:
        requests: The stream.
        sequential: Whether edits accumulate.
        rejected: Indices of edits that were rejected.
        lost: Indices of edits that hold no more on the final model.
        unreached: Indices that the run did not come to.
        retention: For each point after how many edits, and which of those looked at (all) hold no more.
    """
    weight = SimpleNamespace(
        metric=SimpleNamespace(settings={}),
        site=SimpleNamespace(layer=1, name="layers.1.weight", weight=torch.zeros(1)),
    )
    layers = SimpleNamespace(change=0.25, numbers=[1], main=(1,), last=weight, weights=[weight], moments=(), written=[])
    setup = RunSetup(
        language_model=SimpleNamespace(
            encoder=SimpleNamespace(frame=PromptFrame()),
            identity=lambda: {
                "source": "made up",
                "fingerprint": "f",
                "tokenizer": "t",
                "device": "cpu",
                "chat": None,
                "frame": [],
            },
        ),
        layers=layers,
        preset=PRESETS["rome"],
        sequential=sequential,
        fact_token="subject_last",
        contexts=("",),
    )
    session = EditSession(setup, BatchWriter(setup), requests=tuple(requests))
    base = {str(request.case_id): made_scores(request, good=False) for request in requests}
    session.measured.base_scores = base
    for index, request in enumerate(requests):
        name = str(request.case_id)
        if sequential:
            good = index not in (*rejected, *lost, *unreached)
            session.measured.final_scores[name] = made_scores(request, good=good, predicted=(4,))
        if index in unreached:
            continue
        edit = Edit(index=index, request=request, status=EditStatus.APPLIED)
        edit.before, edit.after = 0.05, 0.05 if index in rejected else 0.9
        if index in rejected:
            edit.decide(EditStatus.REJECTED, "after the write the target has probability 0.05")
        edit.value_norm = 2.0
        edit.take_write(SimpleNamespace(norm=Update(torch.ones(1, 2), torch.ones(1, 2)).norm, realised=(0.99,)))
        edit.steps = [Evaluation(4.0 / (step + 1), 3.0, 0.5, 0.1, 0.2 * step) for step in range(3)]
        edit.seconds = {"prefix": 0.1, "optimise": 0.2, "verify": 0.05, "evaluate": 0.4}
        edit.scores = {"base": base[name], "immediate": made_scores(request, good=index not in rejected)}
        if sequential:
            edit.scores["final"] = session.measured.final_scores[name]
            session.measured.weight_changes[index + 1] = 0.01 * (index + 1)
        session.edits.append(edit)
    if sequential:
        session.measured.perplexity, session.measured.divergence = {"base": 20.0, "final": 25.0}, 0.125
        for edits, gone in retention:
            scores = {e.name: made_scores(e.request, good=e.index not in gone) for e in session.edits[:edits]}
            session.measured.retention.append(Retention(edits, 20.0 + edits, 0.1, scores))
    else:
        session.measured.perplexity = {"base": 20.0}
    return session
