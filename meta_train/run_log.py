"""What happens in a meta-training run, step by step, as CSV and TensorBoard."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
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
    """Validation score, where there was a validation: see :meth:`Trainer.validate`."""
    best_validation: float
    seconds: float
    """Time spent on meta-training so far, resumed parts included."""


class RunLog:
    """Metrics of a run as CSV and TensorBoard; rows after ``meta_step`` (of a run cut off) are dropped at the start."""

    def __init__(self, folder: Path | None, meta_step: int) -> None:
        self.file: io.TextIOWrapper | None = None
        self.add_scalar: Callable[[str, float, int], None] = lambda name, value, step: None
        self.close_board: Callable[[], None] = lambda: None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.csv"
        fields = list(Progress.__dataclass_fields__)
        kept = []
        if path.is_file():
            with path.open(newline="") as file:
                whole = [row for row in csv.DictReader(file) if None not in row.values()]  # a kill can cut the last
                kept = [row for row in whole if int(row["meta_step"]) <= meta_step]
        text = io.StringIO()
        writer = csv.DictWriter(text, fields, lineterminator="\n")
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
        row = {name: "" if value is None else value for name, value in vars(progress).items()}
        self.writer.writerow(row)
        for name, value in vars(progress).items():
            if value is not None and name != "meta_step":
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
