"""Tables of results in the documents and the README's claim, written from the committed results and from nothing else.

    python -m benchmarks.readme_tables            # rewrites what lies between the markers in the documents
    python -m benchmarks.readme_tables --check    # status 1 if that would change anything

A rule's figure is bold where it is below that of every baseline tuned. A star marks a rate at an edge of those tried.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import cookbook_tables, wide_tables
from benchmarks.l2l_2016 import EXPERIMENTS
from learned_optim.meta_train.benchmark.evaluation import BASELINES, RATES
from learned_optim.meta_train.benchmark.report import ratio_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- {} table, written by benchmarks/tables.py -->", "<!-- end of the table -->"

EDGE_MARK = r"\*"  # an asterisk of its own in Markdown
FOLDERS = ("unseen", "paper", "generalization", "horizon", "larger", "width")
"""Where summary.csv is read; no problem may stand in two of them with the same optimizer."""

HELD_OUT = {
    "digits-relu-100": "digits 64-64-10 ReLU, 100 steps",
    "digits-relu-1000": "the same, 1,000 steps",
    "mnist-relu-100": "MNIST 784-64-10 ReLU, 100 steps",
    "mnist-relu-1000": "the same, 1,000 steps",
}
"""Problem -> title, of the first table."""

GENERALIZATION = {
    "residual": "six residual blocks, Fashion-MNIST 14x14",
    "conv-net": "conv net with batch norm, Fashion-MNIST 14x14",
    "autoencoder": "autoencoder, Fashion-MNIST 14x14",
    "gru": "GRU of 48, characters of Python",
    "transformer": "transformer of 2 blocks, characters of Python",
    "fashion-mnist": "196-128-10 ReLU, Fashion-MNIST 14x14",
    "physics": "differential equation, tanh network",
    "deep-linear": "matrix completion, four factors",
    "rosenbrock": "10-d Rosenbrock valleys",
    "ill-conditioned": "200-d quadratic, condition 100,000",
}
"""Problem -> title, of the second."""
HORIZON = {
    "fashion-mnist-1000": "196-32-10 ReLU, Fashion-MNIST 14x14, 1,000 steps",
    "fashion-mnist-4000": "the same, 4,000 steps",
    "fashion-mnist-10000": "the same, 10,000 steps",
    "ill-conditioned-10000": "100-d quadratic, condition 10,000, noisy, 10,000 steps",
}
"""Problem -> title, of the third."""
WIDTH = {
    "perceptron-32": "perceptron 784-32-32-32-10 ReLU, Fashion-MNIST",
    "perceptron-128": "the same of 128",
    "perceptron-512": "the same of 512",
    "perceptron-1024": "the same of 1,024: 2.9 million parameters",
    "transformer-32": "transformer of 2 blocks of width 32, characters of Python",
    "transformer-192": "the same of 192: 930,000 parameters",
    "gru-32": "GRU of 32, characters of Python",
    "gru-192": "the same of 192",
}
"""Problem -> title, of widths."""
LARGER = {
    "large-autoencoder": "autoencoder 784-256-16, MNIST, 411,000 parameters, 1,000 steps",
    "large-physics": "differential equation, 4 layers of 64, 12,700 parameters, 1,000 steps",
    "resnet": "ResNet-8, CIFAR-10 16x16, 78,000 parameters, 400 steps",
    "large-transformer": "transformer of 3 blocks, characters of Python, 253,000 parameters, 400 steps",
}
"""Problem -> title, of the fourth."""
UNTUNED = "Adam@0.001"
"""Adam at its default rate."""


Row = Mapping[str, str]
Results = Mapping[tuple[str, str], Row]
"""(problem, optimizer) -> row of a summary.csv."""


def read_results(root: Path = RESULTS) -> Results:
    """All rows of the summaries."""
    results: dict[tuple[str, str], Row] = {}
    for folder in FOLDERS:
        with (root / folder / "summary.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                key = row["problem"], row["optimizer"]
                if key in results:
                    raise ValueError(f"{key} stands in two of {', '.join(FOLDERS)}")
                results[key] = row
    return results


def at_edge(row: Row) -> bool:
    """Whether a baseline's rate lies at an edge of those tried. Older summaries have no such column: fixed grid."""
    if "edge" in row:
        return bool(row["edge"])
    return float(row["rate"]) in (max(RATES), min(RATES))


