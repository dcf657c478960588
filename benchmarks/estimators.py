"""Bias and variance of the gradient estimators, and where truncation leads.

    python -m benchmarks.estimators influence    # influence balancing: ten seconds
    python -m benchmarks.estimators toy          # the rugged plane: three minutes
    python -m benchmarks.estimators unrolls      # bias and variance against unroll length: five minutes
    python -m benchmarks.estimators figures      # draws what the others have written

Each part writes its rows and provenance into results/estimators/; ``unrolls`` can do some lengths at a time.
"""

import argparse
import csv
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from benchmarks.toy_problems import FirstUnit, InfluenceBalancing, RateSchedule, RuggedPlane
from learned_optim.files import write_atomically
from learned_optim.meta_train.benchmark import provenance, save_rows
from learned_optim.meta_train.estimators import (
    ES,
    PES,
    Combined,
    ESSingle,
    Estimator,
    Trajectory,
    TruncatedBPTT,
    WindowShare,
)
from learned_optim.meta_train.estimators.combined import PairMoments
from learned_optim.meta_train.estimators.perturbation import PerturbationEstimator, first_copy
from learned_optim.meta_train.estimators.pes import PERTURBATION_SUM
from learned_optim.meta_train.inner.particles import ParticleRule
from learned_optim.meta_train.inner.shares import Share
from learned_optim.meta_train.inner.unroll import InnerState, start, unroll
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.reports.plots import STYLE
from learned_optim.meta_train.tasks.quadratic import QuadraticTask
from learned_optim.rules import ScaleFreeLSTM, UpdateRule

RESULTS = Path(__file__).parent / "results" / "estimators"
HORIZON = 1000
UNROLLS = (1, 3, 10, 30, 100, 300, 1000)
SIGMA = 0.1
GRADIENT_PAIRS, LOSS_PAIRS, REFERENCE_PAIRS = 64, 2048, 40_960  # what a core does in minutes

Row = tuple[str | int | float, ...]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Influence balancing


def influence() -> None:
    """Gradient descent on the meta-parameter, without resets, as in the paper: 3,000 meta-steps of rate 1e-4."""
    estimators: dict[str, tuple[Estimator, int]] = {
        "TBPTT, 1 step": (TruncatedBPTT(), 1),
        "TBPTT, 10 steps": (TruncatedBPTT(), 10),
        "ES, 1 step": (ES(sigma=0.1, pairs=500), 1),
        "PES, 1 step": (PES(sigma=0.1, pairs=500), 1),
        "ES-Single, 1 step": (ESSingle(sigma=0.1, pairs=500), 1),
    }
    rows: list[Row] = [("estimator", "meta_step", "weight", "loss_after_500_steps")]
    free, slopes = (values[-1] for values in InfluenceBalancing().expected_first_unit(500))
    for name, (estimator, window) in estimators.items():
        rule, task, random = InfluenceBalancing(), VectorizedTask(FirstUnit(), 1, seed=0), generator(0)
        state = estimator.start(rule, task, start(rule, task, random), random)
        for meta_step in range(3001):
            weight = float(rule.weight.detach())
            if meta_step % 30 == 0:
                rows.append((name, meta_step, weight, float(0.5 * (free + weight * slopes - 1) ** 2)))
            estimate = estimator.window(rule, task, state, window, random)
            state = estimate.state
            with torch.no_grad():
                rule.weight.sub_(1e-4 * estimate.grads[0])
        print(*rows[-1])
    write("influence", rows, {"sigma": 0.1, "pairs": 500, "meta_lr": 1e-4})


# The rugged plane


