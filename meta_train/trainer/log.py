"""The log of a meta-training run, step by step, as CSV and for TensorBoard."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from learned_optim.files import write_atomically


@dataclass(frozen=True)
class Progress:
    """The figures of one meta-step."""

    meta_step: int
    meta_loss: float
    """Mean over the windows of this step."""
    inner_loss: float
    """Mean inner loss at the end of the windows."""
    grad_norm: float
    """Norm of the meta-gradient before clipping; not finite means that the step was skipped."""
    skipped: int
    """Meta-steps skipped so far."""
    validation: float | None
    """Validation score, where there was a validation: see :meth:`ValidationSuite.score`."""
    best_validation: float
    seconds: float
    """Time spent on meta-training so far, resumed parts included."""
    details: Mapping[str, float] = field(default_factory=dict)
    """Further figures, by names like ``estimator/variance``: see :attr:`Trainer.detail_names`."""

    def row(self) -> dict[str, float]:
        """All numbers by name, without those that are not known at this step."""
        values = {**vars(self), **self.details}
        return {name: value for name, value in values.items() if name != "details" and value is not None}


class RunLog:
    """Metrics of a run as CSV and TensorBoard; rows after ``meta_step`` (of a run cut off) are dropped at the start.

    Args:
        folder: folder of the run; None: nothing is written.
        meta_step: meta-steps done so far.
        details: names of all :attr:`Progress.details` that may come.
    """

    def __init__(self, folder: Path | None, meta_step: int, details: Sequence[str] = ()) -> None:
        self.file: io.TextIOWrapper | None = None
        self.add_scalar: Callable[[str, float, int], None] = lambda name, value, step: None
        self.close_board: Callable[[], None] = lambda: None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.csv"
        fields = [name for name in Progress.__dataclass_fields__ if name != "details"] + list(details)
        kept = []
        if path.is_file():
            _, rows = read_metrics(path)
            kept = [row for row in rows if int(row["meta_step"]) <= meta_step]
        text = io.StringIO()
        writer = csv.DictWriter(text, fields, lineterminator="\n", extrasaction="ignore")  # rows of an older version
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(path, text.getvalue())
        self.file = path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, fields, lineterminator="\n")
        board = SummaryWriter(str(folder / "tensorboard"), purge_step=meta_step + 1)
        self.add_scalar, self.close_board = board.add_scalar, board.close

    def write(self, progress: Progress) -> None:
        """Add one meta-step."""
        if self.file is None:
            return
        row = progress.row()
        self.writer.writerow(row)
        for name, value in row.items():
            if name != "meta_step":
                self.add_scalar(name, float(value), progress.meta_step)

    def flush(self) -> None:
        """Bring all rows to the disk."""
        if self.file is not None:
            self.file.flush()

    def close(self) -> None:
        """Finish the files."""
        if self.file is not None:
            self.file.close()
        self.close_board()


def read_metrics(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Names of the columns of a ``metrics.csv``, and its rows, numbers as they are written, empty where not known.

    The last row is left out if a crash has cut it.

    Raises:
        ValueError: it is empty, or damaged elsewhere.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace")  # in a number, what is no UTF-8 is found below
        names, *rows = csv.reader(io.StringIO(text, newline=""))
        if "meta_step" not in names:
            raise ValueError("it has no column 'meta_step'")
        if rows and not text.endswith("\n") and _fault(names, rows[-1]):
            rows.pop()
        for number, row in enumerate(rows, 2):
            if fault := _fault(names, row):
                raise ValueError(f"row {number}: {fault}")
    except (csv.Error, ValueError) as error:
        reason = error if path.stat().st_size > 0 else "it is empty"
        raise ValueError(f"{path} is damaged ({reason}); move it away, the checkpoint does without") from error
    return names, [dict(zip(names, row, strict=True)) for row in rows]


def _fault(names: Sequence[str], row: Sequence[str]) -> str | None:
    """The fault of a row in words, if there is one."""
    if len(row) != len(names):
        return f"{len(row)} values for {len(names)} columns"
    try:
        int(row[names.index("meta_step")])
        for value in filter(None, row):
            float(value)
    except ValueError as error:
        return str(error)
    return None
