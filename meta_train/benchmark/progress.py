"""The progress of a benchmark: its share that is done, and the time that remains."""

import sys
from types import TracebackType

from tqdm import tqdm

from learned_optim.terminal import printable, say


class Bar:
    """A live bar over training steps on a terminal, else a line for each thing that is begun.

    Steps that turn out to be stored already, or that a diverged training leaves out, are taken off the total, so that
    the remaining time is that of the steps that are left.

    Args:
        steps: training steps that are planned.
        live: None: if standard error is a terminal.
    """

    def __init__(self, steps: int, live: bool | None = None) -> None:
        self.done = 0
        self.live = sys.stderr.isatty() if live is None else live
        self.bar = tqdm(total=steps, unit="step", unit_scale=True, disable=not self.live, dynamic_ncols=True)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()

    def step(self) -> None:
        """One step is done."""
        self.done += 1
        self.bar.update()

    def plan(self, steps: int) -> None:
        """More steps to do; or fewer, where negative."""
        if self.live:
            self.bar.total = max(self.bar.n, self.bar.total + steps)
            self.bar.refresh()

    def say(self, line: str) -> None:
        """Say what is done now."""
        if self.live:
            self.bar.set_description_str(printable(line))
        else:
            say(line, error=True)

    def print(self, text: str) -> None:
        """A result, to standard output."""
        with tqdm.external_write_mode(file=sys.stdout):
            say(text)
