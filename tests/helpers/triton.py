"""Triton in tests: whether it is installed, and a driver that stands in for a GPU, so that kernels compile without."""

import functools
import importlib.util
from typing import Any

from helpers.rules import Build
from learned_optim.rules import LSTML2L, ScaleFreeLSTM, ScheduleFreeLSTM

HAS_TRITON = importlib.util.find_spec("triton") is not None

ONE_UNIT: dict[str, Build] = {
    "scale-free-lstm": functools.partial(ScaleFreeLSTM, 1),
    "schedule-free-lstm": functools.partial(ScheduleFreeLSTM, 1),
    "lstm-l2l": functools.partial(LSTML2L, 1),
}
"""Rules of one hidden unit, whose kernels compile fastest."""


class StandInDriver:
    """The parts of a driver that Triton asks before it compiles for a GPU: an H200 that is not there."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
