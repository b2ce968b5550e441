"""Chooses the device to compute on. Saves and restores the states of all random generators."""

import random

import numpy as np
import torch

from minigpt.errors import InputError, Message

__all__ = ["move", "pick_device", "random_state", "seed_everything", "set_random_state"]


def pick_device(name: str) -> torch.device:
    """Return the device that `--device` names. `auto` means CUDA, else MPS, else the CPU.

    Raises:
        InputError: for a name that torch does not know, or a device that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InputError(Message("device {name!r} cannot be used here: {why}", name=name, why=why)) from None
    return device


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device. The CPU does not wait until a copy to a CUDA device is finished."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)  # the CPU waits until the copy is finished


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, NumPy, torch and torch's devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy's seed has at most 32 bits
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the random generators of Python, of NumPy, of torch on the CPU, and of `device`.

    Dropout on a device uses the device's generator. The generators of Python and NumPy are Mersenne twisters.
    Their state is 624 words and a position. They draw normally distributed numbers in pairs. If only one
    number of a pair has been used, the other one belongs to the state, too (`..._spare`).
    """
    _, words, spare = random.getstate()
    _, keys, position, has_spare, numpy_spare = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([*words, spare is not None]),  # (626,) int64: Python's state
        "python_spare": torch.tensor([spare or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), position, has_spare]),  # (626,) int64: NumPy's state
        "numpy_spare": torch.tensor([numpy_spare], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(device: torch.device, state: dict[str, torch.Tensor]) -> None:
    """Restore states that `random_state` returned. The state of another type of device is ignored."""
    torch.set_rng_state(state["torch"])
    if "python" in state:
        *words, has_spare = state["python"].tolist()
        random.setstate((3, tuple(words), state["python_spare"].item() if has_spare else None))
    if "numpy" in state:
        *keys, position, has_spare = state["numpy"].tolist()
        twister = (
            "MT19937",
            np.array(keys, dtype=np.uint32),
            position,
            has_spare,
            state["numpy_spare"].item(),
        )
        np.random.set_state(twister)
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])
