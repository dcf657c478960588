"""What happens in a meta-training run, step by step, as CSV and TensorBoard."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from learned_optim.files import write_atomically


@dataclass(frozen=True)
class Progress:
    """What happened in one meta-step."""

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
    """Validation score, where there was a validation: see :meth:`Suite.score`."""
    best_validation: float
    seconds: float
    """Time spent on meta-training so far, resumed parts included."""
    details: Mapping[str, float] = field(default_factory=dict)
    """What else there is to tell, by names like ``estimator/variance``: see :attr:`Trainer.detail_names`."""

    def row(self) -> dict[str, float]:
        """All numbers by name, without those that are not known at this step."""
        values = {**vars(self), **self.details}
        return {name: value for name, value in values.items() if name != "details" and value is not None}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a ``metrics.csv``: a kill can cut the last.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in row.values() and None not in row]
            names = reader.fieldnames or []
        if "meta_step" not in names:
            raise ValueError("its first line does not name a column meta_step")
        for row in rows:
            _check_numbers(row)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error}); move it away, the checkpoint does without") from error
    return rows


def _check_numbers(row: Mapping[str, str]) -> None:
    int(row["meta_step"])
    for value in row.values():
        float(value or "nan")


class RunLog:
    """Metrics of a run as CSV and TensorBoard; rows after ``meta_step`` (of a run cut off) are dropped at the start.

    Args:
        folder: of the run; None: nothing is written.
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
            kept = [row for row in read_rows(path) if int(row["meta_step"]) <= meta_step]
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
