"""The cost of second derivatives: time and memory of a meta-gradient against the number of inner steps."""

import multiprocessing
import os
import statistics
import time
from pathlib import Path

import torch

from benchmarks.results import save_rows
from learned_optim.meta_train.few_shot.algorithms import FOMAML, MAML, Algorithm, Reptile
from learned_optim.meta_train.few_shot.episodes import Episodes
from learned_optim.meta_train.few_shot.inner import SGD
from learned_optim.meta_train.few_shot.learner import Learner
from learned_optim.meta_train.few_shot.omniglot import IMAGE_SIZE, Omniglot

STEPS = (1, 5, 10)
ROUNDS = 7
TASKS = 8
LEARNERS = ("mlp", "conv")
GRADIENT_KINDS = ("maml", "maml, weights formed", "fomaml", "fomaml, weights formed", "reptile")


def cost(folder: Path) -> None:
    """Medians of rounds in which all variants take turns; memory of each in a process of its own."""
    load = os.getloadavg()[0]
    rows: list[tuple[str | int | float, ...]] = [("network", "inner_steps", "algorithm", "milliseconds", "megabytes")]
    for network in LEARNERS:
        for steps in STEPS:
            kinds = [kind for kind in GRADIENT_KINDS if network == "mlp" or "formed" not in kind]
            seconds = times(network, steps, kinds)
            for kind in kinds:
                row = (network, steps, kind, 1e3 * seconds[kind], memory(network, steps, kind))
                rows.append(row)
                print("{:5} {:3} steps  {:24} {:8.1f} ms {:8.1f} MB".format(*row))
    save_rows(folder, "cost", rows, {"load_before": load, "rounds": ROUNDS, "tasks": TASKS})


def times(network: str, steps: int, kinds: list[str]) -> dict[str, float]:
    learner, episodes = problem(network)
    algorithms = {kind: algorithm(kind, learner, steps) for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS + 1):
        for kind in kinds:
            began = time.perf_counter()
            meta_gradient(algorithms[kind], learner, episodes)
            seconds[kind].append(time.perf_counter() - began)
    return {kind: statistics.median(values[1:]) for kind, values in seconds.items()}  # the first round warms up


def memory(network: str, steps: int, kind: str) -> float:
    """Megabytes by which a meta-gradient raises the peak of a fresh process, after one of a single task."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (network, steps, kind))


def _memory(network: str, steps: int, kind: str) -> float:
    torch.set_num_threads(1)
    learner, episodes = problem(network)
    chosen = algorithm(kind, learner, steps)
    (inputs, targets), (queries, labels) = episodes.support, episodes.query
    first = Episodes((inputs[:1], targets[:1]), (queries[:1], labels[:1]))
    meta_gradient(chosen, learner, first)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = peak()
    meta_gradient(chosen, learner, episodes)
    return peak() - before


def peak() -> float:
    """Megabytes of this process at its peak (ru_maxrss would count its parent's as well)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def problem(network: str) -> tuple[Learner, Episodes]:
    """5-way 1-shot on random images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).expand(TASKS, 5)

    def examples() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(TASKS, 5, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator), labels

    learner = Learner(Omniglot(network="mlp" if network == "mlp" else "conv"), 0)
    return learner, Episodes(examples(), examples())


def algorithm(kind: str, learner: Learner, steps: int) -> Algorithm:
    if kind == "reptile":
        return Reptile(learner.fresh_parameters, SGD(0.1), steps)
    chosen = (MAML if kind.startswith("maml") else FOMAML)(learner.fresh_parameters, SGD(0.1), steps)
    chosen.low_rank = False if "formed" in kind else None
    return chosen


def meta_gradient(chosen: Algorithm, learner: Learner, episodes: Episodes) -> None:
    chosen.meta_gradient(learner, episodes, torch.Generator().manual_seed(0))
