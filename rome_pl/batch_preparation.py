"""What is worked out for a batch of edits before their values are searched: rows, prefix pass, keys."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rome_pl.edit import EditBatch
from rome_pl.objective import ValueObjective, edit_rows
from rome_pl.requests import EditRequest
from rome_pl.rows import EncodedEdit
from rome_pl.session import EditSession
from rome_pl.spread import Spread, keys_at
from rome_pl.suffix import SuffixEngine

__all__ = ["prepare_batch"]


def prepare_batch(
    batch: EditBatch,
    session: EditSession,
    engine: SuffixEngine,
    encode: Callable[[EditRequest], EncodedEdit],
    options: Mapping[str, Any],
) -> None:
    """Encode the edits of a batch that have not failed, and run their prefix under the weights as they are now.

    Args:
        batch: Gets what is worked out.
        session: What the edits of the run share.
        engine: Runs the model up to the lookup tokens.
        encode: Encodes a request; those of the batch are known to pass.
        options: Those of :class:`rome_pl.RomeModule`.
    """
    started = time.perf_counter()
    batch.optimised = [edit for edit in batch.edits if not edit.failed]
    if not batch.optimised:
        return
    encoded = [encode(edit.request) for edit in batch.optimised]
    layout = edit_rows(encoded)
    engine.check(layout.rows)
    session.counted = 0.0
    with session.counting(skip=options["compile"]):
        prefix = engine.run(layout.rows)
    batch.objective = ValueObjective(prefix, layout, options["kl_factor"], options["v_weight_decay"])
    metrics = [weight.metric for weight in session.layers.weights]
    for place, (edit, rows) in enumerate(zip(batch.optimised, encoded, strict=True)):
        keys = keys_at(prefix, layout.contexts[place], session.preset, metrics)
        edit.encoded, edit.place, edit.keys = rows, place, keys[-1]
        edit.specificity = session.layers.specificity([key.key(session.preset.shape) for key in keys])
    if prefix.below:
        weights = [edit.specificity for edit in batch.optimised]
        batch.spread = Spread(prefix, layout, session.preset, metrics, weights)
    for edit in batch.optimised:
        edit.seconds["prefix"] = (time.perf_counter() - started) / len(batch.optimised)
