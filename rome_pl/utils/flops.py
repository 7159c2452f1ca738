"""Counting the floating-point operations of a block, from the shapes that reach torch's dispatcher.

Dense matrix products, convolutions and attention are counted; a multiply-add counts as 2. Elementwise work is not
counted (including an outer product that torch runs as elementwise), nor are factorisations and solves.

Attention counts the same whichever kernel computes it: two products forward and four backward over the full
rectangle of scores, masked or causal or not. A fused kernel may compute the scores again for its backward; this is not
counted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Self

import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker
from typing_extensions import override

__all__ = ["FirstBatchFlops", "FlopCount", "count_flops"]

Shape = Sequence[int]


class FlopCount:
    """The operations of a block so far. It can be read inside the block and after it.

    Args:
        counter: Torch's counter, which keeps the numbers.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter

    @property
    def total(self) -> int:
        """Floating-point operations of the whole block, forward and backward together."""
        return self._counter.get_total_flops()


@contextmanager
def count_flops() -> Iterator[FlopCount]:
    """Count the operations of everything that runs inside, backward passes included.

    Blocks may be nested; the outer one includes the inner one. Kernels within a custom operator or compiled code are
    not seen.

    Yields:
        The count, which grows while the block runs.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    counter.mod_tracker = _NoTracker()
    with counter:
        yield FlopCount(counter)


class FirstBatchFlops:
    """Counts the operations of an edit on the first batch of a run only.

    Counting slows a step, and takes other kernels and so other last bits: in a resumed run the first was counted.
    """

    def __init__(self) -> None:
        self.per_edit: float | None = None
        """Floating-point operations of an edit's prefix pass and optimisation. ``None``: they were not counted."""
        self._counted = 0.0

    @contextmanager
    def counting(self, skip: bool) -> Iterator[None]:
        """Count what runs inside, if nothing is known yet.

        Args:
            skip: Whether it cannot be counted, as compiled steps, or must not be.
        """
        if skip or self.per_edit is not None:
            yield
            return
        with count_flops() as counted:
            yield
        self._counted += counted.total

    def settle(self, edits: int) -> None:
        """End the batch: what was counted is that of so many edits; none: it is forgotten."""
        if self.per_edit is None and self._counted and edits:
            self.per_edit = self._counted / edits
        self._counted = 0.0


class _NoTracker(ModuleTracker):
    """Attributes nothing to modules: torch's own tracker hooks every graph and would keep all of them in memory."""

    @override
    def __enter__(self) -> Self:
        return self

    @override
    def __exit__(self, *_: object) -> None:
        pass


def _product(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    """A product of matrices, of batches of matrices, or of a matrix and a vector."""
    return 2 * prod(left) * (right[-1] if len(right) > 1 else 1)


def _added_product(_: Shape, left: Shape, right: Shape, *__: Any, **___: Any) -> int:
    return _product(left, right)


def _added_outer(_: Shape, left: Shape, right: Shape, *__: Any, **___: Any) -> int:
    return 2 * left[0] * right[0]


def _grouped_product(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    """Groups of rows, of columns or of what is summed over: one product in all, unless both sides have a batch."""
    return 2 * prod(left if len(right) == 3 else left[-2:]) * right[-1]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Every query head has its own scores, even if it shares keys and values with other heads."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(_: Shape, query: Shape, key: Shape, value: Shape, *__: Any, **___: Any) -> int:
    return 2 * _attention(query, key, value)


def _formulas() -> dict[Any, Callable[..., int]]:
    """Formulas by operator, for those operators that this torch has."""
    kernels = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    attention = [f"_scaled_dot_product_{kernel}" for kernel in kernels]
    # Torch has formulas for some of these too, but its products refuse overloads that name the output's type, and its
    # attention backward counts the scores that are computed again.
    names: dict[Callable[..., int], Sequence[str]] = {
        _product: ["mm", "bmm", "mv", "dot", "vdot"],
        _added_product: [f"{name}{end}" for name in ("addmm", "addmv", "baddbmm", "addbmm") for end in ("", "_")],
        _added_outer: ["addr", "addr_"],
        _grouped_product: ["_grouped_mm"],
        _attention: attention,
        _attention_backward: [f"{name}_backward" for name in attention],
    }
    aten = torch.ops.aten
    return {getattr(aten, name): formula for formula, of in names.items() for name in of if hasattr(aten, name)}
