"""What is wrong with a refusal, a request and its tokens, or an edit, by what the judge says."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from rome_pl.encoding.text_encoder import TextEncoder
from rome_pl.errors import RomeError
from rome_pl.requests.edit_request import EditRequest
from tests.campaign import judge, models
from tests.campaign.facts import PARTS, written_name
from tests.campaign.judge import Meaning
from tests.campaign.mutations import Mutated
from tests.campaign.vocabularies import Vocabulary, vocabulary

LONGEST_MESSAGE = 600
LENGTH = 512
CONTEXT = "It rains. "


# ---- refusals


def message_faults(message: str, mutated: Mutated, form: str, path: Path | None) -> list[str]:
    faults = []
    own = message.replace(str(path), "") if path is not None else message
    if len(own) > LONGEST_MESSAGE:
        faults.append(f"the message has {len(own)} characters: {own[:200]}")
    try:
        message.encode()
    except UnicodeEncodeError:
        faults.append("the message cannot be printed as UTF-8")
    # What is refused only when it becomes tokens has lost how its file called it.
    known = [name for part in mutated.named for name in (part, written_name(part, form))]
    if known and not any(name in message for name in known):
        faults.append(f"the message names none of {sorted(set(known))}: {message[:300]}")
    if mutated.shown not in message:
        faults.append(f"the message does not show {mutated.shown}: {message[:300]}")
    return faults


# ---- requests


@cache
def encoder(name: str) -> TextEncoder:
    return TextEncoder(vocabulary(name).tokenizer, LENGTH)


def request_faults(request: EditRequest, mutated: Mutated, form: str, made: Vocabulary) -> list[str]:
    """What is wrong with a request and its tokens; a refusal by the encoder is raised."""
    said = judge.meaning(mutated.fact, form)
    faults = _texts(request, mutated, form, said)
    rows = judge.rows(made, said)
    apart = all(rows.values())
    encode = encoder(made.name)
    try:
        edit = encode.edit(request, ("", CONTEXT))
        encode.check_probes(request)
    except RomeError:
        if apart:
            raise
        return faults  # the judge cannot tell prompt and target apart either
    rewrite = rows["rewrite"]
    if rewrite is not None:
        faults += _row("rewrite prompt", edit.rows[0], rewrite)
    shifted = judge.row(made, CONTEXT + said.prompt, len(CONTEXT) + said.end, said.target_new, said.target_space)
    if shifted is not None:
        faults += _row("rewrite prompt after a context", edit.rows[1], shifted)
    ids, lookup = judge.divergence_ids(made, said.subject)
    if (list(edit.kl_row.ids), edit.kl_row.lookup) != (ids, lookup):
        faults.append(f"divergence: {edit.kl_row.ids} at {edit.kl_row.lookup}, judge {ids} at {lookup}")
    for target in filter(None, (said.target_new, said.target_true)):
        for prompt in (said.prompt, *said.paraphrases, *said.neighbours):
            faults += _continuation(encode, request, made, said, prompt, target)
    for probe in (*said.locality, *said.portability):
        faults += _continuation(encode, request, made, said, probe.prompt, probe.answer)
    return faults


def _continuation(
    encode: TextEncoder, request: EditRequest, made: Vocabulary, said: Meaning, prompt: str, target: str
) -> list[str]:
    expected = judge.row(made, prompt, None, target, said.target_space)
    if expected is None:
        return []
    return _row(f"{target!r} after {prompt!r}", encode.continuation(prompt, target, request), expected)


def _row(what: str, got: Any, expected: judge.Row) -> list[str]:
    ids = [*got.ids, *got.target[-1:]]
    faults = []
    if list(got.target) != expected.target:
        faults.append(f"{what}: target ids {list(got.target)}, judge {expected.target}")
    if ids != expected.ids:
        faults.append(f"{what}: ids {ids}, judge {expected.ids}")
    if got.lookup != expected.lookup:
        faults.append(f"{what}: lookup token {got.lookup}, judge {expected.lookup}")
    if got.first != len(ids) - len(got.target) - 1:
        faults.append(f"{what}: predicts from {got.first} of {len(ids)} with {len(got.target)} target tokens")
    return faults


def _texts(request: EditRequest, mutated: Mutated, form: str, said: Meaning) -> list[str]:
    """What of a request is not what was meant."""
    expected: dict[str, Any] = {
        "prompt": said.prompt, "subject": said.subject, "span": (said.start, said.end), "target_new": said.target_new,
        "target_true": said.target_true, "paraphrases": said.paraphrases, "neighbours": said.neighbours,
        "generation_prompts": said.generation_prompts, "references": said.references,
    }  # fmt: skip
    got = {name: getattr(request, name) for name in expected}
    for name in ("locality", "portability"):
        expected[name] = [(probe.prompt, probe.answer, probe.kind) for probe in getattr(said, name)]
        got[name] = [(probe.prompt, probe.answer, probe.kind) for probe in getattr(request, name)]
    if (said.target_new[0].isalnum() and said.target_space is not None) or form in ("short", "api"):
        expected["target_space"], got["target_space"] = said.target_space, request.target_space
    if "case_id" in PARTS[form] and mutated.fact.case_id is not None:
        expected["case_id"] = mutated.fact.case_id if mutated.case_id is None else mutated.case_id
        got["case_id"] = request.case_id
    faults = [
        f"{name}: {got[name]!r:.200}, judge {expected[name]!r:.200}" for name in expected if got[name] != expected[name]
    ]
    notes = getattr(request, "notes", ())
    if mutated.notes is not None and bool(notes) is not mutated.notes:
        faults.append(f"notes: {notes!r:.300}, though {'something' if mutated.notes else 'nothing'} was changed")
    if any(not isinstance(note, str) or len(note) > LONGEST_MESSAGE for note in notes):
        faults.append(f"notes are no short texts: {notes!r:.300}")
    if replace(request) != request or "notes" in request.content():
        faults.append("it is another one when it is made again, or its content holds its notes")
    return faults


# ---- edits


def edits_faults(raw: dict[str, Any], mutated: Mutated, made: Vocabulary) -> list[str]:
    """Make an edit by EasyEdit's arguments, look at what was written, and undo it."""
    editor = models.editor(made.name)
    before = models.weight(editor.model)
    result = editor.edit(**raw, verify=False)
    change = models.weight(editor.model) - before
    result.undo()
    if not models.weight(editor.model).equal(before):
        return ["the weight is not what it was after the undo"]
    row = judge.rows(made, judge.meaning(mutated.fact, "easyedit"))["rewrite"]
    return [] if row is None else _key_faults(editor.model, change, row)


