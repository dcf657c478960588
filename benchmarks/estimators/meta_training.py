"""The same small rule meta-trained with three estimators for equal time: validation score against seconds.

    python -m benchmarks.estimators.meta_training pilots    # three minutes for each rate: how META_RATES were chosen
    python -m benchmarks.estimators.meta_training run       # 30 minutes for each estimator, one after the other
    python -m benchmarks.estimators.meta_training run --estimators pes
    python -m benchmarks.estimators.meta_training adam      # Adam on the validation tasks, for comparison
    python -m benchmarks.estimators.meta_training figure

Rule scale-free-lstm from fresh weights (Adam at 3e-3); perceptrons with 32 ReLU units on MNIST at 8x8,
batches of 64, inner trainings of 100 to 2,000 steps in a pool of 16, validated over 2,000 steps on held-out images.
Time is the processor's, of one thread, validations left out: other load slows it far less than the clock. Writes
results/meta_training/.
"""

import argparse
import dataclasses
import time
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from benchmarks.colours import colour
from benchmarks.results import RESULTS as ALL_RESULTS
from benchmarks.results import read, save_part
from learned_optim.meta_train.config.load import Config, config_from_tables
from learned_optim.meta_train.reports.plots import STYLE
from learned_optim.meta_train.trainer.trainer import Trainer
from learned_optim.rules import ScaleFreeLSTM

RESULTS = ALL_RESULTS / "meta_training"
ROWS = RESULTS / "meta_training.csv"
ESTIMATORS: dict[str, dict[str, Any]] = {
    "truncated-bptt": {"estimator": {"replay_coordinates": 2048}, "meta_optimizer": {"clip_norm": 0.01}},
    "combined": {"estimator": {"replay_coordinates": 2048}, "meta_optimizer": {"clip_norm": 0.01}},
    "pes": {},
}
"""The options in which the three runs differ: backpropagated meta-gradients are clipped, since windows explode."""
META_RATES = {"truncated-bptt": 1e-2, "combined": 3e-3, "pes": 1e-3}
"""The best of ``PILOT_RATES`` after three minutes."""
PILOT_RATES = {
    "truncated-bptt": (3e-4, 1e-3, 3e-3, 1e-2),
    "combined": (3e-4, 1e-3, 3e-3, 1e-2),
    "pes": (3e-4, 1e-3, 3e-3),
}
ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
COLUMNS = ("minutes", "estimator", "rate", "seed", "seconds", "meta_step", "score", "skipped")
KEYS = COLUMNS[:4]
PILOT, WHOLE = 3, 30
"""Minutes of a run; 0 for Adam, which is not meta-trained."""
Row = tuple[object, ...]


def configuration(estimator: str, meta_rate: float, seed: int) -> Config:
    """The configuration of a meta-training, but for its time."""
    differing = ESTIMATORS[estimator]
    family = {"family": "mlp", "dataset": "mnist", "image_size": 8, "width": [32, 32], "batch_size": [64, 64]}
    return config_from_tables(
        {
            "steps": 10**9,
            "seed": seed,
            "rule": {"architecture": "scale-free-lstm"},
            "tasks": [{**family, "activations": ["relu"], "initial": "torch"}],
            "unroll": {"truncation": 20, "horizon": [100, 2000], "instances": 8, "pool": 16},
            "estimator": {"name": estimator, "meta_loss": "log", **differing.get("estimator", {})},
            "meta_optimizer": {"lr": meta_rate, "average": 0.99, **differing.get("meta_optimizer", {})},
            "validation": {"every": 10**9, "horizon": 2000, "instances": 8},
        }
    )


def meta_train(estimator: str, meta_rate: float, minutes: int, validations: int, seed: int = 0) -> None:
    """Meta-train for ``minutes`` of processor time, and write a row for each validation on the way."""
    config = configuration(estimator, meta_rate, seed)
    trainer = Trainer(config)
    key = (minutes, estimator, meta_rate, seed)
    rows: list[Row] = [COLUMNS, (*key, 0.0, 0, f"{trainer.validate(trainer.averaged):.6g}", 0)]
    seconds, began = 0.0, time.process_time()
    steps = trainer.run()
    for index in range(1, validations + 1):
        while seconds + time.process_time() - began < 60 * minutes * index / validations:
            next(steps)
        seconds += time.process_time() - began
        score = trainer.validate(trainer.averaged)
        rows.append((*key, round(seconds, 1), trainer.meta_step, f"{score:.6g}", trainer.skipped))
        print(*rows[-1], flush=True)
        save_part(ROWS, KEYS, rows, {"config": dataclasses.asdict(config)})
        began = time.process_time()


def adam() -> None:
    """Score of Adam at each rate: the untrained rule *is* Adam."""
    trainer = Trainer(configuration("pes", META_RATES["pes"], 0))
    scores = [(rate, trainer.validate(ScaleFreeLSTM(rate=rate))) for rate in ADAM_RATES]
    rows = [(0, "Adam", rate, 0, "", "", f"{score:.6g}", "") for rate, score in scores]
    save_part(ROWS, KEYS, [COLUMNS, *rows], {}, part="Adam")


def figure() -> None:
    """Draw the scores against time, and Adam at its best rate."""
    found = read(ROWS)
    with mpl.rc_context(STYLE):
        picture = Figure(figsize=(6.4, 3.6), layout="constrained")
        panel = picture.subplots()
        for estimator in META_RATES:
            rows = [row for row in found if (int(row["minutes"]), row["estimator"]) == (WHOLE, estimator)]
            minutes = [float(row["seconds"]) / 60 for row in rows]
            label = f"{estimator} ({int(rows[-1]['meta_step']):,} meta-steps)"
            panel.plot(minutes, [float(row["score"]) for row in rows], color=colour(estimator), label=label)
        best = min((row for row in found if row["estimator"] == "Adam"), key=lambda row: float(row["score"]))
        panel.axhline(
            float(best["score"]), color=colour("Adam"), linestyle="--", label=f"Adam, lr {float(best['rate']):g}"
        )
        panel.set(xlabel="minutes of one core", ylabel="final loss over initial loss", yscale="log")
        panel.set_title("Validation, 2,000 steps, held-out images")
        panel.legend(fontsize=7.5)
        picture.savefig(RESULTS / "meta_training.png", dpi=150)


def main() -> None:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["pilots", "run", "adam", "figure"])
    parser.add_argument("--estimators", nargs="+", choices=[*ESTIMATORS], default=[*ESTIMATORS])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    match arguments.part:
        case "pilots":
            for estimator in arguments.estimators:
                for rate in PILOT_RATES[estimator]:
                    meta_train(estimator, rate, minutes=PILOT, validations=3)
        case "run":
            for estimator in arguments.estimators:
                meta_train(estimator, META_RATES[estimator], minutes=WHOLE, validations=30)
        case "adam":
            adam()
        case _:
            figure()


if __name__ == "__main__":
    main()
