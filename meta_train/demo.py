"""The demo: meta-train a rule for a minute, then train a network on held-out images beside Adam at its best rate."""

import time
from pathlib import Path

from learned_optim.checkpoint import save_rule
from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.benchmark.report import best_baseline, ratio_text
from learned_optim.meta_train.benchmark.suites import load_suite
from learned_optim.meta_train.config.load import load_config
from learned_optim.meta_train.reports.comparison import compare
from learned_optim.meta_train.trainer.progress import run_with_progress
from learned_optim.meta_train.trainer.trainer import Trainer


def run_demo(folder: Path) -> None:
    """Meta-train a rule, compare it and the shipped default with Adam; print a table, write CSV and plots."""
    began = time.monotonic()
    print("1. Meta-training a rule on small tanh, GELU and ELU networks for scikit-learn's digits")
    trainer = Trainer(load_config("demo"))
    run_with_progress(trainer)
    fresh = folder / "fresh rule.safetensors"
    save_rule(trainer.best, fresh, trainer.provenance(trainer.best_meta_step))
    print(f"   {trainer.seconds:.0f} s; the rule's weights: {fresh}")

    suite = load_suite("demo")
    (problem,) = suite.problems
    print(f"2. Training on digits that no rule has seen, {problem.seeds} seeds: {problem.label}")
    print("   (wider, and of another activation, than the fresh rule's)")
    results = compare(suite, ["default", fresh], out=folder, cache=Cache(None), settings={"command": "demo"})
    adam = best_baseline(results[problem.name])
    for result in results[problem.name]:
        if result.is_rule:
            ratio = ratio_text(result.final[0] / adam.final[0])
            print(f"{result.optimizer}: final loss {ratio} times that of Adam at its best rate")
    print(f"plot: {folder / 'comparison.png'}   (took {time.monotonic() - began:.0f} s)")
