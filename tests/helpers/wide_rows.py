"""Committed rows of a small wide suite, with rivals, for tests of the tables that are made of them."""

from pathlib import Path

HEADER = (
    'half,problem,optimizer,final,Adam,cosine,speed-up,strict,/ Adam,/ cosine,"held out, end",best,seconds,diverged'
)


def row(problem: str, optimizer: str, final: float, speedup: float = 1.0, held_out: float = 1.0) -> str:
    return f"second,{problem},{optimizer},{final},1,1,{speedup},{speedup / 2},{final},1,{held_out},{held_out / 2},1,0"


def write_rows(folder: Path) -> None:
    """Two problems with all rows, one on which a rival was not run, and one of the other half."""
    lines = [row(problem, "Adam", 1.0, held_out=0.5) for problem in ("perceptron", "valleys", "gru")]
    lines += [row(problem, "AdamW-cosine", 0.4, 1.5, 0.75) for problem in ("perceptron", "valleys", "gru")]
    lines += [row(problem, "Muon@0.003", 8.0, 0.125) for problem in ("perceptron", "valleys", "gru")]
    lines += [row("perceptron", "default", 0.5, 4.0), row("valleys", "default", 0.5, 1.0), row("gru", "default", 9.0)]
    lines += [row("perceptron", "Prodigy@1", 0.25, 2.0), row("valleys", "Prodigy@1", 1.0, 0.5)]
    lines += [row(problem, "Muon@0.01", 2.0, 0.25) for problem in ("perceptron", "valleys", "gru")]
    lines += [row(problem, "Adam@0.001", 4.0, 0.25) for problem in ("perceptron", "valleys", "gru")]
    lines.append(row("table", "Prodigy@1", 0.0).replace("second,", "first,"))
    (folder / "wide.csv").write_text("\n".join([HEADER, *lines]))
