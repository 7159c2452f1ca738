"""What is worked out for edits before their values are searched: rows, prefix pass, keys."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from rome_pl.editing.edit import Edit, EditBatch, EditSearch
from rome_pl.editing.run_setup import RunSetup
from rome_pl.encoding.encoded_rows import EncodedEdit
from rome_pl.encoding.row_layout import row_layout
from rome_pl.forward.suffix_engine import SuffixEngine
from rome_pl.requests.edit_request import EditRequest
from rome_pl.search.objective import ValueObjective
from rome_pl.write.layer_shares import LayerShares, keys_at

__all__ = ["prepare_batch", "prepare_edits"]


def prepare_batch(
    batch: EditBatch,
    setup: RunSetup,
    engines: Sequence[SuffixEngine],
    encode: Callable[[EditRequest], EncodedEdit],
    options: Mapping[str, Any],
    counting: AbstractContextManager[None],
) -> None:
    """Encode the edits of a batch that have not failed, and run their prefix under the weights as they are now.

    Args:
        batch: Gets what is worked out.
        setup: What the edits of the run share.
        engines: Run the model up to the lookup tokens; the first those of the main layers, the others those of retries.
        encode: Encodes a request; those of the batch are known to pass.
        options: Those of :class:`rome_pl.RomeModule`.
        counting: Counts the operations of the prefix pass.
    """
    started = time.perf_counter()
    batch.optimised = [edit for edit in batch.edits if not edit.failed]
    if not batch.optimised:
        return
    encoded = [encode(edit.request) for edit in batch.optimised]
    for engine in engines:  # before anything is counted, and before the first edit is made
        engine.check(row_layout(encoded).rows)
    with counting:
        batch.objective = prepare_edits(batch.optimised, encoded, setup, engines[0], options)
    for edit in batch.optimised:
        edit.seconds["prefix"] = (time.perf_counter() - started) / len(batch.optimised)


def prepare_edits(
    edits: Sequence[Edit],
    encoded: Sequence[EncodedEdit],
    setup: RunSetup,
    engine: SuffixEngine,
    options: Mapping[str, Any],
) -> ValueObjective:
    """Run the prefix of edits under the weights as they are now, for a search at the engine's layers.

    Args:
        edits: Each gets a search of its own, at its position in the objective.
        encoded: Their rows as tokens.
        setup: What the edits of the run share.
        engine: Runs the model up to the lookup tokens.
        options: Those of :class:`rome_pl.RomeModule`.
    """
    # A second search begins within a step, which may be under autocast: keys and bases are as precise as the model.
    with torch.autocast(setup.language_model.device.type, enabled=False):
        layout = row_layout(encoded)
        prefix = engine.run(layout.rows)
        metrics = [setup.layers.at(layer).metric for layer in engine.layers]
        keys = [keys_at(prefix, rows, setup.preset, metrics) for rows in layout.contexts]
        specificity = [
            setup.layers.specificity(engine.layers, [key.key(setup.preset.shape) for key in of_edit])
            for of_edit in keys
        ]
        shares = LayerShares(prefix, layout, setup.preset, metrics, specificity) if prefix.below else None
        for position, edit in enumerate(edits):
            edit.begin_search(
                EditSearch(
                    encoded[position], engine.layers, position, keys[position][-1], specificity[position], shares
                )
            )
        return ValueObjective(prefix, layout, options["kl_factor"], options["v_weight_decay"])
