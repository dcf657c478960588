"""Does a rule hold up under what users do: other batches, scales, noise, rare gradients, schedules, very long runs?

    python -m benchmarks.suites.robustness                 # the default rule; writes results/robustness.csv and .json
    python -m benchmarks.suites.robustness --rules default,runs/mine/best.safetensors --dry

One network (scikit-learn's digits, 64-32-10, ReLU) is trained under one disturbance at a time. Beside the rule stands
Adam, with its rate tuned under the same disturbance on other seeds. The figure is the final loss, mean over seeds and
the last tenth of the steps, over the initial loss.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.results import RESULTS, read, save_rows
from learned_optim import LearnedOptimizer, load_rule
from learned_optim.meta_train.benchmark.evaluation import MakeOptimizer, final_loss, train, tune
from learned_optim.meta_train.common.seeds import derive_seed, numpy_generator, torch_generator
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks.augmentation import AugmentedTask
from learned_optim.meta_train.tasks.mlp import MLPFamily

STEPS, SEEDS = 1_000, 4
RATES = (0.1, 0.03, 0.01, 0.003, 0.001)
DIVERGED = 2.0  # initial losses

Change = Callable[[Tensor, int, torch.Generator], Tensor]
"""A change of the gradient ``(seeds, N)`` at a step (from 0)."""


@dataclass(frozen=True)
class Condition:
    """One disturbance of an otherwise ordinary training."""

    name: str
    batch_size: int = 64
    loss_factor: float = 1.0
    parameter_scale: float = 1.0
    """The factor by which the stored parameters are larger: the network sees ``parameters / parameter_scale``."""
    gradient: Change | None = None
    rate_factor: Callable[[float], float] | None = None
    """Factor on the rate (the rule's ``lr`` is 1) against the share of the steps that are done."""
    steps: int = STEPS


def noisy(grad: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """Normal noise as large as the gradient's root mean square."""
    noise = torch.randn(grad.shape, generator=generator)
    return grad + noise * grad.square().mean(1, keepdim=True).sqrt()


def rare_huge(grad: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """One step in a hundred has a gradient 10,000 times too large."""
    return grad * 1e4 if step % 100 == 99 else grad


def mostly_absent(grad: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """Each coordinate has a gradient in one step of twenty, as rows of an embedding have."""
    return grad * (torch.rand(grad.shape, generator=generator) < 0.05)


CONDITIONS = (
    Condition("undisturbed"),
    Condition("batch of 1", batch_size=1),
    Condition("batch of 8", batch_size=8),
    Condition("batch of 1,024", batch_size=1024),
    Condition("batch of 4,096", batch_size=4096),
    Condition("loss times 0.001", loss_factor=1e-3),
    Condition("loss times 1,000", loss_factor=1e3),
    Condition("parameters times 0.01", parameter_scale=0.01),
    Condition("parameters times 0.1", parameter_scale=0.1),
    Condition("parameters times 10", parameter_scale=10.0),
    Condition("parameters times 100", parameter_scale=100.0),
    Condition("noise as large as the gradient", gradient=noisy),
    Condition("one gradient in 100 times 10,000", gradient=rare_huge),
    Condition("19 of 20 gradients are zero", gradient=mostly_absent),
    Condition("rate falls to a tenth halfway", rate_factor=lambda done: 1.0 if done < 0.5 else 0.1),
    Condition(
        "rate rises from a tenth, then falls to 0", rate_factor=lambda done: min(0.1 + 9 * done, 1.1 - done, 1.0)
    ),
    Condition("30,000 steps", steps=30_000),
)


class Disturbed(Optimizer):
    """An optimizer that is given other gradients, and another rate at each step.

    Its parameters hold the coordinates of all seeds, one seed after the other, in however many tensors: disturbances
    are the same for all optimizers.
    """

    def __init__(self, inner: Optimizer, condition: Condition) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.condition, self.count = inner, condition, 0
        self.generator = torch_generator(0, "disturbance")
        self.rates = [group["lr"] for group in inner.param_groups]

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """A step of the optimizer inside."""
        for group, rate in zip(self.inner.param_groups, self.rates, strict=True):
            if self.condition.rate_factor is not None:
                group["lr"] = rate * self.condition.rate_factor(self.count / self.condition.steps)
            if self.condition.gradient is not None:
                grads = [parameter.grad for parameter in group["params"]]
                together = torch.cat([grad.flatten() for grad in grads]).view(SEEDS, -1)
                changed = self.condition.gradient(together, self.count, self.generator).flatten()
                parts = changed.split([grad.numel() for grad in grads])
                for parameter, part in zip(group["params"], parts, strict=True):
                    parameter.grad = part.view(parameter.shape)
        self.inner.step()
        self.count += 1


def task(condition: Condition, seed: int) -> VectorizedTask:
    """The network under the condition; from test images."""
    family = MLPFamily(dataset="digits", width=(32, 32), activations=("relu",), initial="torch")
    family = replace(family, batch_size=(condition.batch_size, condition.batch_size))
    plain = family.sample(numpy_generator(0, "robustness"), "test")
    scale = torch.full((SEEDS, 1), 1 / condition.parameter_scale)
    augmented = AugmentedTask(plain, condition.loss_factor, label_noise=0.0)
    return VectorizedTask(augmented, SEEDS, derive_seed(seed, "robustness"), scale=scale)


def final(condition: Condition, make: MakeOptimizer, seed: int, *, by_tensor: bool = False) -> tuple[float, int]:
    """Mean final loss in terms of the initial one, and how many of the trainings diverged."""

    def disturbed(parameters: Iterable[Tensor]) -> Optimizer:
        return Disturbed(make(parameters), condition)

    losses = train(
        task(condition, seed),
        disturbed,
        condition.steps,
        torch_generator(seed, "robustness"),
        by_tensor=by_tensor,
    )
    ends, begin = final_loss(losses), losses[0].mean()
    return float(ends.mean() / begin), int((~(ends <= DIVERGED * begin)).sum())


def adam(rate: float) -> MakeOptimizer:
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def learned(source: str) -> MakeOptimizer:
    rule = load_rule(source)
    return lambda parameters: LearnedOptimizer(parameters, rule)


def table(root: Path = RESULTS) -> str:
    """The default rule and Adam, tuned under each disturbance; bold where the rule ends lower."""
    results = {(row["condition"], row["optimizer"]): row for row in read(root / "robustness.csv")}
    rows = []
    for condition in dict.fromkeys(condition for condition, _ in results):
        rule, adam = (results[condition, name] for name in ("default", "Adam"))
        ours, theirs = (row["final_over_initial_loss"] for row in (rule, adam))
        text = f"{float(ours):.2g}"
        rows.append([condition, f"**{text}**" if float(ours) < float(theirs) else text])
        rows[-1].append(f"{float(theirs):.2g} ({float(adam['rate']):g})")
    header = ["disturbance", "default rule", "Adam, tuned under it (rate)"]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default="default", help="comma-separated names or files (%(default)s)")
    parser.add_argument("--conditions", default="", help="comma-separated beginnings of names; all by default")
    parser.add_argument("--dry", action="store_true", help="print only")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rules = {Path(source).stem: learned(source) for source in given.rules.split(",")}
    columns = ("condition", "optimizer", "rate", "final_over_initial_loss", "diverged", "seeds")
    rows: list[tuple[str | int | float, ...]] = [columns]
    beginnings = tuple(given.conditions.split(",")) if given.conditions else ("",)
    for condition in CONDITIONS:
        if not condition.name.startswith(beginnings):
            continue
        tuned = tune(lambda rate, condition=condition: final(condition, adam(rate), seed=1)[0], RATES)  # type: ignore[misc]
        entrants: dict[str, tuple[float | str, MakeOptimizer]] = {"Adam": (tuned.rate, adam(tuned.rate))}
        entrants |= {name: ("", make) for name, make in rules.items()}
        for name, (rate, make) in entrants.items():
            loss, diverged = final(condition, make, seed=2, by_tensor=name in rules)
            rows.append((condition.name, name, rate, f"{loss:.4g}", diverged, SEEDS))
            print("{:42} {:12} {!s:6} {:>10} {} of {} diverged".format(*rows[-1]), flush=True)
    if not given.dry:
        save_rows(RESULTS, "robustness", rows, {"steps": STEPS, "load_before": load})


if __name__ == "__main__":
    main()
