"""The experiment of Metz et al. 2019 at the size of one core: rules for a small convolutional network, two meta-losses.

    python -m benchmarks.suites.metz_2019 train      # meta-trains both rules; goes on where it stopped
    python -m benchmarks.suites.metz_2019 evaluate   # tunes the baselines, takes all through the same runs: ten minutes
    python -m benchmarks.suites.metz_2019 time       # milliseconds a step, on the real module: on a quiet machine
    python -m benchmarks.suites.metz_2019 plot       # the figure of what the others have written

Networks are trained on 400 images of a split, as many as in meta-training, and tested on the rest of it. Rates are
tuned on validation images, everything is compared on test images, which have not been used for anything else.
"""

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.results import COMPARISON, TUNING, Row, read, replaced, save_provenance, write
from benchmarks.results import RESULTS as ALL_RESULTS
from learned_optim import LearnedOptimizer, cli
from learned_optim.meta_train.benchmark.evaluation import BASELINES as TORCH_OPTIMIZERS
from learned_optim.meta_train.benchmark.evaluation import LADDER, RATES, MakeOptimizer, mean_and_band, train
from learned_optim.meta_train.benchmark.harness import COMPARISON_SEED, TUNING_SEED
from learned_optim.meta_train.benchmark.report import EDGE_MARK
from learned_optim.meta_train.common.seeds import derive_seed, numpy_generator, torch_generator
from learned_optim.meta_train.config.load import load_config
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.reports.plots import LEARNED_COLOURS, STYLE, colour_of, legend_above
from learned_optim.meta_train.tasks import ConvNetFamily, DataTask, Split

RESULTS = ALL_RESULTS / "metz_2019"
RUNS = Path("runs")
CONFIGS = {"metz-train": "mlp, training loss", "metz-validation": "mlp, validation loss"}
"""Configuration -> the rule's name in table and figure."""

EXAMPLES = 400  # images to train on, as in meta-training: a fifth of 500 is held out
STEPS = 1000  # twice the horizon of meta-training
RECORD = 20  # steps between two records
SEEDS, TUNING_SEEDS = 8, 4
ROUNDS = 200  # steps timed of each optimizer

METZ_BASELINES: dict[str, Callable[[Iterable[Tensor], float, int], Optimizer]] = {
    "Adam": TORCH_OPTIMIZERS["Adam"],
    "RMSprop": TORCH_OPTIMIZERS["RMSprop"],
    "momentum": TORCH_OPTIMIZERS["Momentum"],
}
CONTENDER_NAMES = {"momentum": "Momentum"}
"""Name here -> name elsewhere, by which a contender has its colour."""
MEASURES = ("training", "test")
TIMES = ("milliseconds_per_step", "of_which_optimizer")


def at_rate(name: str, rate: float) -> MakeOptimizer:
    """A baseline with its rate."""
    return lambda parameters: METZ_BASELINES[name](parameters, rate, STEPS)


def learned(rule: str) -> MakeOptimizer:
    """A rule, which has none."""
    return lambda parameters: LearnedOptimizer(parameters, rule)


