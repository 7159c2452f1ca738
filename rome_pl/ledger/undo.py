"""Undoing edits of a finished run from its ledger, without optimising again.

The closed form is replayed for the edits that remain, from their stored keys and values. Only subtracting an edit's
change would be wrong: later edits were solved against a weight that contained it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from rome_pl.ledger.edit_log import Ledger, LedgerError
from rome_pl.ledger.replay import read_edits, read_manifest, read_writes
from rome_pl.ledger.status import EditStatus
from rome_pl.model.architecture import find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.second_moments.moment_store import kept_statistics, shipped_statistics
from rome_pl.second_moments.second_moment import SecondMoment, StatisticsError
from rome_pl.write.edited_layers import EditedLayers
from rome_pl.write.edited_weight import EditedWeight
from rome_pl.write.key_metric import make_metric

__all__ = ["Undone", "pick", "undo", "with_edits"]

PATIENCE = 10.0
"""Seconds to wait for another process to release the ledger."""


@dataclass(frozen=True)
class Undone:
    """The result of undoing edits.

    Args:
        layers: The weights with the remaining edits, written to the model.
        names: The edits that were undone.
        resolved: Edits that were solved again, because an earlier edit was undone.
        holding: Remaining edits about the subject of an earlier edit that was undone. Their values were found on top of
            it and may still contain its fact.
    """

    layers: EditedLayers
    names: tuple[str, ...]
    resolved: tuple[str, ...]
    holding: tuple[str, ...]


def undo(
    language_model: LanguageModel,
    run: Path,
    names: Collection[str],
    statistics: Sequence[Path] = (),
    save: Callable[[], None] | None = None,
) -> Undone:
    """Undo edits of a sequential run, and record it in the ledger.

    Args:
        language_model: The unedited model that the run began with. It gets the remaining edits.
        run: The run's folder.
        names: The edits, by ``case_id``.
        statistics: Paths of the run's second moments, if they are neither shipped nor cached.
        save: Called once the model has its final weights, before the ledger is changed: if it fails, nothing is undone.

    Raises:
        LedgerError: If an edit is not in the weight, or the ledger cannot be used; see :func:`read_writes`.
        StatisticsError: If the run's second moment is not found.
    """
    read_edits(run)  # whatever is wrong with the folder comes to light before anything is made in it
    # Locked, read, written: another process may undo something of the same run.
    ledger = Ledger(run / "ledger", resume=True, wait=PATIENCE)
    ledger.skip()
    try:
        known = read_edits(run)
        edits = {str(edit["case_id"]): edit for edit in known}
        layers = with_edits(language_model, run, statistics, known)
        writes = list(layers.written)
        for name in names:
            if name not in layers.names:
                found = f"it is {edits[name]['status']}" if name in edits else "the ledger has no such record"
                raise LedgerError(f"{run}: edit {name} is not in the weight ({found}); see rome-pl show --ledger {run}")
        layers.remove(names)
        before = {name: written for written in writes for name in written.names}
        anew = [written for written in layers.written if not written.same_as(before[written.names[0]])]
        if save is not None:
            save()
        ledger.amend(
            [(edits[name], {"status": str(EditStatus.UNDONE)}) for name in names],
            [(written, [edits[name] for name in written.names]) for written in anew],
        )
    finally:
        ledger.close()
    resolved = tuple(name for written in anew for name in written.names)
    order = [name for written in writes for name in written.names]
    holding: list[str] = []
    subjects: set[str] = set()
    for name in order:
        subject = edits[name]["request"]["subject"]
        if name in names:
            subjects.add(subject)
        elif subject in subjects:
            holding.append(name)
    return Undone(layers, tuple(names), resolved, tuple(holding))


def with_edits(
    language_model: LanguageModel,
    run: Path,
    statistics: Sequence[Path] = (),
    edits: Sequence[dict[str, Any]] | None = None,
) -> EditedLayers:
    """Put the edits of a sequential run into the unedited model; unlike :func:`replay`, edits can be taken out again.

    Args:
        language_model: The unedited model that the run began with.
        run: The run's folder.
        statistics: Paths of the run's second moments, if they are neither shipped nor cached.
        edits: What :func:`rome_pl.ledger.replay.read_edits` has given, if it was read already.

    Raises:
        LedgerError: As :func:`read_writes`.
        StatisticsError: If a second moment of the run is not at hand.
    """
    numbers, writes = read_writes(language_model, run, edits)
    manifest: dict[str, Any] = read_manifest(run)
    moments = [_moment(language_model, run, wanted, statistics) for wanted in manifest["second_moments"]]
    weights = [
        EditedWeight(find_site(language_model.model, number), make_metric(moment=moment, **manifest["metric"]))
        for number, moment in zip(numbers, moments or repeat(None, len(numbers)), strict=True)
    ]
    layers = EditedLayers(weights, moments)
    for written in writes:
        layers.restore(written)
    return layers


def pick(
    language_model: LanguageModel, run: Path, names: Collection[str], statistics: Sequence[Path] = ()
) -> EditedLayers:
    """Put some edits of a sequential run into the unedited model and leave out its others; the ledger stays as it is.

    Args:
        language_model: The unedited model that the run began with; it stays so if this fails.
        run: The run's folder.
        names: The edits that remain, by ``case_id``.
        statistics: Paths of the run's second moments, if they are neither shipped nor cached.

    Raises:
        LedgerError: As :func:`undo`.
        StatisticsError: If the run's second moment is not found.
        DisablingEditError: If the update of an edit that remains would explode without those before it.
    """
    known = read_edits(run)  # once: another process may undo something meanwhile
    edits = {str(edit["case_id"]): edit for edit in known}
    for name in names:
        if name not in edits or edits[name]["status"] != EditStatus.APPLIED:
            found = edits[name]["status"] if name in edits else "the ledger has no such record"
            raise LedgerError(f"{run}: edit {name} is not in the weights ({found})")
    layers = with_edits(language_model, run, statistics, known)
    try:
        layers.remove([name for name in layers.names if name not in names])
    except BaseException:
        layers.remove(layers.names)
        raise
    return layers


def _moment(
    language_model: LanguageModel, run: Path, wanted: Mapping[str, Any], statistics: Sequence[Path]
) -> SecondMoment:
    given = [(path, SecondMoment.read_info(path)) for path in statistics]
    kept = [*given, *shipped_statistics(), *kept_statistics()]
    # Of an earlier version's run the manifest does not tell the config, and the tokenizer by its vocabulary alone.
    compared = {name: value for name, value in wanted.items() if "config" in wanted or name != "tokenizer"}
    path = next((path for path, info in kept if info is not None and compared.items() <= asdict(info).items()), None)
    if path is None and given:
        raise StatisticsError(
            f"{', '.join(map(str, statistics))}: not the second moment of layer {wanted['layer']} that {run} was made "
            "with (see its manifest)"
        )
    if path is None:
        raise StatisticsError(
            f"the second moment that {run} was made with ({wanted['count']} keys of layer {wanted['layer']}, "
            f"{wanted['date'] or 'no date'}) is neither shipped nor in the cache; give its file as statistics"
        )
    return SecondMoment.load(path).to(language_model.device)