def toy() -> None:
    """Adam 0.01 on the schedule; horizon 100, windows of 10, all particles reset together."""
    meta_steps, window, pairs = 3000, 10, 50
    estimators: dict[str, Estimator] = {
        "TBPTT": TruncatedBPTT(second_derivatives=True),
        "ES": ES(sigma=1.0, pairs=pairs),
        "PES": PES(sigma=0.3, pairs=pairs),
        "ES-Single": ESSingle(sigma=0.3, pairs=pairs),
    }
    rows: list[Row] = [("estimator", "meta_step", "log_first_rate", "log_last_rate", "sum_of_losses")]
    task = VectorizedTask(RuggedPlane(), 1, seed=0)
    for name, estimator in estimators.items():
        rule, random = RateSchedule(), generator(0)
        adam = torch.optim.Adam(rule.parameters(), lr=0.01, betas=(0.99, 0.999))
        path = []
        for meta_step in range(meta_steps + 1):
            if meta_step % (rule.horizon // window) == 0:
                state = estimator.start(rule, task, start(rule, task, random), random)
            if meta_step % 20 == 0:
                path.append(rule.weights.detach().clone())
            estimate = estimator.window(rule, task, state, window, random)
            state = estimate.state
            rule.weights.grad = window * estimate.grads[0]  # of the sum, as in the paper; Adam hardly minds
            adam.step()
        sums = schedule_losses(rule, task, torch.stack(path))
        rows += [
            (name, 20 * index, float(weights[0]), float(weights[1]), float(total))
            for index, (weights, total) in enumerate(zip(path, sums, strict=True))
        ]
        print(*rows[-1])
    write("toy", rows, {"horizon": 100, "window": window, "pairs": pairs, "meta_lr": 0.01})

    first, last = torch.meshgrid(torch.linspace(-8, 5, 80), torch.linspace(-8, 5, 80), indexing="ij")
    sums = schedule_losses(rule, task, torch.stack([first.flatten(), last.flatten()], 1))
    grid = zip(first.flatten().tolist(), last.flatten().tolist(), sums.tolist(), strict=True)
    write("toy-surface", [("log_first_rate", "log_last_rate", "sum_of_losses"), *grid], {})


@torch.no_grad()
def schedule_losses(rule: RateSchedule, task: VectorizedTask, weights: Tensor) -> Tensor:
    """Sum of the losses over a whole inner training for each row of ``weights``."""
    inner = start(rule, task, generator(0))
    count = len(weights)
    expanded = inner._replace(
        parameters=inner.parameters.expand(count, 1, -1),
        grad=inner.grad.expand(count, 1, -1),
        initial_loss=inner.initial_loss.expand(count, 1),
    )
    return unroll(ParticleRule(rule, weights), task, expanded, rule.horizon, generator(0)).losses.sum((0, 2))


# Bias and variance against the length of the unroll


def small_rule() -> UpdateRule:
    """An LSTM of two units with large steps, at random weights: inner training is chaotic in the long run."""
    rule = ScaleFreeLSTM(2, momentum_decays=(0.9,), rate=1.0)
    random = generator(5)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    return rule


def quadratic() -> VectorizedTask:
    """One noiseless quadratic: what varies are the perturbations alone."""
    return VectorizedTask(QuadraticTask(10, 100.0, 0.0, 1.0), 1, seed=0)


def unrolls(lengths: Sequence[int]) -> None:
    """Gradient of the mean loss over 1,000 steps: mean over its windows, one sample a pair."""
    rule, task = small_rule(), quadratic()
    inner = start(rule, task, generator(0))
    path = RESULTS / "reference.json"
    if path.exists():
        saved = json.loads(path.read_text())
        reference, noise = torch.tensor(saved["gradient"]), saved["squared_standard_error"]
    else:
        began = time.perf_counter()
        samples = torch.cat([es_samples(rule, task, inner, seed) for seed in range(REFERENCE_PAIRS // LOSS_PAIRS)])
        reference, noise = samples.mean(0), float(samples.var(0).sum()) / len(samples)
        details = {"gradient": reference.tolist(), "squared_standard_error": noise, "pairs": len(samples)}
        write_atomically(path, json.dumps({**details, **provenance()}) + "\n")
        print(f"reference in {time.perf_counter() - began:.0f} s: norm {reference.norm():.4f}, error {noise**0.5:.4f}")
    for length in lengths:
        rows: list[Row] = [
            ("estimator", "unroll", "pairs", "variance_of_a_pair", "relative_bias", "relative_standard_error")
        ]
        weight_rows: list[Row] = [("weights", "unroll", "mean", "low", "high")]
        began = time.perf_counter()
        for name, samples in all_samples(rule, task, inner, length, weight_rows).items():
            if not bool(samples.isfinite().all()):  # exploded beyond float32
                rows.append((name, length, len(samples), math.inf, math.inf, math.inf))
                continue
            variance = float(samples.var(0).sum()) if len(samples) > 1 else 0.0
            error = noise + variance / len(samples)
            bias = float((samples.mean(0) - reference).norm()) / float(reference.norm())
            relative_variance = variance / float(reference.norm()) ** 2
            rows.append((name, length, len(samples), relative_variance, bias, error**0.5 / float(reference.norm())))
            print(*rows[-1])
        settings = {"sigma": SIGMA, "horizon": HORIZON, "seconds": time.perf_counter() - began}
        write(f"unrolls-{length}", rows, settings)
        write(f"weights-{length}", weight_rows, settings)


def es_samples(rule: UpdateRule, task: VectorizedTask, inner: InnerState, seed: int) -> Tensor:
    """Full-unroll ES, ``(pairs, M)``."""
    return loss_samples(ESSingle(SIGMA, LOSS_PAIRS), rule, task, inner, HORIZON, 1000 + seed)


@torch.no_grad()
def loss_samples(
    estimator: PerturbationEstimator, rule: UpdateRule, task: VectorizedTask, inner: InnerState, length: int, seed: int
) -> Tensor:
    """Of ES, PES and ES-Single: what each pair contributes to the mean over windows, ``(pairs, M)``."""
    random = generator(seed)
    seen: dict[str, Tensor] = {}
    slopes, perturbations = estimator.slopes, estimator.perturbations

    def recorded_slopes(meta_losses: Tensor) -> Tensor:
        seen["slopes"] = slopes(meta_losses)
        return seen["slopes"]

    def recorded_perturbations(*arguments: Any) -> Tensor:
        seen["noise"] = perturbations(*arguments)
        return seen["noise"]

    object.__setattr__(estimator, "slopes", recorded_slopes)  # its options are frozen
    object.__setattr__(estimator, "perturbations", recorded_perturbations)
    state = estimator.start(rule, task, inner, random)
    total: Tensor = torch.zeros(())
    for steps in windows_of(length):
        state = estimator.window(rule, task, state, steps, random).state
        credited = state.memory.get(PERTURBATION_SUM, seen["noise"])
        total = total + steps / HORIZON * seen["slopes"][:, None] * credited
    return total


def windows_of(length: int) -> list[int]:
    """Lengths of the windows of a horizon; the last may be shorter."""
    return [min(length, HORIZON - begun) for begun in range(0, HORIZON, length)]


def all_samples(
    rule: UpdateRule, task: VectorizedTask, inner: InnerState, length: int, weight_rows: list[Row]
) -> dict[str, Tensor]:
    """Samples ``(pairs, M)`` of every estimator; one of TBPTT, which has no perturbations."""
    results: dict[str, Tensor] = {}
    bptt, state = TruncatedBPTT(second_derivatives=True), Trajectory(inner, {})
    total = torch.zeros(())
    for steps in windows_of(length):
        estimate = bptt.window(rule, task, state, steps, generator(0))
        state = estimate.state
        total = total + steps / HORIZON * parameters_to_vector(estimate.grads)
    results["TBPTT"] = total[None]

    combined = Combined(SIGMA, GRADIENT_PAIRS, second_derivatives=True)
    paper = Combined(SIGMA, GRADIENT_PAIRS, second_derivatives=True, covariance=False)
    random, state = generator(1), Trajectory(inner, {})
    sums = {name: torch.zeros(()) for name in ("RP", "combined", "combined, paper's weights")}
    weights = []
    for steps in windows_of(length):
        share = Share.whole(combined.pieces(task.instances))
        directions = combined.directions(rule, share.pieces, state.memory, random)
        window = WindowShare(task, state.inner, steps, random, share)
        pairs = combined.pair_gradients(rule, window, directions)
        es, rp = combined.slopes(pairs.meta_losses)[:, None] * directions.noise, pairs.grads
        moments = PairMoments.of(es, rp)
        weight, paper_weight = combined.es_weight(moments, {}), paper.es_weight(moments, {})
        parts = (rp, *(torch.where(w == 1, es, w * es + (1 - w) * rp) for w in (weight, paper_weight)))
        sums = {name: sums[name] + steps / HORIZON * part.double() for name, part in zip(sums, parts, strict=True)}
        weights.append(torch.stack([weight, paper_weight]))
        state = Trajectory(first_copy(pairs.unrolled, 1)[0], {})
    results |= sums
    for name, values in zip(("with covariance", "paper's"), torch.stack(weights).mean(0), strict=True):
        quantiles = values.quantile(torch.tensor([0.1, 0.9])).tolist()
        weight_rows.append((name, length, float(values.mean()), *quantiles))
    results["ES"] = loss_samples(ES(SIGMA, LOSS_PAIRS), rule, task, inner, length, 2)
    results["PES"] = loss_samples(PES(SIGMA, LOSS_PAIRS), rule, task, inner, length, 3)
    results["ES-Single"] = loss_samples(ESSingle(SIGMA, LOSS_PAIRS), rule, task, inner, length, 4)
    return results


# Files and figures


def write(name: str, rows: Sequence[Row], settings: Mapping[str, Any]) -> None:
    save_rows(RESULTS, name, rows, settings)


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def columns(rows: Sequence[Mapping[str, str]], key: str, value: str, *names: str) -> list[list[float]]:
    chosen = [row for row in rows if row[key] == value]
    return [[float(row[name]) for row in chosen] for name in names]


COLOURS = {
    "TBPTT": "#8c8c8c",
    "ES": "#4c72b0",
    "RP": "#dd8452",
    "combined": "#c44e52",
    "combined, paper's weights": "#937860",
    "PES": "#55a868",
    "ES-Single": "#8172b3",
}


def colour(name: str) -> str:
    return COLOURS[name.split(", ")[0] if name not in COLOURS else name]


def figures() -> None:
    with mpl.rc_context(STYLE):
        draw_influence()
        draw_toy()
        draw_unrolls()


def save(figure: Figure, name: str) -> None:
    figure.savefig(RESULTS / f"{name}.png", dpi=130)


def draw_influence() -> None:
    rows = read("influence")
    figure = Figure(figsize=(8.4, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row["estimator"] for row in rows):
        steps, weights, losses = columns(rows, "estimator", name, "meta_step", "weight", "loss_after_500_steps")
        style = "--" if name in ("TBPTT, 10 steps", "ES, 1 step") else "-"
        for panel, values in ((left, losses), (right, weights)):
            panel.plot(steps, values, style, color=colour(name), label=name)
    left.set(xlabel="meta-step", ylabel="loss after 500 steps", yscale="log", title="Influence balancing")
    right.axhline(-1 / 6, color="black", linewidth=0.8, linestyle=":")
    right.annotate("optimum", (2400, -1 / 6), xytext=(0, 4), textcoords="offset points", fontsize=8)
    right.set(xlabel="meta-step", ylabel="meta-parameter", ylim=(-0.5, 3))
    right.legend(*left.get_legend_handles_labels(), fontsize=7.5, loc="lower right", bbox_to_anchor=(1.0, 0.17))
    save(figure, "influence")


def draw_toy() -> None:
    rows, surface = read("toy"), read("toy-surface")
    figure = Figure(figsize=(8.4, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    size = math.isqrt(len(surface))
    first, last, sums = (
        torch.tensor([float(row[name]) for row in surface]).view(size, size)
        for name in ("log_first_rate", "log_last_rate", "sum_of_losses")
    )
    image = left.pcolormesh(
        first.numpy(), last.numpy(), sums.numpy(), cmap="Greys", vmin=float(sums.min()), vmax=3000, rasterized=True
    )
    left.grid(visible=False)
    figure.colorbar(image, ax=left, label="sum of losses", extend="max")
    for name in dict.fromkeys(row["estimator"] for row in rows):
        names = ("meta_step", "log_first_rate", "log_last_rate", "sum_of_losses")
        steps, firsts, lasts, losses = columns(rows, "estimator", name, *names)
        left.plot(firsts, lasts, color=colour(name), linewidth=1.6, label=name)
        left.plot(firsts[-1:], lasts[-1:], "o", color=colour(name), markersize=4)
        right.plot(steps, losses, color=colour(name), label=name)
    left.set(xlabel="log of the first rate", ylabel="log of the last rate", title="Rate schedule on a rugged plane")
    right.set(xlabel="meta-step", ylabel="sum of losses over 100 steps")
    right.legend(fontsize=7.5)
    save(figure, "toy")


def draw_unrolls() -> None:
    done = [length for length in UNROLLS if (RESULTS / f"unrolls-{length}.csv").exists()]
    rows = [row for length in done for row in read(f"unrolls-{length}")]
    weights = [row for length in done for row in read(f"weights-{length}")]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name in COLOURS:
        names = ("unroll", "variance_of_a_pair", "relative_bias", "relative_standard_error")
        lengths, variances, biases, errors = columns(rows, "estimator", name, *names)
        if name != "TBPTT":
            left.plot(lengths, variances, "o-", markersize=3, color=COLOURS[name], label=name)
        if name != "combined, paper's weights":
            middle.plot(lengths, biases, "o-", markersize=3, color=COLOURS[name], label=name)
            middle.plot(lengths, errors, ":", linewidth=1.2, color=COLOURS[name])
    left.set(xscale="log", yscale="log", ylim=(1e-3, 1e7), xlabel="unroll length", title="Variance of one pair")
    left.set_ylabel("over the squared norm of the gradient")
    left.legend(fontsize=7)
    middle.set(
        xscale="log",
        yscale="log",
        ylim=(0.08, 30),
        xlabel="unroll length",
        title="Distance of the mean (dotted: its noise)",
    )
    middle.set_ylabel("from the reference, over its norm")
    middle.legend(fontsize=7, loc="upper right", ncols=2)
    for name, estimator in (("with covariance", "combined"), ("paper's", "combined, paper's weights")):
        lengths, means, lows, highs = columns(weights, "weights", name, "unroll", "mean", "low", "high")
        right.plot(lengths, means, "o-", markersize=3, color=COLOURS[estimator], label=name)
        right.fill_between(lengths, lows, highs, alpha=0.2, linewidth=0, color=COLOURS[estimator])
    right.set(xscale="log", xlabel="unroll length", ylabel="weight of ES (mean, 10-90%)", title="Combination")
    right.legend(fontsize=7)
    save(figure, "unrolls")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["influence", "toy", "unrolls", "figures"])
    parser.add_argument("--lengths", type=int, nargs="*", default=UNROLLS, help="of unrolls; none: the reference")
    arguments = parser.parse_args()
    match arguments.part:
        case "influence":
            influence()
        case "toy":
            toy()
        case "unrolls":
            unrolls(arguments.lengths)
        case _:
            figures()


if __name__ == "__main__":
    main()
