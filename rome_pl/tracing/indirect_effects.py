"""Mean effects over the traces of many facts, by kind, role of the token, and layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rome_pl.metrics.intervals import Entry, bootstrap_interval, entry
from rome_pl.tracing.trace import Kind, Trace
from rome_pl.utils.markdown import markdown_table

__all__ = [
    "ROLES",
    "ROLE_NAMES",
    "Role",
    "TracedFact",
    "mean_effects",
    "peak",
    "token_roles",
    "total_effects",
    "trace_table",
]

Role = Literal["subject_first", "subject_middle", "subject_last", "first_after", "further", "last"]
ROLES: tuple[Role, ...] = get_args(Role)
"""The role of a token in its fact. Tokens before the subject have none: restoring them has no effect."""

ROLE_NAMES: dict[Role, str] = {
    "subject_first": "first subject token",
    "subject_middle": "middle subject tokens",
    "subject_last": "last subject token",
    "first_after": "first token after it",
    "further": "further tokens",
    "last": "last token",
}


@dataclass(frozen=True)
class TracedFact:
    """A fact's trace, with the roles of its tokens.

    Args:
        name: Name of its record.
        tokens: The prompt's tokens as text.
        roles: The role of each token.
        trace: The trace.
    """

    name: str
    tokens: tuple[str, ...]
    roles: tuple[Role | None, ...]
    trace: Trace


def token_roles(tokens: int, subject: tuple[int, int]) -> tuple[Role | None, ...]:
    """Return the role of each token of a prompt; each has at most one.

    A subject of one token has only the role ``subject_last``, and a prompt that ends with its subject has no ``last``.

    Example:
        >>> token_roles(6, (1, 3))
        (None, 'subject_first', 'subject_last', 'first_after', 'further', 'last')
    """
    first, end = subject
    roles: list[Role | None] = [None] * tokens
    for token in range(first, tokens):
        if token < end:
            roles[token] = (
                "subject_last" if token == end - 1 else "subject_first" if token == first else "subject_middle"
            )
        else:
            roles[token] = "last" if token == tokens - 1 else "first_after" if token == end else "further"
    return tuple(roles)


def mean_effects(facts: Sequence[TracedFact]) -> dict[Kind, dict[Role, list[Entry]]]:
    """Compute the average indirect effect by kind and role, one mean per layer.

    Within a fact, tokens of one role are averaged first: each fact counts once. Intervals are bootstrap intervals over
    facts.
    """
    kinds = list(facts[0].trace.restored) if facts else []
    return {kind: {role: _over_facts(facts, kind, role) for role in ROLES} for kind in kinds}


def total_effects(facts: Sequence[TracedFact]) -> dict[str, Entry]:
    """Compute means over facts of the answer's probability without and with noise, and of their difference."""
    values = {
        "clean": [fact.trace.clean for fact in facts],
        "corrupted": [fact.trace.corrupted for fact in facts],
        "total_effect": [fact.trace.total_effect for fact in facts],
    }
    return {name: entry(torch.tensor(found, dtype=torch.float64), bootstrap_interval) for name, found in values.items()}


def peak(effects: Mapping[Kind, Mapping[Role, Sequence[Entry]]]) -> int | None:
    """Return the layer at which restoring the MLPs' output at the subject's last token has the largest effect."""
    layers = effects.get("mlp", {}).get("subject_last", ())
    known = [(entry["value"], -layer) for layer, entry in enumerate(layers) if entry["value"] is not None]
    return -max(known)[1] if known else None


def trace_table(content: Mapping[str, Any]) -> str:
    """Format the strongest effects of each kind and role in results.json as a Markdown table, in per cent."""
    rows = []
    for kind, roles in content["effects"].items():
        for role, layers in roles.items():
            known = [(entry["value"], -layer) for layer, entry in enumerate(layers) if entry["value"] is not None]
            if not known:
                continue
            layer = -max(known)[1]
            found = layers[layer]
            cell = f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
            rows.append([kind, ROLE_NAMES[role], str(layer), cell, str(found["n"])])
    columns = ("put back", "at", "strongest at layer", "average indirect effect", "facts")
    table = markdown_table(columns, rows, numbers=3, escape=str)
    total = content["totals"]["total_effect"]
    if total["value"] is None:
        return table + "\n"
    return table + (
        f"\n\nIn % of probability [95 % interval over facts]. Total effect {100 * total['value']:.1f} "
        f"[{100 * total['low']:.1f}, {100 * total['high']:.1f}]: the answer's first token has "
        f"{100 * content['totals']['clean']['value']:.1f} % without noise and "
        f"{100 * content['totals']['corrupted']['value']:.1f} % with it.\n"
    )


def _over_facts(facts: Sequence[TracedFact], kind: Kind, role: Role) -> list[Entry]:
    rows = []
    for fact in facts:
        chosen = [token for token, other in enumerate(fact.roles) if other == role]
        if chosen:
            rows.append(fact.trace.effect(kind)[chosen].mean(0))
    depth = facts[0].trace.restored[kind].shape[1]
    values: Tensor = torch.stack(rows) if rows else torch.empty(0, depth, dtype=torch.float64)
    return [entry(values[:, layer], bootstrap_interval) for layer in range(depth)]