def loss(results: Results, problem: str, optimizer: str) -> float:
    """Final loss."""
    return float(results[problem, optimizer]["final_loss"])


def best_baseline(results: Results, problem: str) -> float:
    """Lowest final loss of a tuned baseline."""
    return min(loss(results, problem, name) for name in BASELINES if (problem, name) in results)


def baselines_of(results: Results, problems: Iterable[str]) -> list[str]:
    """Baselines that were run on one of the problems, at least."""
    return [name for name in BASELINES if any((problem, name) in results for problem in problems)]


def baseline_cells(results: Results, problem: str, names: Sequence[str]) -> list[str]:
    """Final loss and rate of baselines; empty where one was not run."""
    cells = []
    for name in names:
        row = results.get((problem, name))
        mark = EDGE_MARK if row and at_edge(row) else ""
        cells.append(f"{number(row['final_loss'])} ({float(row['rate']):g}{mark})" if row else "")
    return cells


def rule_cell(results: Results, problem: str, rule: str) -> str:
    """Final loss of a rule, bold where it is below that of every tuned baseline."""
    text = number(results[problem, rule]["final_loss"])
    return f"**{text}**" if loss(results, problem, rule) < best_baseline(results, problem) else text


def number(text: str) -> str:
    """Three significant digits."""
    return f"{float(text):.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def held_out_table(results: Results) -> str:
    """The default rule beside tuned baselines."""
    baselines = baselines_of(results, HELD_OUT)
    rows = [
        [
            title,
            rule_cell(results, problem, "default"),
            *baseline_cells(results, problem, baselines),
            ratio_text(loss(results, problem, "default") / loss(results, problem, "Adam")),
            ratio_cell(results, problem, "default"),
        ]
        for problem, title in HELD_OUT.items()
    ]
    names = ["default rule", *baselines, "default / Adam", "default / best tuned"]
    return table(["problem (images held out from meta-training)", *names], rows)


def speedup_table(results: Results, problems: Mapping[str, str]) -> str:
    """The default rule beside tuned baselines and Adam at its default rate; in the last column in how much fewer steps.

    Problems that have not been run are left out.
    """
    run = {problem: title for problem, title in problems.items() if (problem, "default") in results}
    baselines = baselines_of(results, run)
    untuned = any((problem, UNTUNED) in results for problem in run)
    rows = []
    for problem, title in run.items():
        row = [title, rule_cell(results, problem, "default"), *baseline_cells(results, problem, baselines)]
        row += [number(results[problem, UNTUNED]["final_loss"])] if untuned else []
        rows.append([*row, f"{float(results[problem, 'default']['speedup']):.2f}"])
    names = ["default rule", *baselines, *(["Adam, 0.001"] if untuned else []), "speed-up"]
    return table(["problem", *names], rows)


def paper_table(results: Results) -> str:
    """The paper's rule on each experiment beside its best baseline; experiments without results are left out."""
    rows = []
    for problem, title, rule, paper in experiments_run(results):
        names = [name for name in BASELINES if (problem, name) in results]
        best = min(names, key=lambda name: loss(results, problem, name))
        row = [title, rule_cell(results, problem, rule), rule_cell(results, problem, "default")]
        row += [f"{best} {number(results[problem, best]['final_loss'])}"]
        rows.append([*row, *(ratio_cell(results, problem, name) for name in (rule, "default")), paper])
    return table(
        ["problem", "lstm-l2l", "default rule", "best tuned", "lstm-l2l / best", "default / best", "paper"], rows
    )


