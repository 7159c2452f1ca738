"""One case: made from its name, put to the package with a clock, and compared with what the judge says."""

import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from rome_pl.easyedit import easyedit_requests
from rome_pl.encoding import TextEncoder
from rome_pl.errors import RomeError
from rome_pl.records import parse_records, read_records
from rome_pl.requests import EditRequest
from tests.campaign import judge, models, wrong_types
from tests.campaign.facts import (
    FILE_FORMS,
    FORMS,
    GOOD,
    PARTS,
    SUFFIXES,
    file_content,
    ordinary,
    record,
    written_name,
)
from tests.campaign.judge import Meaning
from tests.campaign.mutations import MUTATIONS, Mutated, Verdict
from tests.campaign.odd_files import ODD_FILES, OddFile
from tests.campaign.reader import read_apart
from tests.campaign.vocabularies import NAMES, Vocabulary, vocabulary

SECONDS = 10
LONGEST_MESSAGE = 600
LENGTH = 512
CONTEXT = "It rains. "


class HangError(BaseException):
    """A case that does not end."""


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Args:
        name: The case.
        verdict: What had to come of it.
        got: ``right``, ``refused``, ``crash`` or ``hang``.
        faults: What is wrong with that.
    """

    name: str
    verdict: Verdict
    got: str
    faults: tuple[str, ...]
    case: str


def names(seed: int, each: int, each_of_editor: int) -> list[str]:
    """The names of the cases of a campaign: so many of every mutation in every form."""
    every = [(form, name) for name, (_, forms) in MUTATIONS.items() for form in forms]
    every += [(form, name) for name in ODD_FILES for form in FILE_FORMS]
    return [
        f"{seed}/{form}/{name}/{number}"
        for form, name in every
        for number in range(each_of_editor if form == "editor" else each)
    ]


def try_case(name: str) -> Outcome:
    """Make a case, try it, and compare."""
    _, form, what, _ = name.split("/")
    random = Random(name)
    with tempfile.TemporaryDirectory() as folder:
        if what in ODD_FILES:
            fact = ordinary(random)
            odd = ODD_FILES[what](random, fact, form, Path(folder))
            return _try_file(name, odd, form, vocabulary(random.choice(NAMES)))
        mutated = None
        while mutated is None:
            mutated = MUTATIONS[what][0](random, ordinary(random), form)
            if mutated is None and random.random() < 0.02:
                mutated = Mutated(ordinary(random))
        return _try_mutated(name, mutated, form, Path(folder), random)


def _try_mutated(name: str, mutated: Mutated, form: str, folder: Path, random: Random) -> Outcome:
    made = vocabulary(random.choice(NAMES))
    raw = wrong_types.changed(record(mutated.fact, form), mutated.changes)
    if form == "easyedit":
        raw.pop("case_id", None)
    shown = f"{raw!r:.1500}\n  tokenizer: {made.name}"
    path: Path | None = None
    if form in FILE_FORMS:
        path = folder / f"facts{_suffix(raw, random)}"
        path.write_bytes(file_content([record(GOOD, form), raw], path.suffix, random))
    faults: list[str] = []
    got = "crash"
    try:
        with clock():
            try:
                if path is not None:
                    request = _second(path, faults)
                elif form == "easyedit":
                    (request,) = easyedit_requests(**raw)
                elif form == "api":
                    request = EditRequest(**raw)
                else:
                    faults += _edit(raw, mutated, made)
                    request = None
                if request is not None:
                    faults += _compare(request, mutated, form, made)
                got = "right"
            except RomeError as error:
                got = "refused"
                faults += _message(str(error), mutated, form, path)
            except TypeError as error:
                # Python's own words for an argument that a function does not have, or lacks.
                if form != "api" or "__init__()" not in str(error):
                    raise
                got = "refused"
    except HangError:
        got, faults = "hang", [f"no end within {SECONDS} s"]
    except Exception as error:
        got, faults = "crash", [f"{type(error).__name__}: {error!s:.300}"]
    faults += _against(mutated.verdict, got)
    return Outcome(name, mutated.verdict, got, tuple(faults), shown)


def _try_file(name: str, odd: OddFile, form: str, made: Vocabulary) -> Outcome:
    try:
        shown = f"{odd.path.name}: {odd.path.read_bytes()[:1500]!r}" if odd.path.is_file() else odd.path.name
    except (OSError, ValueError) as error:
        shown = f"{odd.path.name[:50]}: {error}"
    mutated = Mutated(odd.fact or GOOD, odd.verdict, odd.named, odd.notes)
    faults: list[str] = []
    if odd.alone:
        answer = read_apart(odd.path)
        if "fault" in answer:
            return Outcome(
                name, odd.verdict, "hang" if "no end" in answer["fault"] else "crash", (answer["fault"],), shown
            )
        got = "refused" if answer["refused"] else "right"
        for message in answer["refused"]:
            faults += _message(message, mutated, form, odd.path)
        return Outcome(name, odd.verdict, got, (*faults, *_against(odd.verdict, got)), shown)
    got = "crash"
    try:
        with clock():
            try:
                requests, invalid = parse_records(read_records(odd.path), str(odd.path))
                got = "refused" if invalid else "right"
                for one in invalid:
                    faults += _message(one.message, mutated, form, odd.path)
                if odd.fact is not None and requests and not invalid:
                    faults += _compare(requests[0], mutated, form, made)
            except RomeError as error:
                got = "refused"
                faults += _message(str(error), mutated, form, odd.path)
    except HangError:
        got, faults = "hang", [f"no end within {SECONDS} s"]
    except Exception as error:
        got, faults = "crash", [f"{type(error).__name__}: {error!s:.300}"]
    return Outcome(name, odd.verdict, got, (*faults, *_against(odd.verdict, got)), shown)


def _against(verdict: Verdict, got: str) -> list[str]:
    if got in ("crash", "hang") or verdict == "safe" or verdict == got:
        return []
    return [f"expected {verdict}, got {got}"]


def _suffix(raw: Any, random: Random) -> str:
    """A kind of file that can hold the record."""
    return random.choice(SUFFIXES) if _json_holds(raw) else ".yaml"


def _json_holds(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_json_holds, value.values()))
    return all(map(_json_holds, value)) if isinstance(value, list) else isinstance(value, str | int | float | None)


def _second(path: Path, faults: list[str]) -> EditRequest:
    """The request of the second record; the first has to be read whatever the second is."""
    requests, invalid = parse_records(read_records(path), str(path))
    if not requests or requests[0].case_id != "good" or len(requests) + len(invalid) != 2:
        faults.append("the record before it is not read as it was")
    if invalid:
        raise RomeError(invalid[-1].message)
    return requests[1]


@contextmanager
def clock() -> Iterator[None]:
    """Ends what does not end."""

    def ring(*_: object) -> None:
        raise HangError

    kept = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)


# ---- refusals


def _message(message: str, mutated: Mutated, form: str, path: Path | None) -> list[str]:
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


def _compare(request: EditRequest, mutated: Mutated, form: str, made: Vocabulary) -> list[str]:
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


def _edit(raw: dict[str, Any], mutated: Mutated, made: Vocabulary) -> list[str]:
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
    faults += _compare(request, mutated, "editor", made)
    row = judge.rows(made, judge.meaning(mutated.fact, "editor"))["rewrite"]
    if row is None:
        return faults
    token, cosine = models.looked_up(change, models.keys(editor.model, row.ids))
    if token != row.lookup or cosine < 1 - 1e-9:
        faults.append(f"the key of token {token} was written (cosine {cosine}), judge {row.lookup}")
    expected = models.probability(editor.model, row)
    if abs(outcome.before.target_new - expected) > 1e-9:
        faults.append(f"probability before: {outcome.before.target_new}, judge {expected}")
    if missing := set(getattr(request, "notes", ())) - set(outcome.edit.notes):
        faults.append(f"notes of the request are not among the edit's: {missing}")
    return faults


def describe(outcomes: Sequence[Outcome]) -> str:
    """One line for each form, and one for each mutation that anything is wrong with."""
    lines = [f"{len(outcomes)} cases, {sum(bool(outcome.faults) for outcome in outcomes)} with faults"]
    forms = {form: [one for one in outcomes if one.name.split("/")[1] == form] for form in FORMS}
    kinds = ("right", "refused", "crash", "hang")
    for form, own in forms.items():
        counts = ", ".join(f"{kind} {sum(one.got == kind for one in own)}" for kind in kinds)
        lines.append(f"{form:12} {len(own):5} cases: {counts}, faults {sum(bool(one.faults) for one in own)}")
    by_mutation: dict[str, list[Outcome]] = {}
    for one in outcomes:
        by_mutation.setdefault(one.name.split("/")[2], []).append(one)
    for name, own in sorted(by_mutation.items()):
        counts = ", ".join(f"{kind} {number}" for kind in kinds if (number := sum(one.got == kind for one in own)))
        lines.append(f"  {name:40} {len(own):4}: {counts}, faults {sum(bool(one.faults) for one in own)}")
    return "\n".join(lines)


def complaints(outcomes: Sequence[Outcome], most: int = 20) -> str:
    """The first cases with faults, each with what it takes to repeat it."""
    bad = [outcome for outcome in outcomes if outcome.faults]
    return "\n".join(
        f"{one.name} (expected {one.verdict}, got {one.got})\n  " + "\n  ".join(one.faults) + f"\n  {one.case}"
        for one in bad[:most]
    )
