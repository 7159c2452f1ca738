"""Context managers that restore the global state of a process."""

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
    """Restore the global state that libraries change, even after an exception.

    This covers gradient mode, random generators, default dtype, choice of kernels, warnings and signal handlers, but
    not the log levels of libraries.
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
    """Enable gradients inside, even within a caller's ``no_grad`` or ``inference_mode``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Use evaluation mode without parameter gradients inside; restore every module's mode and every flag afterwards."""
    # Only what differs is changed, so a nested block costs next to nothing.
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
    """Seed torch's global generators inside; restore the state of the CPU's and the device's afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