def reproduction_table(results: Results) -> str:
    """All baselines with their rates, and the band of the paper's rule."""
    run = list(experiments_run(results))
    baselines = baselines_of(results, [problem for problem, *_ in run])
    rows = []
    for problem, title, rule, _ in run:
        row = results[problem, rule]
        band = f"{number(row['band_low'])} to {number(row['band_high'])}"
        rows.append([title, row["seeds"], rule_cell(results, problem, rule), band])
        rows[-1] += baseline_cells(results, problem, baselines)
    return table(["problem", "seeds", "lstm-l2l", "95% band", *baselines], rows)


def robustness_table(root: Path = RESULTS) -> str:
    """The default rule and Adam, tuned under each disturbance; bold where the rule ends lower."""
    with (root / "robustness.csv").open(newline="") as file:
        results = {(row["condition"], row["optimizer"]): row for row in csv.DictReader(file)}
    rows = []
    for condition in dict.fromkeys(condition for condition, _ in results):
        rule, adam = (results[condition, name] for name in ("default", "Adam"))
        ours, theirs = (row["final_over_initial_loss"] for row in (rule, adam))
        text = f"{float(ours):.2g}"
        rows.append([condition, f"**{text}**" if float(ours) < float(theirs) else text])
        rows[-1].append(f"{float(theirs):.2g} ({float(adam['rate']):g})")
    return table(["disturbance", "default rule", "Adam, tuned under it (rate)"], rows)


def experiments_run(results: Results) -> Iterable[tuple[str, str, str, str]]:
    """Problem, title, rule and the paper's ratio of those experiments whose rule has been run."""
    for problem, experiment in EXPERIMENTS.items():
        if (problem, experiment.rule) in results:
            yield problem, experiment.title, experiment.rule, experiment.paper


def ratio_cell(results: Results, problem: str, rule: str) -> str:
    """Final loss over that of the best tuned baseline."""
    return ratio_text(loss(results, problem, rule) / best_baseline(results, problem))


TABLES: Mapping[str, Mapping[str, Callable[[Results], str]]] = {
    "README.md": {"waveforms-claim": lambda _: cookbook_tables.waveforms_claim()},
    "docs/cookbook.md": {"programs": lambda _: cookbook_tables.table()},
    "docs/meta-training.md": {"waveforms": lambda _: cookbook_tables.waveforms_table()},
    "docs/results.md": {
        "claim": lambda _: wide_tables.claim(),
        "wide": lambda _: wide_tables.table(),
        "generalization": lambda results: speedup_table(results, GENERALIZATION),
        "width": lambda results: speedup_table(results, WIDTH),
        "horizon": lambda results: speedup_table(results, HORIZON),
        "held-out": held_out_table,
        "larger": lambda results: speedup_table(results, LARGER),
        "robustness": lambda _: robustness_table(),
    },
    "docs/reproduction.md": {"paper": paper_table, "reproduction": reproduction_table},
}
"""By document, and by the name that stands in the marker before the table."""


def updated(document: str, text: str, results: Results) -> str:
    """The text of a document with fresh tables."""
    for name, build in TABLES[document].items():
        begin = BEGIN.format(name)
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(END)
        if not (found and ended):
            raise ValueError(f"{document} must hold {begin!r} and, after it, {END!r}")
        text = f"{before}{begin}\n{build(results)}\n{END}{after}"
    return text


def main() -> int:
    """Write or check; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a document is out of date")
    check = parser.parse_args().check
    results, stale = read_results(), []
    for document in TABLES:
        path = ROOT / document
        old = path.read_text(encoding="utf-8")
        if (new := updated(document, old, results)) != old:
            stale.append(document)
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and stale:
        print(
            f"not as the committed results: {', '.join(stale)}; run python -m benchmarks.readme_tables", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
