"""One pass over text for the second moments of many layers: summing, meeting of processes, and saving.

Lightning's Trainer or a plain loop supplies the blocks; see :class:`rome_pl.CovarianceModule` and
:func:`rome_pl.second_moments.moment_store.compute`.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from rome_pl.model.architecture import RewriteSite
from rome_pl.model.language_model import LanguageModel
from rome_pl.second_moments.corpus import Corpus
from rome_pl.second_moments.moment_sums import MomentSums, half_of, keys_of, place_for
from rome_pl.second_moments.pass_options import Finished, PassOptions
from rome_pl.second_moments.second_moment import MomentInfo, SecondMoment, StatisticsError
from rome_pl.second_moments.split_half import (
    KEYS_PER_DIMENSION,
    HalfAgreement,
    compare_halves,
    keeps_documents_apart,
    probe_keys,
    warn_of_little_text,
    warn_of_unknown_experts,
)
from rome_pl.second_moments.text_blocks import Block, BlockStream, Packer, Plan
from rome_pl.second_moments.unfinished_sums import UnfinishedJob
from rome_pl.utils.distributed import Peers
from rome_pl.utils.environment import library_versions
from rome_pl.utils.hashing import content_key
from rome_pl.utils.restored_state import frozen

__all__ = ["KEYS_PER_DIMENSION", "Finished", "MomentPass", "PassOptions"]

MEETINGS = (0.25, 0.5, 1.0)
"""When halves are compared, as fractions of the wanted number of keys."""

log = logging.getLogger(__name__)


class MomentPass:
    """Sums blocks of text into second moments of several layers.

    Args:
        language_model: The model, unedited.
        sites: The projections.
        corpus: The text.
        options: Options of the pass.
        target: Gives the path for the second moment of a layer.
        unfinished: Folder for unfinished sums, with a subfolder for each job.
        peers: The processes that share the job.

    Raises:
        StatisticsError: If there is not enough memory.
        BusyError: If another run is computing the same.
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
        self.history: list[list[HalfAgreement]] = []
        self._jobs: list[UnfinishedJob] = []
        self._target, self._unfinished = target, unfinished
        self._halves = 2 if options.split_half else 1
        encoder = language_model.encoder
        length = min(options.block_length, encoder.max_length)
        self.packer = Packer(language_model.tokenizer, max(1, 1024 // length), length, encoder.pad_id, encoder.opening)
        sites = sorted(sites, key=lambda site: site.layer)
        kept = None
        while kept != (kept := self._kept(sites)):  # another run may have finished some before this one got the lock
            self._divide(sites, kept)
        self.apart = all(keeps_documents_apart(language_model, group[-1]) for group in self.groups)
        if not self.apart:
            log.warning(
                "%s has no way to keep attention within a document: the document before in a row shapes keys too",
                type(language_model.model).__name__,
            )
        self.plan = self._plan()
        self._group = -1
        self._sums: MomentSums | None = None
        self._probes: dict[int, Tensor] = {}
        self._saved: set[int] = set()
        self._tokens: dict[int, list[Tensor]] = {}

    def _kept(self, sites: Sequence[RewriteSite]) -> list[MomentInfo | None]:
        """The second moments that exist already, the same on all processes."""
        paths = [self._target(site) for site in sites]
        return self.peers.from_first([SecondMoment.read_info(path) if path.is_file() else None for path in paths])

    def _divide(self, sites: Sequence[RewriteSite], kept: Sequence[MomentInfo | None]) -> None:
        """Divide the missing layers into passes, check the memory, and lock the jobs."""
        self.close()
        self.finished = [
            Finished(site.layer, self._target(site), info, cached=True)
            for site, info in zip(sites, kept, strict=True)
            if info is not None
        ]
        missing = [site for site, info in zip(sites, kept, strict=True) if info is None]
        size = self.options.layers_per_pass or max(1, len(missing))
        self.groups = [missing[start : start + size] for start in range(0, len(missing), size)]
        self._place = place_for(
            [[math.isqrt(site.d_key**2 // site.experts) for site in group] for group in self.groups],
            self._halves,
            self.language_model.device,
            self.options.accumulate_on,
        )
        try:
            for group in self.groups:
                folder = self._unfinished / self._key(group)
                self._jobs.append(UnfinishedJob(folder, self.options.save_every, self.peers))
        except BaseException:
            self.close()
            raise

    def blocks(self) -> BlockStream:
        """Return this process's share of the text, as a data set for a loader without batching."""
        return BlockStream(self.corpus.texts, self.packer, self.plan, self.peers.rank, self.peers.world_size)

    @property
    def _num_blocks(self) -> int:
        return max(1, -(-self.wanted // self.packer.size))

    @property
    def wanted(self) -> int:
        """Number of key vectors for the layers to compute."""
        return self.options.tokens or KEYS_PER_DIMENSION * max(
            (site.least_text for group in self.groups for site in group), default=0
        )

    @torch.no_grad()
    def step(self, block: Block) -> HalfAgreement | None:
        """Sum a block. Where processes meet, compare halves, and end a pass whose halves agree.

        Returns:
            The agreement if processes met here, else ``None``.

        Raises:
            StatisticsError: If a key is not finite, or the corpus gave none.
        """
        if len(self.plan.finished) == len(self.groups):
            return None  # a data loader's workers have read ahead
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
        if block.closes is not None or (block.ends and not self._is_known(history, block)):
            check = self._compare(block)
            history[:] = [earlier for earlier in history if earlier.blocks < check.blocks] + [check]
        if block.ends or (check is not None and check.enough):
            self._finish(block.group)
        elif self._jobs[block.group].due:
            assert self._sums is not None
            self._jobs[block.group].save(self._sums, history)
        return check

    def close(self) -> None:
        """Release the job. Unfinished sums are kept for a later run."""
        for job in self._jobs:
            job.release()
        self._jobs = []

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

        model, ids, first = self.language_model.model, block.position_ids, self.language_model.first_position or 0
        positions = {"position_ids": ids + first} if self.apart and ids is not None else {}
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
        self._jobs[block.group].note(len(counted))

    def _begin(self, group: int) -> None:
        sites = self.groups[group]
        # Sums are used after the inference mode in which a Trainer may run the pass.
        with torch.inference_mode(False):
            self._sums = MomentSums.of(sites, self._halves, self._place)
            self._jobs[group].take_over(self._sums)
        self._group = group
        if self._halves > 1:
            self._probes = probe_keys(self.language_model, sites)
        self._jobs[group].begin()

    def _is_known(self, history: Sequence[HalfAgreement], block: Block) -> bool:
        """Whether the halves were compared at every layer with all the text."""
        if not history or history[-1].blocks < block.seen:
            return False
        return len(history[-1].agreement) in (0, len(self.groups[block.group]))

    def _compare(self, block: Block) -> HalfAgreement:
        assert self._sums is not None
        peers, stop = self.peers, self.options.stop_agreement
        layers = [site.layer for site in self.groups[block.group]]
        # A comparison costs as much as some hundred tokens: while the pass continues, a few layers are enough.
        few = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
        last = block.ends or block.closes == len(self.plan.boundaries[block.group]) - 1
        count = sum(peers.gather(sum(self._sums.counts)))
        self._tokens = self._sums.tokens_of_all(peers)

        def keep(layer: int, one: Tensor, other: Tensor, found: float) -> None:
            if last:  # the sums gathered for the last meeting are the result
                self._save(self.groups[block.group][layers.index(layer)], one.add_(other), count, found)

        agreement: dict[int, float] = {}
        for some in [layers] if last else [few, [layer for layer in layers if layer not in few]]:
            agreement |= compare_halves(self._sums, some, self._probes, peers, keep)
            if not agreement or min(agreement.values()) < stop:
                break
        self._saved = set(agreement) if last else set()
        enough = bool(agreement) and min(agreement.values()) >= stop
        return HalfAgreement(block.seen, count, dict(sorted(agreement.items())), enough)

    def _finish(self, group: int) -> None:
        assert self._sums is not None
        sums, peers = self._sums, self.peers
        count = sum(peers.gather(sum(sums.counts)))
        if count == 0:
            raise StatisticsError(f"corpus {self.corpus.source}: gave no keys; it holds no text")
        self._tokens = sums.tokens_of_all(peers)
        last, folder = self.history[group][-1], self._jobs[group].folder
        sites = {site.layer: site for site in self.groups[group]}
        missing = [layer for layer in sites if layer not in self._saved]
        for layer, halves in sums.dealt_out(missing, peers):
            self._save(sites[layer], sum(halves[1:], start=halves[0]), count, last.agreement.get(layer))
        done = [
            Finished(layer, self._target(site), self._describe(site, count, last.agreement.get(layer)))
            for layer, site in sites.items()
        ]
        peers.wait()
        for index, one in enumerate(done):
            if peers.mine(index):
                (folder / one.path.name).replace(one.path)
        self.finished += done
        warn_of_little_text(max(site.least_text for site in self.groups[group]), count)
        self.plan.finished.add(group)
        self._sums = None
        self._jobs[group].remove()

    def _save(self, site: RewriteSite, total: Tensor, count: int, agreement: float | None) -> None:
        # Sums are removed only after all layers are written, so that a killed run can resume with them.
        path = self._jobs[self._group].folder / self._target(site).name
        tokens = torch.stack(self._tokens[site.layer]).sum(0) if site.experts > 1 else None
        moment = SecondMoment(total / count, self._describe(site, count, agreement), tokens)
        warn_of_unknown_experts(moment)
        moment.save(path)

    def _describe(self, site: RewriteSite, count: int, agreement: float | None) -> MomentInfo:
        return MomentInfo(
            **self.language_model.moment_identity(site),
            layer=site.layer,
            count=count,
            corpus=self.corpus.fingerprint,
            model=self.language_model.source,
            versions=json.dumps(library_versions()),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            source=self.corpus.source,
            agreement=agreement,
            experts=site.experts,
        )

    def _plan(self) -> Plan:
        boundaries = sorted({max(1, round(part * self._num_blocks)) for part in MEETINGS})
        plan = Plan([], [], [])
        for job in self._jobs:
            met = [check for check in job.history if check.blocks in boundaries]
            ended = bool(met) and met[-1].enough
            self.history.append(met)
            plan.boundaries.append([bound for bound in boundaries if bound <= met[-1].blocks] if ended else boundaries)
            plan.met.append(sum(bound <= met[-1].blocks for bound in boundaries) if met else 0)
            plan.done.append(job.blocks)
        return plan

    def _key(self, group: Sequence[RewriteSite]) -> str:
        return content_key(
            self.language_model.moment_identity(group[-1]),
            self.corpus.fingerprint,
            [site.layer for site in group],
            [self.packer.rows, self.packer.length, self._halves, self.wanted],
        )
