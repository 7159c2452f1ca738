"""One case: made from its name, put to the package with a clock, and compared with what the judge says."""

import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from rome_pl.errors import RomeError
from rome_pl.interop.easyedit_arguments import easyedit_requests
from rome_pl.requests.edit_request import EditRequest
from rome_pl.requests.record_forms import parse_records, read_records
from tests.campaign import odd_yaml, subjects, texts, wrong_types  # noqa: F401 -- these enter their mutations
from tests.campaign.comparison import edit_faults, edits_faults, message_faults, request_faults
from tests.campaign.facts import FILE_FORMS, GOOD, SUFFIXES, file_content, ordinary, record
from tests.campaign.mutations import MUTATIONS, Mutated, Verdict
from tests.campaign.odd_files import ODD_FILES, OddFile
from tests.campaign.reader import read_apart
from tests.campaign.vocabularies import NAMES, Vocabulary, vocabulary

SECONDS = 10


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
                    if name.endswith("/0"):  # an edit costs more than all the rest
                        faults += edits_faults(raw, mutated, made)
                    (request,) = easyedit_requests(**raw)
                elif form == "api":
                    request = EditRequest(**raw)
                else:
                    faults += edit_faults(raw, mutated, made)
                    request = None
                if request is not None:
                    faults += request_faults(request, mutated, form, made)
                got = "right"
            except RomeError as error:
                got = "refused"
                faults += message_faults(str(error), mutated, form, path)
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
            faults += message_faults(message, mutated, form, odd.path)
        return Outcome(name, odd.verdict, got, (*faults, *_against(odd.verdict, got)), shown)
    got = "crash"
    try:
        with clock():
            try:
                requests, invalid = parse_records(read_records(odd.path), str(odd.path))
                got = "refused" if invalid else "right"
                for one in invalid:
                    faults += message_faults(one.message, mutated, form, odd.path)
                if odd.fact is not None and requests and not invalid:
                    faults += request_faults(requests[0], mutated, form, made)
            except RomeError as error:
                got = "refused"
                faults += message_faults(str(error), mutated, form, odd.path)
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

    # Work is counted in time of the processor, so that a busy machine is not taken for a hang; a case that only waits,
    # as for the other end of a pipe, works not at all.
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, 12 * SECONDS))
    kept = [(number, signal.signal(number, ring)) for _, number, _ in timers]
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _, _ in timers:
            signal.setitimer(timer, 0)
        for number, handler in kept:
            signal.signal(number, handler)