def _key_faults(model: Any, change: Any, row: judge.Row) -> list[str]:
    """Whether the key that was written is that of the judge's lookup token, by a forward pass of its own."""
    token, cosine = models.looked_up(change, models.keys(model, row.ids))
    if token == row.lookup and cosine > 1 - 1e-9:
        return []
    return [f"the key of token {token} was written (cosine {cosine}), judge {row.lookup}"]


def edit_faults(raw: dict[str, Any], mutated: Mutated, made: Vocabulary) -> list[str]:
    """Make an edit, look at what was written and asked for, and undo it."""
    faults = []
    editor = models.editor(made.name)
    before = models.weight(editor.model)
    outcome = editor.edit(**raw, verify=False)
    change = models.weight(editor.model) - before
    editor.undo(outcome)
    if not models.weight(editor.model).equal(before):
        faults.append("the weight is not what it was after the undo")
    request = outcome.edit.request
    faults += request_faults(request, mutated, "editor", made)
    row = judge.rows(made, judge.meaning(mutated.fact, "editor"))["rewrite"]
    if row is None:
        return faults
    faults += _key_faults(editor.model, change, row)
    expected = models.probability(editor.model, row)
    if abs(outcome.before.target_new - expected) > 1e-9:
        faults.append(f"probability before: {outcome.before.target_new}, judge {expected}")
    if missing := set(getattr(request, "notes", ())) - set(outcome.edit.notes):
        faults.append(f"notes of the request are not among the edit's: {missing}")
    return faults