class Losses(NamedTuple):
    """The losses of one optimizer: records ``(records, seeds)`` at steps 0, RECORD, 2 RECORD ..."""

    training: np.ndarray
    """Mean loss on the batches since the last record."""
    test: np.ndarray
    """Loss on all test images."""

    def final(self, measure: str) -> np.ndarray:
        """Mean of the last tenth of the records, ``(seeds,)``."""
        records: np.ndarray = getattr(self, measure)
        last: np.ndarray = records[-max(1, (len(records) - 1) // 10) :]
        return np.asarray(last.mean(0))


class ImageProblem:
    """The network of the configurations on images that they have not seen."""

    def __init__(self, split: Split, seeds: int, seed: int, steps: int) -> None:
        self.seed, self.steps = seed, steps
        family = load_config("metz-train").tasks[0].build()
        assert isinstance(family, ConvNetFamily)  # for the type checker
        everything = dataclasses.replace(family, examples=None).sample(numpy_generator(seed, "metz task"), split)
        assert isinstance(everything, DataTask)
        self.inner = copy.copy(everything)
        self.inner.data = tuple(tensor[:EXAMPLES] for tensor in everything.data)
        self.task = VectorizedTask(self.inner, seeds, derive_seed(seed, "metz instances"))
        self.test_batch = tuple(tensor[EXAMPLES:].expand(seeds, -1, *tensor.shape[1:]) for tensor in everything.data)

    def run(self, make_optimizer: MakeOptimizer, *, by_tensor: bool = False) -> Losses:
        """Train all seeds; see :func:`~learned_optim.meta_train.benchmark.evaluation.train`."""
        test: list[Tensor] = []

        def observed(parameters: Iterable[Tensor]) -> Optimizer:
            tensors = list(parameters)
            optimizer, steps = make_optimizer(tensors), 0

            def record(*_: object) -> None:
                nonlocal steps
                if steps % RECORD == 0:
                    matrix = torch.cat([tensor.detach().flatten() for tensor in tensors]).view(self.task.instances, -1)
                    with torch.no_grad():
                        test.append(self.task.losses(matrix, self.test_batch))
                steps += 1

            record()
            optimizer.register_step_post_hook(record)
            return optimizer

        generator = torch_generator(self.seed, "metz batches")
        losses = train(self.task, observed, self.steps, generator, by_tensor=by_tensor)
        training = np.stack([losses[0], *losses[1:].reshape(-1, RECORD, losses.shape[1]).mean(1)])
        return Losses(training, torch.stack(test).nan_to_num(torch.inf).double().numpy())


# Meta-training


def meta_train(names: Iterable[str]) -> None:
    """Begin each run, or go on with it."""
    for name in names:
        folder = RUNS / name
        arguments = ["--resume", str(folder)] if folder.exists() else [name, "--output", str(folder)]
        if status := cli.main(["meta-train", *arguments]):
            raise SystemExit(status)


# Evaluation


def tune() -> None:
    """Final losses of every baseline at every rate; what ``tuning.csv`` has already is not run again."""
    problem = ImageProblem("validation", TUNING_SEEDS, TUNING_SEED, STEPS)
    scores = tuning_scores()
    for name in METZ_BASELINES:
        rates = list(RATES)
        while rates:
            for rate in rates:
                if (name, rate) not in scores:
                    losses = problem.run(at_rate(name, rate))
                    scores[name, rate] = {measure: float(losses.final(measure).mean()) for measure in MEASURES}
                    save_tuning(scores)
                    print(name, rate, scores[name, rate])
            highest = max(rate for optimizer, rate in scores if optimizer == name)
            extend = any(best_rate(scores, name, measure)[0] == highest for measure in MEASURES)
            rates = [rate for rate in LADDER if rate > highest][:1] if extend else []


Scores = dict[tuple[str, float], dict[str, float]]
"""(optimizer, rate) -> measure -> mean final loss on the tuning seeds."""


def tuning_scores() -> Scores:
    return {
        (row["optimizer"], float(row["rate"])): {measure: float(row[f"{measure}_loss"]) for measure in MEASURES}
        for row in summary(TUNING)
    }


def save_tuning(scores: Scores) -> None:
    rows = [
        {"optimizer": name, "rate": f"{rate:g}", **{f"{each}_loss": f"{values[each]:.6g}" for each in MEASURES}}
        for (name, rate), values in scores.items()
    ]
    save_summary(TUNING, rows)
    save_provenance(RESULTS / "provenance.json", "tuning", {"steps": STEPS, "seeds": TUNING_SEEDS})


def summary(phase: str) -> list[Row]:
    """Rows of ``summary.csv``: of the comparison, or rates that were tried."""
    return [row for row in read(RESULTS / "summary.csv") if row["phase"] == phase]


def save_summary(phase: str, rows: Iterable[Row]) -> None:
    """Write the rows of a phase in the place of earlier ones, those of the comparison first."""
    phases = {each: summary(each) for each in (COMPARISON, TUNING)} | {phase: list(rows)}
    write(RESULTS / "summary.csv", [{**row, "phase": each} for each, found in phases.items() for row in found])


def best_rate(scores: Scores, name: str, measure: str) -> tuple[float, bool]:
    """The rate of the lowest final loss, and whether it lies at an edge of those tried."""
    own = {rate: values[measure] for (optimizer, rate), values in scores.items() if optimizer == name}
    best = min(own, key=lambda rate: (own[rate], rate))
    return best, best in (min(own), max(own))


def evaluate(rules: Mapping[str, str]) -> None:
    """Every baseline at its best rate for either measure, and the rules, on the same test problem."""
    tune()
    scores = tuning_scores()
    problem = ImageProblem("test", SEEDS, COMPARISON_SEED, STEPS)
    candidates: list[tuple[str, str, str, str, MakeOptimizer]] = []
    for name in METZ_BASELINES:
        for measure in MEASURES:
            rate, edge = best_rate(scores, name, measure)
            candidates.append((name, measure, f"{rate:g}", EDGE_MARK if edge else "", at_rate(name, rate)))
    candidates += [(name, "", "", "", learned(rule)) for name, rule in rules.items()]

    columns = [f"{measure}_{column}" for measure in MEASURES for column in ("loss", "low", "high")]
    known = {row["optimizer"]: {column: row.get(column, "") for column in TIMES} for row in summary(COMPARISON)}
    rows: list[Row] = []
    curves: list[Row] = []
    for name, tuned_for, shown_rate, mark, build in candidates:
        losses = problem.run(build, by_tensor=name in rules)
        bands = [mean_and_band(getattr(losses, measure)) for measure in MEASURES]
        finals = [value for measure in MEASURES for value in mean_and_band(losses.final(measure)[None])]
        key = {"optimizer": name, "tuned_for": tuned_for}
        numbers = dict(zip(columns, (f"{float(value[0]):.6g}" for value in finals), strict=True))
        rows.append({"phase": COMPARISON, **key, "rate": shown_rate, "edge": mark, **numbers})
        rows[-1] = {**rows[-1], **known.get(name, {})}  # times of an earlier day
        for record, values in enumerate(np.concatenate(bands).T):
            points = dict(zip(columns, (f"{value:.6g}" for value in values), strict=True))
            curves.append({**key, "step": str(record * RECORD), **points})
        print(*rows[-1].values())
    save_summary(COMPARISON, rows)
    write(RESULTS / "curves.csv", curves)
    details = {"steps": STEPS, "seeds": SEEDS, "rules": dict(rules)}
    save_provenance(RESULTS / "provenance.json", "summary and curves", details)


# Time


def step_times(rules: Mapping[str, str]) -> None:
    """Median milliseconds of a whole training step and of the optimizer's part, on the real module; one thread."""
    torch.set_num_threads(1)
    problem = ImageProblem("test", 1, COMPARISON_SEED, 0)
    makers = {name: at_rate(name, 1e-3) for name in METZ_BASELINES}
    makers |= {name: learned(rule) for name, rule in rules.items()}
    modules = {name: problem.inner.module() for name in makers}
    optimizers = {name: make(modules[name].parameters()) for name, make in makers.items()}
    steps: dict[str, list[float]] = {name: [] for name in makers}
    parts: dict[str, list[float]] = {name: [] for name in makers}
    generator = torch_generator(0, "metz time")
    for _ in range(ROUNDS + 10):  # in turn, so that a disturbance hits all alike; the first ones warm up
        batch = tuple(tensor[0] for tensor in problem.inner.batch(1, generator))
        for name, optimizer in optimizers.items():
            began = time.perf_counter()
            optimizer.zero_grad()
            problem.inner.loss(modules[name], batch).backward()
            middle = time.perf_counter()
            optimizer.step()
            ended = time.perf_counter()
            steps[name].append(1e3 * (ended - began))
            parts[name].append(1e3 * (ended - middle))
    medians = {name: [f"{statistics.median(each[name][10:]):.4f}" for each in (steps, parts)] for name in makers}
    for name, values in medians.items():
        print(name, *values)
    known = [row for row in summary(COMPARISON) if row["optimizer"] in medians]
    timed = [{**row, **dict(zip(TIMES, medians[row["optimizer"]], strict=True))} for row in known]
    save_summary(COMPARISON, replaced(summary(COMPARISON), timed, ("optimizer", "tuned_for")))
    save_provenance(RESULTS / "provenance.json", "step time", {"rounds": ROUNDS})


# Table and figure


def plot() -> None:
    """Draw ``curves.png``; against seconds too, where steps have been timed."""
    times = {row["optimizer"]: row.get(TIMES[0]) for row in summary(COMPARISON)}
    milliseconds = {name: float(value) for name, value in times.items() if value}
    timed = bool(times) and len(milliseconds) == len(times)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 6.4) if timed else (5.0, 6.4), layout="constrained")
        panels = figure.subplots(2, 2 if timed else 1, squeeze=False)
        for row, measure in zip(panels, MEASURES, strict=True):
            draw(row[0], measure, None)
            if timed:
                draw(row[1], measure, milliseconds)
        legend_above(figure)
        figure.savefig(RESULTS / "curves.png", dpi=130)


