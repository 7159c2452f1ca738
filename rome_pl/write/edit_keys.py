"""The keys of one edit at one rewrite layer, and its assertion there."""

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
    """The projection's inputs and outputs at an edit's lookup token, float64.

    Args:
        bare: Key of the bare prompt, ``[d_key]``.
        mean: Mean key over contexts, ``[d_key]``.
        balanced: Key between the two with which an update acts fully at both, ``[d_key]``. ``None``: the preset does
            not ask for it.
        output_bare: The projection's output at the bare prompt, bias included, ``[d_value]``.
        output_mean: Its mean output over contexts, ``[d_value]``.
        output_balanced: Its output at the balanced key, ``[d_value]``.
        shares: Weights of the contexts in the balanced key, ``[contexts]``.
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
        """Compute the keys from those of all contexts.

        Args:
            keys: The key of each context, the bare prompt's first, ``[contexts, d_key]``.
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
        """Return one of the keys, ``[d_key]``."""
        return _present({"mean": self.mean, "bare": self.bare, "balanced": self.balanced}[which])

    def output(self, which: KeyChoice) -> Tensor:
        """Return the projection's output at this key, ``[d_value]``."""
        outputs = {"mean": self.output_mean, "bare": self.output_bare, "balanced": self.output_balanced}
        return _present(outputs[which])

    def mix(self, rows: Tensor, which: KeyChoice) -> Tensor:
        """Mix other rows of the same contexts, ``[contexts, d]``, like a key. Returns ``[d]``, float64."""
        bare, mean, balanced = _mixtures(rows.double(), self.shares)
        return _present({"mean": mean, "bare": bare, "balanced": balanced}[which])

    def assertion(self, preset: Preset, offset: Tensor) -> Assertion:
        """Return the assertion that moves the projection's output by ``offset``, ``[d_value]``.

        The preset determines the shaping key, the asserted key, and the output that the offset is added to.
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
    r"""Return the share of the bare prompt's key in a mixture with which an update acts fully at both keys.

    An update shaped by :math:`k = w k_0 + (1 - w) k_c` acts at a key in proportion to its product with
    :math:`k` under the metric. These products are equal at both keys for

    .. math:: w = \frac{-k_c^\top M (k_0 - k_c)}{(k_0 - k_c)^\top M (k_0 - k_c)}

    If the tokenizer adds no BOS, a subject at the beginning of the prompt has a key :math:`k_0` far from :math:`k_c`,
    and with the plain mean one of them would be edited only by half.

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
    if not length > 0:  # equal keys: any mixture is the same
        return 0.5
    return min(1.0, max(0.0, float(-(contexts.double() @ direction)) / length))
