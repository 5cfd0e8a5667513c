"""Which device computes, and in which precision."""

import contextlib

import torch

from micro_diffusion.runtime.files import user_error


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or for "auto" the fastest one there is; UserError if it is not there. Allows TF32 on CUDA."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with user_error(f"the device {name!r} is not available here: choose auto or cpu", RuntimeError, AssertionError):
        device = torch.device(name)
        torch.empty(1, device=device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    """The context in which a network's forward runs at `precision`, "float32" or "bf16"."""
    return contextlib.nullcontext() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)
