"""Which device to compute on, and the state of its random generators."""

import torch

from minigpt.command_line import InputError

__all__ = ["pick_device", "random_state", "set_random_state"]


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


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators: the CPU's, and the device's own, from which dropout there draws."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(device: torch.device, state: dict[str, torch.Tensor]) -> None:
    """Put `random_state` back; what another kind of device left behind is passed over."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])
