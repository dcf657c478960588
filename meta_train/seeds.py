"""Random numbers by purpose: every draw of a run follows from (seed, purpose, counters), so nothing has to be saved."""

import zlib

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed that is a fixed function of its arguments and independent between different arguments."""
    words = [seed, zlib.crc32(purpose.encode()), *counters]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_generator(seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by :func:`derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *counters))


def numpy_generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A NumPy generator seeded by :func:`derive_seed`."""
    return np.random.default_rng(derive_seed(seed, purpose, *counters))
