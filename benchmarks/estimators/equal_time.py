"""The default's architecture meta-trained with every estimator for equal time, on four kinds of task.

    python -m benchmarks.estimators.equal_time run                   # everything that has no rows yet
    python -m benchmarks.estimators.equal_time run --tasks MNIST
    python -m benchmarks.estimators.equal_time figure

All start from the default rule, whose LSTM puts out zero, and meta-train all weights. "Constants" is ES-Single on the
rule without an LSTM, whose outputs are seven constants: what the LSTM brings is what is beyond it. Windows have 25
steps, meta-gradients are clipped to a norm of 1, and everything else is equal but the meta-learning rate: of
``RATES``, each estimator has on each kind of task the one with the best score after a pilot with a seed of its own.
Time is the processor's, of one thread, validations left out: other load slows it far less than the clock. A score is
the final loss on the validation split over the initial one, not chosen among several. Writes
results/meta_training/equal_time.csv.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from benchmarks.colours import colour
from benchmarks.results import RESULTS as ALL_RESULTS
from benchmarks.results import Row, read, save_part
from learned_optim.meta_train.benchmark.cache import Cache, default_folder
from learned_optim.meta_train.config.load import Config, config_from_tables
from learned_optim.meta_train.reports.plots import STYLE
from learned_optim.meta_train.trainer.trainer import Trainer

RESULTS = ALL_RESULTS / "meta_training"
ROWS = RESULTS / "equal_time.csv"
CONSTANTS = "constants"
NAMES = {
    "truncated-bptt": "TBPTT",
    "es": "ES",
    "reparameterization": "RP",
    "combined": "combined",
    "pes": "PES",
    "es-single": "ES-Single",
    CONSTANTS: "constants, by ES-Single",
}
"""Estimator -> its name in the figure and the table, in their order."""
BACKPROPAGATING = ("truncated-bptt", "reparameterization", "combined")
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
PILOT_SEED = 100
PILOT, WHOLE = 0.4, 1.2
"""Minutes of a run."""
VALIDATIONS = 4
"""In a whole run; a pilot has one, at its end."""
COLUMNS = ("tasks", "estimator", "minutes", "rate", "seed", "seconds", "meta_step", "score", "skipped")
KEYS = COLUMNS[:5]

SMALL = {"width": [8, 32], "batch_size": [8, 32]}
TASKS: dict[str, dict[str, Any]] = {
    "quadratics": {
        "tasks": [{"family": "quadratic"}],
        "unroll": {"horizon": [100, 100], "instances": 16},
        "validation": {"horizon": 100, "instances": 64, "solved": 1e-6},
    },
    "MNIST": {
        "tasks": [{"family": "mlp"}],  # the network of the paper of 2016, which is the family's default
        "unroll": {"horizon": [200, 200], "instances": 8},
        "validation": {"horizon": 200, "instances": 16},
    },
    "neural art": {
        "tasks": [{"family": "neural-art", "size": 32, "styles": ["starry_night", "great_wave", "shipwreck"]}],
        "unroll": {"horizon": [100, 100], "instances": 2},
        "validation": {"horizon": 100, "instances": 4, "tasks": 2},
    },
    "a mixture": {
        "tasks": [
            {"family": "mlp", "dataset": "mnist", "image_size": 8, "layers": [1, 3], "initial": "torch", **SMALL},
            {"family": "language-model", "models": ["rnn"], "length": [6, 16], **SMALL},
            {"family": "table", "batch_size": [16, 64]},
            {"family": "autoencoder", "image_size": 8, "batch_size": [16, 64]},
            {"family": "quadratic", "dimensions": [10, 100], "condition": [10.0, 1e4], "noise": 0.1},
        ],
        "unroll": {"horizon": [100, 1000], "instances": 8, "balanced": True},
        "validation": {"horizon": 400, "instances": 4},
    },
}
"""Kind of task -> what its configuration has of its own."""


def configuration(tasks: str, estimator: str, meta_rate: float, seed: int) -> Config:
    """The configuration of a meta-training, but for its time."""
    own = TASKS[tasks]
    options: dict[str, Any] = {"name": "es-single" if estimator == CONSTANTS else estimator, "meta_loss": "log-of-mean"}
    if estimator != "truncated-bptt":
        options |= {"sigma": 0.02}
    if estimator in BACKPROPAGATING:
        options |= {"replay_coordinates": 1024}
    if estimator == "combined":
        options |= {"variance_decay": 0.9}
    rule = {"settings": {"hidden_size": 0}} if estimator == CONSTANTS else {"start_from": "default"}
    return config_from_tables(
        {
            "steps": 10**9,
            "seed": seed,
            "rule": rule,
            "tasks": own["tasks"],
            "unroll": {"truncation": 25, "pool": 4, **own["unroll"]},
            "estimator": options,
            "meta_optimizer": {"lr": meta_rate, "average": 0.98, "clip_norm": 1.0},
            "validation": {"every": 10**9, "baselines": False, **own["validation"]},
        }
    )


def meta_train(tasks: str, estimator: str, minutes: float, meta_rate: float, seed: int, validations: int) -> None:
    """Meta-train for ``minutes`` of processor time, and write a row for each validation on the way."""
    config = configuration(tasks, estimator, meta_rate, seed)
    trainer = Trainer(config)
    key = (tasks, estimator, minutes, meta_rate, seed)
    rows: list[Sequence[object]] = [COLUMNS, (*key, 0.0, 0, f"{trainer.validate(trainer.averaged):.6g}", 0)]
    seconds, began = 0.0, time.process_time()
    steps = trainer.run()
    for index in range(1, validations + 1):
        while seconds + time.process_time() - began < 60 * minutes * index / validations:
            next(steps)
        seconds += time.process_time() - began
        score = trainer.validate(trainer.averaged)
        rows.append((*key, round(seconds, 1), trainer.meta_step, f"{score:.6g}", trainer.skipped))
        print(*rows[-1], flush=True)
        began = time.process_time()
    save_part(ROWS, KEYS, rows, {})


def adam(tasks: str) -> None:
    """Score of Adam at the best rate for each task of validation, which every seed draws anew."""
    rows: list[Sequence[object]] = [COLUMNS]
    for seed in SEEDS:
        trainer = Trainer(configuration(tasks, "es", RATES[0], seed))
        suite = trainer.suites[trainer.config.validation.selected]
        rows.append((tasks, "Adam", 0, "", seed, "", "", f"{suite.adam_score(Cache(default_folder())):.6g}", ""))
    save_part(ROWS, KEYS[:2], rows, {}, part=f"{tasks}, Adam")


def run(tasks: Iterable[str], estimators: Iterable[str]) -> None:
    """Tuned Adam, pilots, then whole runs at the best rates; what has rows is not run again."""
    estimators = list(estimators)
    for kind in tasks:
        if not chosen(read(ROWS), kind, "Adam"):
            adam(kind)
        for estimator in estimators:
            for rate in RATES:
                if not chosen(read(ROWS), kind, estimator, PILOT, PILOT_SEED, rate):
                    meta_train(kind, estimator, PILOT, rate, PILOT_SEED, 1)
        for seed in SEEDS:
            for estimator in estimators:
                if not chosen(read(ROWS), kind, estimator, WHOLE, seed):
                    meta_train(kind, estimator, WHOLE, best_rate(read(ROWS), kind, estimator), seed, VALIDATIONS)


def chosen(
    rows: Iterable[Row],
    tasks: str,
    estimator: str,
    minutes: float | None = None,
    seed: int | None = None,
    rate: float | None = None,
) -> list[Row]:
    """The rows of some runs; None: whatever it is."""
    return [
        row
        for row in rows
        if (row["tasks"], row["estimator"]) == (tasks, estimator)
        and (minutes is None or float(row["minutes"]) == minutes)
        and (seed is None or int(row["seed"]) == seed)
        and (rate is None or float(row["rate"]) == rate)
    ]


def best_rate(rows: Iterable[Row], tasks: str, estimator: str) -> float:
    """The rate of the pilot with the lowest score at its end."""
    ends = [row for row in chosen(rows, tasks, estimator, PILOT, PILOT_SEED) if int(row["meta_step"]) > 0]
    return float(min(ends, key=lambda row: float(row["score"]))["rate"])


def gains(rows: Sequence[Row], tasks: str, estimator: str) -> list[list[tuple[float, float]]]:
    """For each seed the minutes and the score, over that of the default rule at the start."""
    runs = []
    for seed in SEEDS:
        own = chosen(rows, tasks, estimator, WHOLE, seed)
        if own:
            start = float(own[0]["score"])
            runs.append([(float(row["seconds"]) / 60, float(row["score"]) / start) for row in own])
    return runs


def adam_ratio(rows: Sequence[Row], tasks: str) -> float:
    """Tuned Adam's score over that of the default rule, in the geometric mean over seeds."""
    starts = {row["seed"]: float(row["score"]) for row in rows if row["tasks"] == tasks and row["meta_step"] == "0"}
    own = chosen(rows, tasks, "Adam")
    return statistics.geometric_mean(float(row["score"]) / starts[row["seed"]] for row in own)


