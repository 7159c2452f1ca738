"""The keys of one edit at one rewrite layer, and what it asserts there."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rome_pl.write.closed_form import Assertion
from rome_pl.write.presets import KeyChoice, Preset

__all__ = ["EditKeys", "balance"]


@dataclass(frozen=True)
class EditKeys:
    """What the projection reads and gives at an edit's lookup token; float64.

    Args:
        bare: Key of the bare prompt, ``[d_key]``.
        mean: Mean key over contexts.
        balanced: Key between the two on which an update acts in full at both; nothing where no preset asks for it.
        output_bare: The projection's output at the bare prompt, bias included, ``[d_value]``.
        output_mean: Its mean output over contexts.
        output_balanced: Its output at the balanced key.
        shares: How contexts are mixed to the balanced key, ``[contexts]``.
    """

    bare: Tensor
    mean: Tensor
    balanced: Tensor | None
    output_bare: Tensor
    output_mean: Tensor
    output_balanced: Tensor | None
    shares: Tensor | None

    @classmethod
    def of(cls, keys: Tensor, outputs: Tensor, preset: Preset, metric: Callable[[Tensor], Tensor]) -> "EditKeys":
        """Take the keys of all contexts.

        Args:
            keys: The bare prompt's first, ``[contexts, d_key]``.
            outputs: The projection's outputs there, ``[contexts, d_value]``.
            preset: The variant of the closed form, which may ask for balanced keys.
            metric: Applies its ``M`` to keys ``[n, d_key]``.
        """
        keys, outputs, shares = keys.double(), outputs.double(), None
        if "balanced" in (preset.shape, preset.at):
            share = 1.0
            if len(keys) > 1 and bool(keys.isfinite().all()):
                share = balance(keys[0], keys[1:].mean(0), metric)
            shares = torch.full((len(keys),), (1 - share) / max(1, len(keys) - 1), dtype=keys.dtype, device=keys.device)
            shares[0] = share
        return cls(*_mixtures(keys, shares), *_mixtures(outputs, shares), shares)

    def key(self, which: KeyChoice) -> Tensor:
        """One of the keys, ``[d_key]``."""
        return _present({"mean": self.mean, "bare": self.bare, "balanced": self.balanced}[which])

    def output(self, which: KeyChoice) -> Tensor:
        """The projection's output there, ``[d_value]``."""
        outputs = {"mean": self.output_mean, "bare": self.output_bare, "balanced": self.output_balanced}
        return _present(outputs[which])

    def mix(self, rows: Tensor, which: KeyChoice) -> Tensor:
        """Something else of the same contexts, ``[contexts, d]``, mixed as a key is, ``[d]``; float64."""
        bare, mean, balanced = _mixtures(rows.double(), self.shares)
        return _present({"mean": mean, "bare": bare, "balanced": balanced}[which])

    def assertion(self, preset: Preset, offset: Tensor) -> Assertion:
        """What an edit asserts here that is to move the projection's output by ``offset``, ``[d_value]``.

        Which key shapes it, and at which key and on top of which output it holds, is the preset's choice.
        """
        value = self.output(preset.at if preset.value == "own" else "bare") + offset.double()
        return Assertion(
            shape=self.key(preset.shape).unsqueeze(0),
            at=self.key(preset.at).unsqueeze(0),
            value=value.unsqueeze(0),
            ridge=preset.ridge,
        )

    def to(self, device: torch.device) -> "EditKeys":
        """The same on a device."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            moved[field.name] = None if tensor is None else tensor.to(device)
        return EditKeys(**moved)


def _mixtures(rows: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The bare prompt's row, the mean, and the balanced mixture if there is one."""
    return rows[0].clone(), rows.mean(0), None if shares is None else (shares.unsqueeze(1) * rows).sum(0)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "the preset has not asked for balanced keys"
    return tensor


def balance(bare: Tensor, contexts: Tensor, metric: Callable[[Tensor], Tensor]) -> float:
    r"""How much of the bare prompt's key to mix with that of the other contexts for an update to reach both in full.

    An update shaped by :math:`k = w k_0 + (1 - w) k_c` acts at a key in proportion to its product with
    :math:`k` under the metric. These products are equal at both keys for

    .. math:: w = \frac{-k_c^\top M (k_0 - k_c)}{(k_0 - k_c)^\top M (k_0 - k_c)}

    Where the first token of a text takes the place of a BOS, a subject that opens the prompt has a key :math:`k_0` far
    from :math:`k_c`, and the even mean leaves one of them half edited.

    Args:
        bare: Key of the bare prompt, ``[d_key]``.
        contexts: Mean key of the other contexts, ``[d_key]``.
        metric: Applies the symmetric ``M`` to keys ``[n, d_key]``.

    Returns:
        The share, in [0, 1].
    """
    difference = (bare - contexts).double()
    direction = metric(difference.unsqueeze(0))[0]
    length = float(difference @ direction)
    if not length > 0:  # one key: any mixture is the same
        return 0.5
    return min(1.0, max(0.0, float(-(contexts.double() @ direction)) / length))
