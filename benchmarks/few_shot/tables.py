"""Tables of docs/few-shot.md, made of the rows of benchmarks/few_shot/run.py; benchmarks/tables.py writes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.few_shot.trainings import SHOTS, SINUSOID

DIVERGED = 100.0  # the mean over 600 waves: ten times that of predicting zero, and more

Rows = Sequence[Mapping[str, str]]


def sinusoid_table(rows: Rows) -> str:
    """Error after 1 and 10 steps."""
    head = "| | " + " | ".join(f"{shots} points, 1 step | 10 steps" for shots in SHOTS) + " |"
    lines = [head, "| --- |" + " --- |" * (2 * len(SHOTS))]
    cells = {(row["algorithm"], int(row["shots"]), int(row["step"])): float(row["mse"]) for row in rows}
    for name in SINUSOID:
        keys = [(name, shots, step) for shots in SHOTS for step in (1, 10)]
        values = [written(cells.get(key)) for key in keys]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def written(error: float | None) -> str:
    if error is None:
        return "not yet measured"
    return f"{error:.3g}" if error < DIVERGED else "diverges"


def omniglot_table(rows: Rows, provenance: Mapping[str, Any]) -> str:
    """Accuracy after 1 and 10 steps, batch norm transductive and not: a line for each training."""
    head = ["", "ways, shots", "meta-steps", "inner steps", "queries", "step 1", "step 10"]
    lines = [f"| {' | '.join([*head, 'step 1, not transductive', 'step 10'])} |", "| --- " * 9 + "|"]
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in ("algorithm", "ways", "shots")), []).append(row)
    for key in sorted(groups, key=in_order):
        own, details = groups[key], provenance[", ".join(key)]
        config = details["config"]
        trained = "-" if details["meta_step"] is None else f"{config['steps']:,}"
        cells = [key[0], f"{key[1]}, {key[2]}", trained, *setting(config)]
        for batch_norm in ("transductive", "not transductive"):
            steps = {row["step"]: percent(row) for row in own if row["batch_norm"] == batch_norm}
            if len(steps) == 1:  # features, and nothing to adapt
                steps = {"1": steps["0"]}
            cells += [steps.get(step, "-") for step in ("1", "10")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def setting(config: Mapping[str, Any]) -> tuple[str, str]:
    """Inner steps in meta-training and queries of each class, where the algorithm has them."""
    name = config["algorithm"]["name"]
    return (
        str(config["algorithm"]["steps"]) if name in ("maml", "fomaml", "meta-sgd", "reptile") else "-",
        str(config["task"]["options"].get("queries", 1)) if name in ("maml", "fomaml", "meta-sgd") else "-",
    )


def in_order(training: tuple[str, ...]) -> tuple[int, int, str]:
    """Ways, shots, algorithm."""
    algorithm, ways, shots = training
    return int(ways), int(shots), algorithm.replace(",", "").replace(" ", "-")


def percent(row: Mapping[str, str]) -> str:
    return f"{100 * float(row['accuracy']):.1f} ± {100 * float(row['interval_95']):.1f}"


def cost_table(rows: Rows) -> str:
    """Time relative to FOMAML's of the same network and number of steps, and memory."""
    lines = ["| | inner steps | algorithm | time / fomaml | megabytes |", "| --- | --- | --- | --- | --- |"]
    times = {(row["network"], row["inner_steps"], row["algorithm"]): float(row["milliseconds"]) for row in rows}
    for row in rows:
        network, steps, name = row["network"], row["inner_steps"], row["algorithm"]
        ratio = times[network, steps, name] / times[network, steps, "fomaml"]
        lines.append(f"| {network} | {steps} | {name} | {ratio:.2f} | {float(row['megabytes']):.0f} |")
    return "\n".join(lines)
