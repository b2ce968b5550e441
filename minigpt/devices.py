"""Which device to compute on."""

import torch

from minigpt.command_line import InputError

__all__ = ["pick_device"]


def pick_device(name: str) -> torch.device:
    """The device that `--device` names; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        InputError: for a name that torch does not know, or a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
