"""Random numbers by purpose: every draw of a run follows from (seed, purpose, counters), so nothing has to be saved."""

import contextlib
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed that is a fixed function of its arguments and independent between different arguments.

    A purpose always comes with the same number of counters: trailing zeros make no difference.
    """
    words = [seed, zlib.crc32(purpose.encode()), *counters]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by :func:`derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *counters))


def numpy_generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A NumPy generator seeded by :func:`derive_seed`."""
    return np.random.default_rng(derive_seed(seed, purpose, *counters))


@contextlib.contextmanager
def fixed_global_state(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's global random state, from which modules and dropout draw, for a block, and put it back after."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also change all GPUs
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def cpu_by_default() -> Iterator[None]:
    """Make tensors on the CPU in a block or a decorated function, whatever the default device is.

    A run is moved to its own device explicitly; ``torch.set_default_device`` is the caller's.
    """
    # Such a block costs something at each call of torch, so there is none where it changes nothing.
    with contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


def global_state(device: torch.device) -> tuple[Tensor, ...]:
    """Torch's global random state: the CPU's and, if it is another, the device's."""
    return (torch.get_rng_state(), *((torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()))


def set_global_state(state: tuple[Tensor, ...], device: torch.device) -> None:
    """Go back to what :func:`global_state` has returned for the same device."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
