"""The load of the machine, beside which a figure in seconds is to be read."""

import math
import os
import time

DAMPING = 60.0  # seconds, of the shortest of the three averages that the system keeps
BUSY = 0.5  # of other work: half a core, from which on seconds are not to be relied on

_BEGAN, _SPENT = time.monotonic(), time.process_time()


def load_average() -> float | None:
    """Processes that ran or waited to run, in the average over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def load_of_others() -> float | None:
    """The part of :func:`load_average` that this process has not brought about itself.

    The average is damped exponentially: a process that keeps r cores busy for t seconds brings r (1 - exp(-t / 60))
    into it.
    """
    load, elapsed = load_average(), time.monotonic() - _BEGAN
    if load is None or elapsed <= 0:
        return load
    own = (time.process_time() - _SPENT) / elapsed * (1 - math.exp(-elapsed / DAMPING))
    return max(0.0, load - own)


def busy_machine(others: float | None) -> str:
    """A sentence if there is other work, else nothing.

    Args:
        others: :func:`load_of_others` when seconds were measured.
    """
    if others is None or others < BUSY:
        return ""
    return (
        f"THE MACHINE IS BUSY: {others:.1f} of its load average is other work, so that these seconds are not to be "
        "relied on; measure again on a quiet machine"
    )
