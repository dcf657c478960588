"""The demo: meta-train a rule for a minute, then train a network on held-out images beside Adam at its best rate."""

import time
from pathlib import Path

from learned_optim.checkpoint import save_rule
from learned_optim.meta_train.benchmark import RELU_DIGITS, Comparison, best_baseline, compare, save_results, table
from learned_optim.meta_train.config import load_config
from learned_optim.meta_train.plots import plot_comparison
from learned_optim.meta_train.progress import run_with_progress
from learned_optim.meta_train.trainer import Trainer

STEPS, SEEDS = 300, 8
RATES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # Adam's best rate lies inside; were it not, the table would say so

HELD_OUT = Comparison("scikit-learn's digits, 64-64-10 ReLU network", RELU_DIGITS, STEPS, ("default",))


def run_demo(folder: Path) -> None:
    """Meta-train a rule, compare it and the shipped default with Adam; print a table, write CSV and a plot."""
    began = time.monotonic()
    print("1. Meta-training a rule on small tanh, GELU and ELU networks for scikit-learn's digits")
    trainer = Trainer(load_config("demo"))
    run_with_progress(trainer)
    fresh = folder / "fresh rule.safetensors"
    save_rule(trainer.best, fresh, trainer.provenance(trainer.best_meta_step))
    print(f"   {trainer.seconds:.0f} s; the rule's weights: {fresh}")

    print(f"2. Training on digits that no rule has seen, {SEEDS} seeds, {STEPS} steps: {HELD_OUT.title}")
    print("   (wider and of another activation than the fresh rule's; the default was meta-trained on such networks)")
    curves = compare(
        HELD_OUT, ["default", fresh], SEEDS, baselines=["Adam"], rates=RATES, report=lambda line: print(f"   {line}")
    )
    print(f"\n{table(curves)}\n")
    save_results({"digits": curves}, folder, {"command": "learned-optim demo", "seeds": SEEDS, "rates": RATES})
    figure = folder / "demo.png"
    plot_comparison({"digits": curves}, {"digits": HELD_OUT.title}, figure)
    adam = best_baseline(curves)
    for curve in curves:
        if not curve.is_baseline:
            print(f"{curve.optimizer}: final loss {curve.final / adam.final:.2f} times that of Adam at its best rate")
    print(f"plot: {figure}   (took {time.monotonic() - began:.0f} s)")
