"""One pass over text for the second moments of many layers: what is summed, when processes meet, what is kept.

Lightning's Trainer or a plain loop hands over the blocks; see :class:`rome_pl.CovarianceModule` and
:func:`rome_pl.statistics.compute`.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from rome_pl.architecture import RewriteSite
from rome_pl.convergence import Check, agreement_of_halves, keeps_documents_apart, probe_keys
from rome_pl.corpus import Corpus
from rome_pl.distributed import Peers
from rome_pl.files import content_key
from rome_pl.hooks import frozen
from rome_pl.language_model import LanguageModel
from rome_pl.moment_sums import MomentSums, PartialSums, half_of, keys_of
from rome_pl.packing import Block, BlockStream, Packer, Plan
from rome_pl.second_moment import MomentInfo, SecondMoment, StatisticsError, library_versions

__all__ = ["KEYS_PER_DIMENSION", "BusyError", "Finished", "MomentPass", "PassOptions", "Place"]

KEYS_PER_DIMENSION = 30
"""Default number of key vectors, as a multiple of d_key."""

MEETINGS = (0.25, 0.5, 1.0)
"""Where halves are compared, as parts of the wanted number of keys."""

SAVING_SHARE = 0.05
"""Largest share of the time that goes into saving, unless a number of tokens between saves is asked for."""

LEAST_PAUSE = 60.0
"""Seconds between saves at least, likewise."""

Place = Literal["auto", "device", "host"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassOptions:
    """How second moments are summed.

    Args:
        tokens: Key vectors wanted; ``None`` takes 30 per dimension.
        block_length: Tokens of a row; the model's longest text where that is shorter.
        stop_agreement: The pass ends early where two halves of the text agree by at least this, at every layer (mean
            cosine of ``C⁻¹k`` over probe keys); above 1 never.
        split_half: Whether the text is summed in two halves. Without, memory is half, and no agreement is known.
        accumulate_on: Where the sums are kept; ``auto`` prefers the model's device.
        layers_per_pass: Most layers in one pass over the text; the others follow in further passes. ``None``: all.
        save_every: Tokens between two saves of a process's unfinished sums; ``None`` saves as often as takes at most a
            twentieth of the time.
    """

    tokens: int | None = None
    block_length: int = 512
    stop_agreement: float = 0.98
    split_half: bool = True
    accumulate_on: Place = "auto"
    layers_per_pass: int | None = None
    save_every: int | None = None


@dataclass(frozen=True)
class Finished:
    """A second moment that was found or computed.

    Args:
        layer: The decoder layer.
        path: The artefact.
        info: What it says of itself.
        cached: Whether it had been there before.
    """

    layer: int
    path: Path
    info: MomentInfo
    cached: bool = False


class BusyError(StatisticsError):
    """Another run computes the same."""


class MomentPass:
    """Sums blocks of text into second moments of several layers.

    Args:
        language_model: The model, unedited.
        sites: The projections.
        corpus: The text.
        options: How.
        target: Where the second moment of a layer is kept.
        unfinished: Folder for unfinished sums, one below it for each job.
        peers: The processes that share the job.

    Raises:
        StatisticsError: If there is not enough memory.
        BusyError: If another run computes the same.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        sites: Sequence[RewriteSite],
        corpus: Corpus,
        options: PassOptions,
        target: Callable[[RewriteSite], Path],
        unfinished: Path,
        peers: Peers | None = None,
    ) -> None:
        self.language_model, self.corpus, self.options = language_model, corpus, options
        self.peers = peers or Peers()
        self.history: list[list[Check]] = []
        self.finished: list[Finished] = []
        sites = sorted(sites, key=lambda site: site.layer)
        paths = [target(site) for site in sites]
        known = self.peers.from_first([SecondMoment.read_info(path) if path.is_file() else None for path in paths])
        missing = [site for site, info in zip(sites, known, strict=True) if info is None]
        self.finished += [
            Finished(site.layer, path, info, cached=True)
            for site, path, info in zip(sites, paths, known, strict=True)
            if info is not None
        ]
        size = options.layers_per_pass or max(1, len(missing))
        self.groups = [missing[start : start + size] for start in range(0, len(missing), size)]
        self._target = target
        self._halves = 2 if options.split_half else 1
        length = min(options.block_length, language_model.encoder.max_length)
        self.packer = Packer(language_model.tokenizer, max(1, 1024 // length), length, language_model.encoder.pad_id)
        self.apart = all(keeps_documents_apart(language_model, group[-1]) for group in self.groups)
        if not self.apart:
            log.warning(
                "%s has no way to keep attention within a document: where documents share a row, keys are also shaped "
                "by the document before",
                type(language_model.model).__name__,
            )
        self._place = self._choose_place()
        self._folders = [unfinished / self._key(group) for group in self.groups]
        self._locks = self._lock()
        self._names: list[str] = []
        try:
            self._partials = [self._resume(folder) for folder in self._folders]
        except BaseException:
            self.close()  # whoever keeps the error keeps this object
            raise
        self.plan = self._plan()
        self._group = -1
        self._sums: MomentSums | None = None
        self._absorbed: list[str] = []
        self._probes: dict[int, Tensor] = {}
        self._saved_at, self._saving, self._unsaved = time.monotonic(), 0.0, 0

    def blocks(self) -> BlockStream:
        """This process's share of the text, as a data set for a loader without batching."""
        return BlockStream(self.corpus.texts, self.packer, self.plan, self.peers.rank, self.peers.world_size)

    @property
    def _num_blocks(self) -> int:
        return max(1, -(-self.wanted // self.packer.size))

    @property
    def wanted(self) -> int:
        """Key vectors wanted for the layers still to be computed."""
        return self.options.tokens or KEYS_PER_DIMENSION * max(
            (site.d_key for group in self.groups for site in group), default=0
        )

    @torch.no_grad()
    def step(self, block: Block) -> Check | None:
        """Sum a block; where processes meet, compare halves, and end what is known well enough.

        Returns:
            What was found if this was a meeting.

        Raises:
            StatisticsError: If a key is not finite, or the corpus gave none.
        """
        if len(self.plan.finished) == len(self.groups):
            return None  # what workers of a data loader have read ahead
        if block.error is not None:
            raise block.error
        if block.group in self.plan.finished:
            return None
        if block.group != self._group:
            self._begin(block.group)
        if block.index is not None:
            self._sum(block)
        history = self.history[block.group]
        check = None
        if block.closes is not None or (block.ends and not (history and history[-1].blocks >= block.seen)):
            check = self._compare(block)
            history.append(check)
        if block.ends or (check is not None and check.enough):
            self._finish(block.group)
        elif self._due():
            self._save()
        return check

    def close(self) -> None:
        """Let other runs have the job; sums that are not finished stay for a later run."""
        for lock in self._locks:
            lock.release()

    def _sum(self, block: Block) -> None:
        assert self._sums is not None
        assert block.index is not None
        assert block.counted is not None
        sums, half = self._sums, half_of(block.index, self._halves, self._num_blocks)
        counted = block.counted.flatten()
        chosen = None if bool(counted.all()) else counted.nonzero().squeeze(1)
        finite: list[tuple[int, Tensor]] = []

        def take(layer: int, keys: Tensor) -> None:
            finite.append((layer, sums.add(layer, half, keys if chosen is None else keys[chosen])))

        positions = {"position_ids": block.position_ids} if self.apart else {}
        model = self.language_model.model
        with frozen(model), keys_of(self.groups[block.group], take):
            model(input_ids=block.input_ids, use_cache=False, **positions)
        if not bool(torch.stack([flag for _, flag in finite]).all()):
            layer = next(layer for layer, flag in finite if not bool(flag))
            raise StatisticsError(
                f"layer {layer}, block {block.index} of {self.corpus.source}: a key is not finite; load the model in "
                "float32 or bfloat16 (float16 overflows in some models)"
            )
        sums.counts[half] += int(counted.sum())
        sums.blocks.add(block.index)
        self._unsaved += len(counted)

    def _begin(self, group: int) -> None:
        sites = self.groups[group]
        # Sums outlive the inference mode in which a Trainer may run the pass.
        with torch.inference_mode(False):
            self._sums = MomentSums({site.layer: site.d_key for site in sites}, self._halves, self._place)
            partials = self._partials[group]
            for partial in partials[self.peers.rank :: self.peers.world_size]:
                self._sums.merge(partial)
                self._absorbed.append(partial.path.name)
        if partials:
            log.info("Going on with %d blocks that an earlier run has summed", sum(len(p.blocks) for p in partials))
        self._group = group
        if self._halves > 1:
            self._probes = probe_keys(self.language_model, sites)
        self._saved_at, self._saving, self._unsaved = time.monotonic(), 0.0, 0

    def _compare(self, block: Block) -> Check:
        assert self._sums is not None
        sums = self._sums
        peers = self.peers
        found: dict[int, float] = {}
        if self._halves > 1 and self._probes:
            for index, site in enumerate(self.groups[block.group]):
                one, other = (
                    peers.sum_on(index % peers.world_size, sums.matrix(site.layer, half)) for half in range(2)
                )
                if peers.mine(index):
                    found[site.layer] = agreement_of_halves(one, other, self._probes[site.layer])
        agreement = {layer: value for part in peers.gather(found) for layer, value in part.items()}
        enough = bool(agreement) and min(agreement.values()) >= self.options.stop_agreement
        return Check(block.seen, sum(peers.gather(sum(sums.counts))), dict(sorted(agreement.items())), enough)

    def _finish(self, group: int) -> None:
        assert self._sums is not None
        sums, peers = self._sums, self.peers
        count = sum(peers.gather(sum(sums.counts)))
        if count == 0:
            raise StatisticsError(f"corpus {self.corpus.source}: gave no keys; it holds no text")
        last = self.history[group][-1]
        folder = self._folders[group]
        done: list[Finished] = []
        for index, site in enumerate(self.groups[group]):
            total = sums.matrix(site.layer, 0)
            for half in range(1, self._halves):
                total += sums.matrix(site.layer, half)
            total = peers.sum_on(index % peers.world_size, total)
            path, info = self._target(site), self._describe(site, count, last)
            if peers.mine(index):
                # Not in its place before all layers are written: a run killed meanwhile goes on with the sums.
                SecondMoment(total / count, info).save(folder / path.name)
            done.append(Finished(site.layer, path, info))
        peers.wait()
        for index, one in enumerate(done):
            if peers.mine(index):
                (folder / one.path.name).replace(one.path)
        self.finished += done
        _warn_of_little_text(self.groups[group], count)
        self.plan.finished.add(group)
        self._sums = None
        peers.wait()
        if peers.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)

    def _describe(self, site: RewriteSite, count: int, last: Check) -> MomentInfo:
        return MomentInfo(
            weights=self.language_model.fingerprint_below(site),
            tokenizer=self.language_model.tokenizer_fingerprint,
            layer=site.layer,
            count=count,
            corpus=self.corpus.fingerprint,
            model=self.language_model.source,
            versions=json.dumps(library_versions()),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            source=self.corpus.source,
            agreement=last.agreement.get(site.layer),
        )

    def _due(self) -> bool:
        if not self._unsaved:
            return False
        if self.options.save_every is not None:
            return self._unsaved >= self.options.save_every
        return time.monotonic() - self._saved_at >= max(LEAST_PAUSE, self._saving / SAVING_SHARE)

    def _save(self) -> None:
        assert self._sums is not None
        started = time.monotonic()
        folder = self._folders[self._group]
        path = folder / self._names[self._group]
        notes = {"absorbed": self._absorbed, "history": [asdict(check) for check in self.history[self._group]]}
        PartialSums.save(path, self._sums, notes)
        for name in self._absorbed:
            (folder / name).unlink(missing_ok=True)
        self._saved_at, self._unsaved = time.monotonic(), 0
        self._saving = self._saved_at - started

    def _resume(self, folder: Path) -> list[PartialSums]:
        """Unfinished sums of an earlier run, the same list on all processes."""
        paths = sorted(folder.glob("process-*.safetensors"))
        # A name that no earlier run has used: whichever process took over the sums in a file may delete that name.
        run = 1 + max((int(path.stem.partition(".")[2] or 0) for path in paths), default=-1)
        self._names.append(f"process-{self.peers.rank}-of-{self.peers.world_size}{f'.{run}' * (run > 0)}.safetensors")
        partials = [PartialSums(path) for path in paths]
        # A process that took over the sums of others may have been killed before it could delete their files.
        absorbed = {name for partial in partials for name in partial.notes["absorbed"]}
        partials = [partial for partial in partials if partial.path.name not in absorbed]
        views = self.peers.gather([(partial.path.name, sorted(partial.blocks)) for partial in partials])
        if any(view != views[0] for view in views):
            raise StatisticsError(
                f"{folder}: processes see different unfinished sums there; the cache folder (ROME_PL_CACHE) has to be "
                "one that all machines share"
            )
        if self.peers.rank == 0:
            for name in absorbed:
                (folder / name).unlink(missing_ok=True)
        self.peers.wait()
        return partials

    def _plan(self) -> Plan:
        blocks = self._num_blocks
        boundaries = sorted({max(1, round(part * blocks)) for part in MEETINGS})
        plan = Plan([], [], [])
        for partials in self._partials:
            histories = [[_check_from(entry) for entry in partial.notes["history"]] for partial in partials]
            # All processes met at the same places; one may have saved later than another.
            history = max(histories, key=len, default=[])
            met = [check for check in history if check.blocks in boundaries]
            ended = bool(met) and met[-1].enough
            self.history.append(met)
            plan.boundaries.append([bound for bound in boundaries if bound <= met[-1].blocks] if ended else boundaries)
            plan.met.append(sum(bound <= met[-1].blocks for bound in boundaries) if met else 0)
            plan.done.append(set().union(*(partial.blocks for partial in partials)))
        return plan

    def _key(self, group: Sequence[RewriteSite]) -> str:
        return content_key(
            self.language_model.fingerprint_below(group[-1]),
            self.language_model.tokenizer_fingerprint,
            self.corpus.fingerprint,
            [site.layer for site in group],
            [self.packer.rows, self.packer.length, self._halves, self.wanted],
        )

    def _lock(self) -> list[FileLock]:
        locks: list[FileLock] = []
        failed = ""
        if self.peers.rank == 0:
            for folder in self._folders:
                folder.mkdir(parents=True, exist_ok=True)
                lock = FileLock(folder.with_suffix(".lock"))
                try:
                    lock.acquire(timeout=0)
                    locks.append(lock)
                except Timeout:
                    failed = str(lock.lock_file)
        if failed := self.peers.from_first(failed):
            for lock in locks:
                lock.release()
            raise BusyError(
                f"another run is computing the same second moments (it holds {failed}); wait for it to end, and its "
                "result is found in the cache"
            )
        return locks

    def _choose_place(self) -> torch.device:
        device, place = self.language_model.device, self.options.accumulate_on
        if not self.groups:
            return torch.device("cpu")
        sums = max(sum(site.d_key**2 for site in group) for group in self.groups) * 8 * self._halves
        work = 5 * max(site.d_key for group in self.groups for site in group) ** 2 * 8  # halves, a factor, a copy
        candidates = {"auto": [device, torch.device("cpu")], "device": [device], "host": [torch.device("cpu")]}[place]
        free = {candidate: _free(candidate) for candidate in candidates}
        for candidate in candidates:
            if sums + work <= free[candidate]:
                return candidate
        found = ", ".join(f"{bytes_ / 2**30:.1f} GiB on {where}" for where, bytes_ in free.items())
        raise StatisticsError(
            f"the second moments of {max(map(len, self.groups))} layers take {(sums + work) / 2**30:.1f} GiB "
            f"({self._halves} sums of d_key² float64 numbers a layer), but free are {found}. "
            "Take fewer layers_per_pass, split_half: false (which halves it), or accumulate_on: host"
        )


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _check_from(entry: dict[str, Any]) -> Check:
    return Check(**{**entry, "agreement": {int(layer): value for layer, value in entry["agreement"].items()}})


def _warn_of_little_text(sites: Sequence[RewriteSite], count: int) -> None:
    size = max(site.d_key for site in sites)
    if count < size:
        log.warning(
            "The corpus gave %d keys for a dimension of %d: the second moment is singular, and only the ridge makes it "
            "solvable. At least %d more are needed, better %d in all",
            count,
            size,
            size - count,
            KEYS_PER_DIMENSION * size,
        )
