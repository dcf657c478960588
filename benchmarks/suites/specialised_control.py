"""The control of the worked specialisations: the best constants in the place of the LSTM.

    python -m benchmarks.suites.specialised_control specialised-pictures       # minutes; adds a row

The default rule without an LSTM has seven outputs that are constants. They are meta-trained like the rule itself, by
ES-Single with the recipe's meta-loss on the tasks of its configuration, for ``META_STEPS`` meta-steps, and compared
with the default on the draws of the test split on which the rule was compared. What the rule gains beyond them is what
the LSTM brings.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import read, replaced, save_provenance, write
from benchmarks.suites.specialised import CONSTANTS, ROWS, TITLES
from learned_optim import save_rule
from learned_optim.meta_train.benchmark.cache import Cache, default_folder
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.scores import score
from learned_optim.meta_train.benchmark.suites import Suite
from learned_optim.meta_train.config.load import Config, load_config
from learned_optim.meta_train.config.settings import MetaOptimizerConfig, RuleConfig
from learned_optim.meta_train.reports.gain import DEFAULT, problems_of, ratio
from learned_optim.meta_train.tasks.lookup import build_family
from learned_optim.meta_train.trainer.trainer import Trainer

META_STEPS, VALIDATIONS = 150, 5
COMPARED: dict[str, dict[str, Any]] = {
    "specialised-neural-art": {"size": 64, "styles": ("starry_night", "the_scream", "water_lilies")},
    "specialised-mnist": {},
}
"""Rule -> options of the tasks of the comparison, where these are not those of meta-training."""
STEPS = {"specialised-mnist": 200}
"""Rule -> steps of the comparison, where these are not those of validation."""


def configuration(name: str) -> Config:
    """The configuration of a rule, but for the rule and the course of meta-training."""
    config = load_config(name)
    return dataclasses.replace(
        config,
        steps=META_STEPS,
        rule=RuleConfig(settings={"hidden_size": 0}),
        estimator=dataclasses.replace(config.estimator, meta_loss="log-of-mean"),
        meta_optimizer=MetaOptimizerConfig(lr=5e-3, schedule="cosine", average=0.98),
        validation=dataclasses.replace(
            config.validation, every=META_STEPS // VALIDATIONS, baselines=False, solved=1e-8
        ),
    )


def control(name: str, path: Path = ROWS) -> None:
    """Meta-train the constants, compare them with the default, and write the row."""
    config = configuration(name)
    trainer, began = Trainer(config), time.process_time()
    for progress in trainer.run():
        if progress.validation is not None:
            print(name, progress.meta_step, f"{progress.validation:.4g}", flush=True)
    seconds = time.process_time() - began
    task = config.tasks[0]
    options = COMPARED.get(name, task.options)
    steps = STEPS.get(name, config.validation.horizon)
    problems = problems_of(task.family, options, build_family(task.family, options, "task"), steps)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / f"{CONSTANTS}.safetensors"
        save_rule(trainer.best, weights, trainer.provenance(trainer.best_meta_step))
        suite = Suite("specialised", tuple(problems), "Constants beside the default")
        harness = Harness(suite, [], [DEFAULT, weights], cache=Cache(default_folder()))
        with Bar(harness.planned_steps()) as bar:
            pairs = [tuple(group) for group in harness.results(bar)]
    reference, own = ([pair[place] for pair in pairs] for place in (0, 1))
    scored = score(own, reference)
    row: dict[str, object] = {"rule": name, "meta_steps": META_STEPS, "seconds": f"{seconds:.0f}"}
    row |= {"optimizer": CONSTANTS, "speedup": scored.speedup, "low": scored.low, "high": scored.high}
    row |= {"final_loss": ratio(own, reference)}
    if all(result.held_out is not None for result in reference):
        row["held_out_loss"] = ratio(own, reference, "held_out_best")
    fresh = {key: f"{value:.2f}" if isinstance(value, float) else str(value) for key, value in row.items()}
    write(path, replaced(read(path), [fresh], ("rule", "optimizer")))
    outputs = [round(value, 3) for value in trainer.best.state_dict()["output_bias"].tolist()]
    details = {"outputs": outputs, "best_meta_step": trainer.best_meta_step}
    save_provenance(path, f"{name}, {CONSTANTS}", details)
    print(name, fresh, flush=True)


def main() -> None:
    """Run the command of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=TITLES, metavar="NAME", help=f"of {', '.join(TITLES)}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        control(name)


if __name__ == "__main__":
    main()
