"""Value searches by the optimiser of a LightningModule that optimises manually."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import Optimizer

from rome_pl.editing.edit import Edit
from rome_pl.editing.retries import take_result
from rome_pl.errors import OptionError
from rome_pl.search.objective import ValueObjective
from rome_pl.search.polyak_step import PolyakStep
from rome_pl.search.value_search import SearchOptions, ValueSearch
from rome_pl.utils.restored_state import frozen

__all__ = ["ManualSearch"]


class ManualSearch:
    """Searches the values of edits, each a parameter group of the module's one optimiser.

    Args:
        module: The module.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._group: dict[str, Any] = {}

    def configure(
        self, optimizer_class: OptimizerCallable, parameter: nn.Parameter, learning_rate: float | None
    ) -> Optimizer:
        """Make the optimiser; every search gives it parameters of its own.

        Args:
            optimizer_class: Class and arguments.
            parameter: Stands for them before the first search.
            learning_rate: Of every group. ``None``: 1 for :class:`PolyakStep`, which needs no other, else 0.5, as
                published for Adam.

        Raises:
            OptionError: If it cannot search edits apart.
        """
        optimizer = optimizer_class(cast(Iterable[Any], [parameter]))
        if isinstance(optimizer, torch.optim.LBFGS):
            raise OptionError("optimizer: LBFGS searches all edits of a batch along one line; use rome_pl.PolyakStep")
        if learning_rate is None:
            learning_rate = 1.0 if isinstance(optimizer, PolyakStep) else 0.5
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        self._group = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
        return optimizer

    def __call__(self, objective: ValueObjective, edits: Sequence[Edit], options: SearchOptions) -> None:
        """Search the values of edits, each at its position in the objective."""
        positions, names = [edit.search.position for edit in edits], [edit.name for edit in edits]
        search = ValueSearch(objective, positions, names, options)
        optimizer = cast(LightningOptimizer, self._module.optimizers())
        optimizer.optimizer.state.clear()  # moments of earlier edits would bend these
        while (loss := search.evaluate()) is not None:
            optimizer.optimizer.param_groups = [
                {**self._group, "params": [parameter], "loss": loss_of_edit, "scale": scale}
                for parameter, loss_of_edit, scale in zip(search.parameters, search.losses, search.scales, strict=True)
            ]
            optimizer.zero_grad()
            self._module.manual_backward(loss)
            optimizer.step()
            search.project()
        for edit, result in zip(edits, search.found(), strict=True):
            take_result(edit, result, objective.base_output)

    @contextmanager
    def step(self, model: nn.Module) -> Iterator[None]:
        """The state of a training step, for a search outside of one.

        Args:
            model: The language model; it is frozen inside.
        """
        with self._module.trainer.precision_plugin.train_step_context(), torch.enable_grad(), frozen(model):
            yield
