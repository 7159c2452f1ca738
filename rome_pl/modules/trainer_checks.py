"""Settings of a Trainer that would do something else than was asked for."""

from typing import Any, Literal

import torch
from lightning.pytorch import Trainer

from rome_pl.errors import OptionError
from rome_pl.utils.distributed import check_strategy

__all__ = ["check_edit_trainer", "check_limits", "check_pass_trainer", "check_precision"]


def check_precision(trainer: Trainer, autocast: bool = False) -> None:
    """Check that a Trainer leaves the weights in the precision that they were loaded in.

    Args:
        trainer: The Trainer.
        autocast: Whether ``bf16-mixed`` is allowed too.

    Raises:
        OptionError: With the setting that works.
    """
    if trainer.precision == "32-true" or (autocast and trainer.precision == "bf16-mixed"):
        return
    other = " or 'bf16-mixed' to optimise values under autocast," if autocast else ""
    raise OptionError(
        f"precision is {trainer.precision}: use '32-true',{other} and set the weights' precision by model.dtype"
    )


def check_pass_trainer(trainer: Trainer) -> None:
    """Check how a Trainer is set.

    Raises:
        OptionError: With the setting that works.
    """
    check_strategy(trainer.strategy)
    check_precision(trainer)
    limit = trainer.limit_predict_batches
    if isinstance(limit, int) or limit != 1.0:
        raise OptionError(
            "limit_predict_batches (which fast_dev_run also sets) would end the pass before anything is known; for "
            "a quick try set model.tokens"
        )
    if trainer.strategy.root_device.type == "mps":
        raise OptionError("Apple's MPS has no float64, in which keys are summed; use Trainer(accelerator='cpu')")


def check_edit_trainer(trainer: Any, sequential: bool) -> None:
    """Refuse Trainers that would edit something else than was asked for.

    Raises:
        OptionError: With the setting that works.
    """
    if torch.is_inference_mode_enabled():
        raise OptionError("inside torch.inference_mode() nothing can be optimised: call Trainer.fit outside of it")
    check_strategy(trainer.strategy)
    if trainer.max_epochs != 1:
        raise OptionError(
            f"max_epochs is {trainer.max_epochs}: the stream of edits runs once. Use Trainer(max_epochs=1)"
        )
    if trainer.world_size > 1 and sequential:
        raise OptionError(
            f"{trainer.world_size} devices cannot share a sequential stream: each edit starts from the weights that "
            "the one before left. Use Trainer(devices=1), or sequential_edit: false"
        )
    check_precision(trainer, autocast=True)
    if trainer.strategy.root_device.type == "mps":
        raise OptionError("Apple's MPS has no float64, in which edits are solved; use Trainer(accelerator='cpu')")


def check_limits(trainer: Any, loop: Literal["fit", "predict"] = "fit") -> None:
    """Refuse limits of a Trainer under which nothing would be done.

    Args:
        trainer: The Trainer.
        loop: Which of its loops is to run: edits are made by ``fit``, all else by ``predict``.

    Raises:
        OptionError: With the option.
    """
    if loop == "predict":
        if trainer.limit_predict_batches == 0:
            raise OptionError("trainer.limit_predict_batches: 0 ends the run before anything is done; leave it out")
        return
    left = [callback.time_remaining() for callback in trainer.callbacks if hasattr(callback, "time_remaining")]
    limits = {
        "max_time": min((seconds for seconds in left if seconds is not None), default=1.0),
        "max_steps": trainer.max_steps,
        "limit_train_batches": trainer.limit_train_batches,
    }
    if ended := [name for name, limit in limits.items() if limit == 0]:
        raise OptionError(f"trainer.{ended[0]}: 0 ends the stream before its first edit; leave it out")