def complete(rows: Sequence[Row]) -> list[str]:
    """The kinds of task on which all runs are done."""
    return [kind for kind in TASKS if all(len(gains(rows, kind, name)) == len(SEEDS) for name in NAMES)]


def table() -> str:
    """A row for each estimator: final losses over the default's, the range over seeds in brackets."""
    rows = read(ROWS)
    kinds = complete(rows)
    lines = [["estimator", *kinds, "geometric mean", "meta-steps"], ["---"] * (len(kinds) + 3)]
    for name, title in NAMES.items():
        ends = {kind: [own[-1][1] for own in gains(rows, kind, name)] for kind in kinds}
        means = {kind: statistics.geometric_mean(each) for kind, each in ends.items()}
        cells = [f"{means[kind]:.2f} ({min(each):.2f} to {max(each):.2f})" for kind, each in ends.items()]
        taken = [max(int(row["meta_step"]) for row in chosen(rows, kind, name, WHOLE, SEEDS[0])) for kind in kinds]
        steps = f"{min(taken):,} to {max(taken):,}"
        lines.append([title, *cells, f"{statistics.geometric_mean(means.values()):.2f}", steps])
    ratios = [adam_ratio(rows, kind) for kind in kinds]
    lines.append(["tuned Adam", *(f"{each:.2f}" for each in ratios), f"{statistics.geometric_mean(ratios):.2f}", ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure() -> None:
    """Draw the scores against time, each kind of task that is complete in a panel of its own."""
    rows = read(ROWS)
    kinds = complete(rows)
    with mpl.rc_context(STYLE):
        picture = Figure(figsize=(3.6 * len(kinds), 3.4), layout="constrained")
        panels = picture.subplots(1, len(kinds), squeeze=False)
        for panel, kind in zip(panels.flat, kinds, strict=True):
            for name, title in NAMES.items():
                own = gains(rows, kind, name)
                minutes = [
                    statistics.mean(each) for each in zip(*([passed for passed, _ in one] for one in own), strict=True)
                ]
                scores = list(zip(*([score for _, score in one] for one in own), strict=True))
                middle = [math.exp(statistics.mean(map(math.log, each))) for each in scores]
                dashed = "--" if name == CONSTANTS else "-"
                panel.plot(minutes, middle, dashed, color=colour(title), label=title)
                panel.fill_between(
                    minutes,
                    *zip(*((min(each), max(each)) for each in scores), strict=True),
                    color=colour(title),
                    alpha=0.15,
                    linewidth=0,
                )
            panel.axhline(adam_ratio(rows, kind), color=colour("Adam"), linestyle=":", label="Adam, tuned")
            panel.set(xlabel="minutes of one core", ylabel="final loss over the default's", yscale="log", title=kind)
            plain = mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}")
            panel.yaxis.set_major_formatter(plain)
            panel.yaxis.set_minor_formatter(plain)
        picture.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7.5)
        picture.savefig(RESULTS / "equal_time.png", dpi=150)


def main() -> None:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "figure"])
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--estimators", nargs="+", choices=[*NAMES], default=[*NAMES])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "run":
        run(arguments.tasks, arguments.estimators)
    if complete(read(ROWS)):
        figure()


if __name__ == "__main__":
    main()
