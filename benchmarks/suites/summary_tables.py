"""Tables of the suites that are folders of results: losses of rules beside those of tuned baselines.

``benchmarks/tables.py`` writes them. A rule's figure is bold where it is below that of every baseline tuned. A star
marks a rate at an edge of those tried.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.results import RESULTS, Row, read_summary
from benchmarks.suites.wide import UNTUNED
from learned_optim.meta_train.benchmark.evaluation import BASELINES, RATES
from learned_optim.meta_train.benchmark.report import ratio_text

EDGE_MARK = r"\*"  # an asterisk of its own in Markdown
FOLDERS = ("unseen", "paper", "generalization", "horizon", "larger", "width")
"""Folders whose summary.csv is read; no problem may stand in two of them with the same optimizer."""

UNSEEN = {
    "digits-relu-100": "digits 64-64-10 ReLU, 100 steps",
    "digits-relu-1000": "the same, 1,000 steps",
    "mnist-relu-100": "MNIST 784-64-10 ReLU, 100 steps",
    "mnist-relu-1000": "the same, 1,000 steps",
}
"""Problem -> title, of the suite ``unseen``."""

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
"""Problem -> title, of the suite ``generalization``."""
HORIZON = {
    "fashion-mnist-1000": "196-32-10 ReLU, Fashion-MNIST 14x14, 1,000 steps",
    "fashion-mnist-4000": "the same, 4,000 steps",
    "fashion-mnist-10000": "the same, 10,000 steps",
    "ill-conditioned-10000": "100-d quadratic, condition 10,000, noisy, 10,000 steps",
}
"""Problem -> title, of the suite ``horizon``."""
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
"""Problem -> title, of ``width.toml``."""
LARGER = {
    "large-autoencoder": "autoencoder 784-256-16, MNIST, 411,000 parameters, 1,000 steps",
    "large-physics": "differential equation, 4 layers of 64, 12,700 parameters, 1,000 steps",
    "resnet": "ResNet-8, CIFAR-10 16x16, 78,000 parameters, 400 steps",
    "large-transformer": "transformer of 3 blocks, characters of Python, 253,000 parameters, 400 steps",
}
"""Problem -> title, of ``larger.toml``."""
TITLES = {
    "unseen": UNSEEN,
    "generalization": GENERALIZATION,
    "horizon": HORIZON,
    "larger": LARGER,
    "width": WIDTH,
}
"""Folder -> problem -> title."""
Results = Mapping[tuple[str, str], Row]
"""(problem, optimizer) -> row of a summary.csv."""


def read_results(root: Path = RESULTS) -> Results:
    """All rows of the summaries; raises ``ValueError`` where two folders have the same problem and optimizer."""
    results: dict[tuple[str, str], Row] = {}
    for folder in FOLDERS:
        for row in read_summary(root / folder):
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
    baselines = baselines_of(results, UNSEEN)
    measured = measured_columns(results, UNSEEN)
    rows = [
        [
            title,
            rule_cell(results, problem, "default"),
            *baseline_cells(results, problem, baselines),
            ratio_text(loss(results, problem, "default") / loss(results, problem, "Adam")),
            ratio_cell(results, problem, "default"),
            *(cells[problem] for cells in measured.values()),
        ]
        for problem, title in UNSEEN.items()
    ]
    names = ["default rule", *baselines, "default / Adam", "default / best tuned", *measured]
    return table(["problem (images held out from meta-training)", *names], rows)


def speedup_table(results: Results, folder: str) -> str:
    """The default rule beside tuned baselines and Adam at its default rate; then in how much fewer steps it gets there.

    Behind that stand those of :data:`MEASURED` that the rows have. Problems that have not been run are left out.
    """
    run = {problem: title for problem, title in TITLES[folder].items() if (problem, "default") in results}
    baselines = baselines_of(results, run)
    untuned = any((problem, UNTUNED) in results for problem in run)
    measured = measured_columns(results, run)
    rows = []
    for problem, title in run.items():
        row = [title, rule_cell(results, problem, "default"), *baseline_cells(results, problem, baselines)]
        row += [number(results[problem, UNTUNED]["final_loss"])] if untuned else []
        row += [f"{float(results[problem, 'default']['speedup']):.2f}"]
        rows.append([*row, *(cells[problem] for cells in measured.values())])
    names = ["default rule", *baselines, *(["Adam, 0.001"] if untuned else []), "speed-up", *measured]
    return table(["problem", *names], rows)


def measured_columns(results: Results, problems: Iterable[str]) -> dict[str, dict[str, str]]:
    """Those of :data:`MEASURED` that rows of some of the problems have: column -> problem -> cell."""
    pairs = {problem: (results[problem, "default"], results[problem, "Adam"]) for problem in problems}
    columns = {name: {problem: cell(*pair) for problem, pair in pairs.items()} for name, cell in MEASURED.items()}
    return {name: cells for name, cells in columns.items() if any(cells.values())}


def _beside_adam(column: str, form: Callable[[str], str]) -> Callable[[Row, Row], str]:
    """A cell with the default rule's entry and Adam's; empty where the rows have none."""

    def cell(rule: Row, adam: Row) -> str:
        return f"{form(rule[column])} ({form(adam[column])})" if rule.get(column) and adam.get(column) else ""

    return cell


def _of_the_rule(column: str, form: Callable[[str], str]) -> Callable[[Row, Row], str]:
    """A cell with the default rule's entry; empty where its row has none."""
    return lambda rule, adam: form(rule[column]) if rule.get(column) else ""


def percent(text: str) -> str:
    """A share."""
    return f"{float(text):.1%}"


MEASURED: Mapping[str, Callable[[Row, Row], str]] = {
    "speed-up in seconds": _of_the_rule("speedup_in_seconds", lambda text: f"{float(text):.2f}"),
    "Adam in equal seconds": _of_the_rule("adam_loss_in_equal_seconds", number),
    "held-out loss at the end (Adam, tuned)": _beside_adam("held_out_end", number),
    "lowest held-out loss (Adam, tuned)": _beside_adam("held_out_best", number),
    "accuracy at the end (Adam, tuned)": _beside_adam("accuracy_end", percent),
}
"""Column -> its cell, from the rows of the default rule and of tuned Adam; empty where it was not measured."""


def ratio_cell(results: Results, problem: str, rule: str) -> str:
    """Final loss over that of the best tuned baseline."""
    return ratio_text(loss(results, problem, rule) / best_baseline(results, problem))
