"""Trial edits at several layers: the engine, its Trainer and its callbacks as ``rome-pl edit`` runs them."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser

from rome_pl.callbacks import default_callbacks
from rome_pl.data_modules import FactDataModule
from rome_pl.data_modules.request_data import BATCH, request_loader
from rome_pl.editing.session import session_of
from rome_pl.errors import OptionError
from rome_pl.ledger.status import EditStatus
from rome_pl.model.architecture import RewriteSite
from rome_pl.model.language_model import LanguageModel
from rome_pl.modules.embedded_fit import fit_inside
from rome_pl.modules.rome_module import RomeModule
from rome_pl.requests.edit_request import EditRequest
from rome_pl.second_moments.moment_store import statistics_files
from rome_pl.tracing.layer_choice import LayerScores, Trial, score_layer
from rome_pl.write.presets import PRESETS

__all__ = ["LayerTrial", "trial_requests"]

FIXED = ("pretrained", "dtype", "allow_pickle", "chat", "layers", "sequential_edit", "on_error")
"""Options of an edit that a trial sets itself."""

log = logging.getLogger(__name__)


class LayerTrial:
    """Edits a few facts, each on the original model, at one layer after the other.

    Args:
        language_model: The model.
        sites: The projections to try.
        options: Options of :class:`RomeModule`, as a configuration writes them.

    Raises:
        OptionError: If an option does not exist, or has a wrong value.
    """

    def __init__(self, language_model: LanguageModel, sites: Sequence[RewriteSite], options: Mapping[str, Any]) -> None:
        self.language_model, self.sites = language_model, list(sites)
        if fixed := sorted(set(options) & set(FIXED)):
            raise OptionError(f"editing: {fixed[0]} is not for a trial to choose; see the options of rome-pl locate")
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_class_arguments(RomeModule, "model", instantiate=False, skip=set(FIXED))
        try:
            parsed = parser.parse_object({"model": dict(options)})
            # Nested classes are made, such as the optimiser's, but not the module itself.
            self.options: dict[str, Any] = vars(parser.instantiate_classes(parsed).model)
            self._module(self.sites[0])
        except (ArgumentError, ValueError) as error:
            raise OptionError(f"editing: {error}") from error
        if any(other.get("layers") for other in self.options["retries"]):
            raise OptionError("editing: retries at other layers would credit one layer with what another holds")

    def run(self, requests: Sequence[EditRequest], device: torch.device) -> Trial:
        """Make the edits.

        Args:
            requests: The facts, with new targets.
            device: Where the model runs; a Trainer that traced has left it on the CPU.

        Raises:
            StatisticsError: If second moments cannot be found or computed.
        """
        self.language_model.model.to(device)
        preset, adjust = PRESETS[self.options["preset"]], self.options["mom2_adjustment"]
        if preset.mom2_adjustment if adjust is None else adjust:
            statistics_files(  # those that are neither shipped nor kept are computed in one pass
                self.language_model,
                self.sites,
                statistics=self.options["statistics"],
                corpus=self.options["corpus"],
                wanted=self.options["mom2_n_samples"],
                seed=self.options["seed"],
            )
        found: list[LayerScores] = []
        for site in self.sites:
            started = time.monotonic()
            module = self._module(site)
            callbacks = default_callbacks(measure_perplexity=False, watch=False)
            fit_inside(module, request_loader(requests, BATCH, by_length=True), callbacks, device)
            session = session_of(module)
            scores, rates = score_layer(
                {edit.name: edit.scores["immediate"] for edit in session.edits if "immediate" in edit.scores},
                session.measured.base_scores,
            )
            norms = [edit.written.norm for edit in session.edits if edit.written is not None]
            weight = float(site.weight.detach().double().norm())
            size = sum(norms) / len(norms) / weight if norms else None
            applied = sum(edit.status is EditStatus.APPLIED for edit in session.edits)
            found.append(LayerScores(site.layer, scores, size, applied, time.monotonic() - started))
            value = scores["S"]["value"]
            log.info("Layer %d: S %s", site.layer, "unknown" if value is None else f"{100 * value:.1f} %")
        base, _ = score_layer(session.measured.base_scores, session.measured.base_scores)
        return Trial(tuple(found), base, len(requests), rates)

    def _module(self, site: RewriteSite) -> RomeModule:
        return RomeModule.from_language_model(self.language_model, layers=[site.layer], **self.options)


def trial_requests(options: Mapping[str, Any]) -> list[EditRequest]:
    """The requests to try, where they are not the traced facts: a seeded sample of ``trial_path``.

    Args:
        options: Those of :class:`rome_pl.TraceModule`.

    Raises:
        DataError: If the source cannot be read, or holds no valid request.
    """
    if options["trial_path"] is None or not options["trial_edits"]:
        return []
    data = FactDataModule(options["trial_path"], sample=options["trial_edits"], sample_seed=options["seed"])
    data.setup()
    for record in data.invalid:
        log.warning("Left out of the trial: %s", record.message)
    return data.requests
