"""What is worked out for edits before their values are searched: rows, prefix pass, keys."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rome_pl.editing.edit import Edit, EditBatch
from rome_pl.editing.session import EditSession
from rome_pl.encoding.encoded_rows import EncodedEdit
from rome_pl.encoding.row_layout import RowLayout, row_layout
from rome_pl.forward.suffix_engine import SuffixEngine
from rome_pl.requests.edit_request import EditRequest
from rome_pl.search.objective import ValueObjective
from rome_pl.write.layer_shares import LayerShares, keys_at

__all__ = ["prepare_batch", "prepare_edits"]


def prepare_batch(
    batch: EditBatch,
    session: EditSession,
    engines: Sequence[SuffixEngine],
    encode: Callable[[EditRequest], EncodedEdit],
    options: Mapping[str, Any],
) -> None:
    """Encode the edits of a batch that have not failed, and run their prefix under the weights as they are now.

    Args:
        batch: Gets what is worked out.
        session: What the edits of the run share.
        engines: Run the model up to the lookup tokens; the first those of the main layers, the others those of retries.
        encode: Encodes a request; those of the batch are known to pass.
        options: Those of :class:`rome_pl.RomeModule`.
    """
    started = time.perf_counter()
    batch.optimised = [edit for edit in batch.edits if not edit.failed]
    if not batch.optimised:
        return
    for edit in batch.optimised:
        edit.encoded = encode(edit.request)
    for engine in engines:  # before anything is counted, and before the first edit is made
        engine.check(_rows(batch.optimised).rows)
    session.counted = 0.0
    with session.counting(skip=options["compile"]):
        batch.objective = prepare_edits(batch.optimised, session, engines[0], options)
    for edit in batch.optimised:
        edit.seconds["prefix"] = (time.perf_counter() - started) / len(batch.optimised)


def prepare_edits(
    edits: Sequence[Edit], session: EditSession, engine: SuffixEngine, options: Mapping[str, Any]
) -> ValueObjective:
    """Run the prefix of encoded edits under the weights as they are now, for a search at the engine's layers.

    Args:
        edits: They get their place in the objective, their layers, and what they are to be written with.
        session: What the edits of the run share.
        engine: Runs the model up to the lookup tokens.
        options: Those of :class:`rome_pl.RomeModule`.
    """
    # A second search begins within a step, which may be under autocast: keys and bases are as precise as the model.
    with torch.autocast(session.language_model.device.type, enabled=False):
        layout = _rows(edits)
        prefix = engine.run(layout.rows)
        metrics = [session.layers.at(layer).metric for layer in engine.layers]
        for place, edit in enumerate(edits):
            keys = keys_at(prefix, layout.contexts[place], session.preset, metrics)
            shapes = [key.key(session.preset.shape) for key in keys]
            edit.place, edit.layers, edit.keys, edit.spread = place, engine.layers, keys[-1], None
            edit.specificity = session.layers.specificity(engine.layers, shapes)
        if prefix.below:
            spread = LayerShares(prefix, layout, session.preset, metrics, [edit.specificity for edit in edits])
            for edit in edits:
                edit.spread = spread
        return ValueObjective(prefix, layout, options["kl_factor"], options["v_weight_decay"])


def _rows(edits: Sequence[Edit]) -> RowLayout:
    return row_layout([edit.encoded for edit in edits if edit.encoded is not None])
