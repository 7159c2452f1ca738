"""Checking devices before anything is loaded."""

import torch

from rome_pl.errors import OptionError, first_line

__all__ = ["check_device", "check_trainer_devices"]


def check_device(device: str | torch.device | int | None) -> torch.device:
    """Return the device for a model.

    Args:
        device: As torch names it; ``None`` (default): a GPU if there is one, else the CPU.

    Raises:
        OptionError: If it does not exist here, or edits cannot be solved on it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device: {device!r} is not a device ({first_line(error)}); {_here()}") from error
    if found.type == "mps":
        raise OptionError(f"device: Apple's MPS has no float64, in which edits are solved; {_here()}")
    there = {"cpu": 1, "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    if (found.index or 0) >= there.get(found.type, 0):
        raise OptionError(f"device: {str(device)!r} is not here; {_here()}")
    return torch.device(found.type) if found.type == "cpu" else found


def check_trainer_devices(accelerator: object, devices: object) -> None:
    """Refuse devices of a Lightning Trainer that do not exist here, naming its options.

    Args:
        accelerator: ``trainer.accelerator`` as it was given.
        devices: ``trainer.devices`` likewise.

    Raises:
        OptionError: If they do not exist, with the devices that do.
    """
    gpu = torch.cuda.is_available()
    name = accelerator.lower() if isinstance(accelerator, str) else accelerator
    if name in ("gpu", "cuda") and not gpu:
        raise OptionError(f"trainer.accelerator: {accelerator} is not here; {_here()}")
    if isinstance(devices, str) and devices.partition(":")[0] in ("cpu", "cuda", "gpu", "mps", "xpu", "tpu"):
        raise OptionError(
            f"trainer.devices: expected how many, or a list of numbers of GPUs, got {devices!r}; {_here()}"
        )
    if name not in ("auto", "cpu", None) or (gpu and name != "cpu"):
        return  # Lightning checks its own accelerators
    count = devices
    if isinstance(devices, str):
        count = int(devices) if devices.strip().lstrip("-").isdecimal() else devices
    if count == "auto" or (isinstance(count, int) and not isinstance(count, bool) and count >= 1):
        return
    raise OptionError(f"trainer.devices: {devices!r} names GPUs, or no number of processes from 1 on; {_here()}")


def _here() -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return "there is no GPU here: use the CPU (device 'cpu'; trainer.accelerator: cpu, trainer.devices: 1)"
    return f"here are the CPU and {count} GPU{'s' * (count > 1)} (device 'cuda:0' to 'cuda:{count - 1}')"
