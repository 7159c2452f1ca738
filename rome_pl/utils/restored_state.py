"""What a process shares with everything that runs in it, and gets back as it was."""

import random
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

__all__ = ["differentiable", "frozen", "seeded", "undisturbed"]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Everything global that libraries set, as it was before, whatever happens inside.

    Gradient mode, random generators, default dtype, choice of kernels, warnings and signal handlers; the log levels
    of libraries stay with those who change them.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Asking a device that nobody has used would claim memory on it.
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    gradients, dtype, precision = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
    )
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn, anomalies = torch.backends.cudnn, torch.is_anomaly_enabled()
    kernels = cudnn.enabled, cudnn.benchmark, cudnn.deterministic
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()} if main else {}
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.set_grad_enabled(gradients)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)
        torch.set_default_dtype(dtype)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.autograd.set_detect_anomaly(anomalies)
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = kernels
        for number, handler in handlers.items():
            # Handlers that were not set from Python cannot be set from here, nor have libraries replaced them.
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)


@contextmanager
def differentiable() -> Iterator[None]:
    """Tensors that can be optimised inside, also within a caller's ``no_grad`` or ``inference_mode``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; every module's own mode and every flag restored after."""
    # Only what has to change is touched: inside another such block this one costs next to nothing.
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators seeded inside; the CPU's and the device's own state restored after."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