def table() -> str:
    """Final losses with their bands, best test loss first."""
    lines = [
        "| optimizer | rate tuned for | rate | training loss | test loss |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in sorted(summary(COMPARISON), key=lambda row: float(row["test_loss"])):
        cells = []
        for measure in MEASURES:
            loss, low, high = (f"{float(row[f'{measure}_{column}']):.3f}" for column in ("loss", "low", "high"))
            cells.append(f"{loss} ({low} to {high})")
        tuned, mark = row["tuned_for"] or "none to tune", row["edge"].replace("*", r"\*")
        lines.append(f"| {row['optimizer']} | {tuned} | {row['rate']}{mark} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def draw(panel: Axes, measure: str, milliseconds: Mapping[str, float] | None) -> None:
    """One measure against steps, or seconds; baselines at the rate that was tuned for it."""
    curves: dict[str, list[Row]] = {}
    for row in read(RESULTS / "curves.csv"):
        if row["tuned_for"] in (measure, ""):
            curves.setdefault(row["optimizer"], []).append(row)
    others = iter(LEARNED_COLOURS * len(curves))
    for name, rows in curves.items():
        own = colour_of(CONTENDER_NAMES.get(name, name)) or next(others)
        steps, mean, low, high = (
            np.array([float(row[column]) for row in rows])
            for column in ("step", f"{measure}_loss", f"{measure}_low", f"{measure}_high")
        )
        position = steps if milliseconds is None else steps * milliseconds[name] / 1e3
        panel.plot(position, mean, color=own, linewidth=1.2 if name in METZ_BASELINES else 2.0, label=name)
        panel.fill_between(position, low, high, color=own, alpha=0.2, linewidth=0)
    start = max(float(rows[0][f"{measure}_loss"]) for rows in curves.values())
    panel.set_ylim(top=1.1 * start)  # overfitting runs away
    panel.set(xlabel="step" if milliseconds is None else "seconds", ylabel=f"{measure} loss (nats)", xlim=(0, None))


def main() -> None:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("train", "evaluate", "time", "plot"))
    parser.add_argument("--only", choices=tuple(CONFIGS), help="meta-train this one alone")
    arguments = parser.parse_args()
    rules = {title: str(RUNS / name / "latest.safetensors") for name, title in CONFIGS.items()} | {"default": "default"}
    match arguments.part:
        case "train":
            meta_train([arguments.only] if arguments.only else CONFIGS)
        case "evaluate":
            evaluate(rules)
        case "time":
            step_times(rules)
        case _:
            plot()


if __name__ == "__main__":
    main()
