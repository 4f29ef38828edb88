"""What trains a network, and what it computes with."""

from typing import Any

import torch

from digitlab.base.errors import require
from digitlab.config.types import Device


def find_device(wanted: Device) -> torch.device:
    """Return the device that a configuration asks for.

    Raises:
        UserError: torch finds no such device on this machine.
    """
    found = {"cpu": True, "cuda": torch.cuda.is_available()}
    found["mps"] = torch.backends.mps.is_available()
    if wanted is Device.auto:
        wanted = next(Device(name) for name in ("cuda", "mps", "cpu") if found[name])
    names = [name for name, is_there in found.items() if is_there]
    rule = f"a device that torch finds on this machine: auto, {', '.join(names)}"
    require(found[wanted], f"trainer.device={wanted}", rule)
    return torch.device(wanted)


def numerics(device: torch.device) -> dict[str, Any]:
    """Return what torch computes with, as recorded beside the environment."""
    accelerator = {}
    if device.type == "cuda":
        accelerator = {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "tf32": torch.backends.cudnn.allow_tf32,
        }
    return accelerator | {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "float32": torch.get_float32_matmul_precision(),
    }
