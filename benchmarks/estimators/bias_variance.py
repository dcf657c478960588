"""Bias and variance of the gradient estimators, and where truncation leads.

    python -m benchmarks.estimators.bias_variance influence    # influence balancing: ten seconds
    python -m benchmarks.estimators.bias_variance toy          # the rugged plane: three minutes
    python -m benchmarks.estimators.bias_variance unrolls      # bias and variance against unroll length: five minutes
    python -m benchmarks.estimators.bias_variance figures      # draws what the others have written

Each part writes its rows and provenance into results/estimators/, of ``toy`` those of the plane as a grid;
``unrolls`` can do some lengths at a time.
"""

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from benchmarks.estimators import figures
from benchmarks.estimators.toy_problems import FirstUnit, InfluenceBalancing, RateSchedule, RuggedPlane
from benchmarks.results import RESULTS as ALL_RESULTS
from benchmarks.results import read_parts, save_part, save_provenance, save_rows, write
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
from learned_optim.meta_train.tasks.quadratic import QuadraticTask
from learned_optim.rules import ScaleFreeLSTM, UpdateRule

RESULTS = ALL_RESULTS / "estimators"
REFERENCE = "reference"
"""Part of unrolls.json: the gradient that is held to be the true one."""
HORIZON = 1000
TOY_META_STEPS = 3000
UNROLLS = (1, 3, 10, 30, 100, 300, 1000)
SIGMA = 0.1
GRADIENT_PAIRS, LOSS_PAIRS, REFERENCE_PAIRS = 64, 2048, 40_960  # what a core does in minutes

Row = tuple[str | int | float, ...]
ERRORS = ("variance_of_a_pair", "relative_bias", "relative_standard_error")
ES_WEIGHTS = ("es_weight_mean", "es_weight_low", "es_weight_high")
"""Columns for combinations: mean of the weight of ES over meta-parameters, and the quantiles of 10 and 90%."""
UNROLL_COLUMNS: Row = ("estimator", "unroll", "pairs", *ERRORS, *ES_WEIGHTS)


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
    save_rows(RESULTS, "influence", rows, {"sigma": 0.1, "pairs": 500, "meta_lr": 1e-4})


# The rugged plane


def toy() -> None:
    """Adam 0.01 on the schedule; horizon 100, windows of 10, all particles reset together."""
    window, pairs = 10, 50
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
        for meta_step in range(TOY_META_STEPS + 1):
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
    details = {"horizon": 100, "window": window, "pairs": pairs, "meta_lr": 0.01}
    save_part(RESULTS / "toy.csv", (), rows, details, "path")

    rates = torch.linspace(-8, 5, 80)
    first, last = torch.meshgrid(rates, rates, indexing="ij")
    sums = schedule_losses(rule, task, torch.stack([first.flatten(), last.flatten()], 1)).view(80, 80)
    lines = zip(rates.tolist(), sums.tolist(), strict=True)
    surface = [[f"{rate:.6g}", *(f"{total:.5g}" for total in line)] for rate, line in lines]
    header = ["log_first_rate", *(f"{rate:.6g}" for rate in rates.tolist())]  # then a column for each last rate
    write(RESULTS / "toy-surface.csv", [dict(zip(header, line, strict=True)) for line in surface])
    save_provenance(RESULTS / "toy.csv", "surface", {})


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
    if saved := read_parts(RESULTS / "unrolls.json").get(REFERENCE):
        reference, noise = torch.tensor(saved["gradient"]), saved["squared_standard_error"]
    else:
        began = time.perf_counter()
        samples = torch.cat([es_samples(rule, task, inner, seed) for seed in range(REFERENCE_PAIRS // LOSS_PAIRS)])
        reference, noise = samples.mean(0), float(samples.var(0).sum()) / len(samples)
        details = {"gradient": reference.tolist(), "squared_standard_error": noise, "pairs": len(samples)}
        save_provenance(RESULTS / "unrolls.csv", REFERENCE, details)
        print(f"reference in {time.perf_counter() - began:.0f} s: norm {reference.norm():.4f}, error {noise**0.5:.4f}")
    for length in lengths:
        rows: list[Row] = [UNROLL_COLUMNS]
        weights: dict[str, Row] = {}
        began = time.perf_counter()
        for name, samples in all_samples(rule, task, inner, length, weights).items():
            es_weight = weights.get(name, ("", "", ""))
            if not bool(samples.isfinite().all()):  # exploded beyond float32
                rows.append((name, length, len(samples), math.inf, math.inf, math.inf, *es_weight))
                continue
            variance = float(samples.var(0).sum()) if len(samples) > 1 else 0.0
            error = noise + variance / len(samples)
            norm = float(reference.norm())
            bias = float((samples.mean(0) - reference).norm()) / norm
            values = (variance / norm**2, bias, error**0.5 / norm)
            rows.append((name, length, len(samples), *(f"{value:.6g}" for value in values), *es_weight))
            print(*rows[-1])
        settings = {"sigma": SIGMA, "horizon": HORIZON, "seconds": time.perf_counter() - began}
        save_part(RESULTS / "unrolls.csv", ("unroll",), rows, settings)


def es_samples(rule: UpdateRule, task: VectorizedTask, inner: InnerState, seed: int) -> Tensor:
    """Full-unroll ES, ``(pairs, M)``."""
    return loss_samples(ESSingle(SIGMA, LOSS_PAIRS), rule, task, inner, HORIZON, 1000 + seed)


@torch.no_grad()
def loss_samples(
    estimator: PerturbationEstimator, rule: UpdateRule, task: VectorizedTask, inner: InnerState, length: int, seed: int
) -> Tensor:
    """The contribution of each pair of ES, PES or ES-Single to the mean over windows, ``(pairs, M)``."""
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
    rule: UpdateRule, task: VectorizedTask, inner: InnerState, length: int, es_weights: dict[str, Row]
) -> dict[str, Tensor]:
    """Samples ``(pairs, M)`` of every estimator; one of TBPTT, which has no perturbations.

    Mean and quantiles of the weight of ES in combinations go to ``es_weights``.
    """
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
    for name, values in zip(("combined", "combined, paper's weights"), torch.stack(weights).mean(0), strict=True):
        quantiles = values.quantile(torch.tensor([0.1, 0.9])).tolist()
        es_weights[name] = tuple(f"{value:.6g}" for value in (float(values.mean()), *quantiles))
    results["ES"] = loss_samples(ES(SIGMA, LOSS_PAIRS), rule, task, inner, length, 2)
    results["PES"] = loss_samples(PES(SIGMA, LOSS_PAIRS), rule, task, inner, length, 3)
    results["ES-Single"] = loss_samples(ESSingle(SIGMA, LOSS_PAIRS), rule, task, inner, length, 4)
    return results


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
            figures.draw()


if __name__ == "__main__":
    main()
