"""Few-shot learning: how well and how fast learned starting points adapt, and what they cost.

    python -m benchmarks.few_shot.run sinusoid       # error against gradient steps: 30 trainings, most of a minute
    python -m benchmarks.few_shot.run omniglot       # accuracy on new characters: up to an hour a training
    python -m benchmarks.few_shot.run combinations   # which inner gradients to add up (Nichol et al. 2018, section 6.2)
    python -m benchmarks.few_shot.run cost           # time and memory of second against first order
    python -m benchmarks.few_shot.run figures        # figures of what the others have written
    python -m benchmarks.tables                      # the tables of docs/few-shot.md

``--only`` and ``--shots`` choose some trainings, which can be cut off and gone on with; every one puts its rows and
provenance into results/few_shot/ beside those of the others. Of the fitted waves only those that are drawn are kept.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from benchmarks.few_shot.cost import cost
from benchmarks.few_shot.figures import SHOWN_SHOTS, SHOWN_WAVES, draw
from benchmarks.few_shot.trainings import (
    OMNIGLOT,
    SHOTS,
    SINUSOID,
    combination_config,
    omniglot_config,
    sinusoid_config,
    trained,
)
from benchmarks.results import RESULTS as ALL_RESULTS
from benchmarks.results import read, replaced, save_part, save_provenance, write
from learned_optim.meta_train.common.seeds import torch_generator
from learned_optim.meta_train.few_shot.algorithms import NearestNeighbour
from learned_optim.meta_train.few_shot.evaluation import evaluate, mean_and_interval
from learned_optim.meta_train.few_shot.model import FewShotModel
from learned_optim.meta_train.few_shot.options import build_algorithm_options
from learned_optim.meta_train.few_shot.settings import few_shot_config

RESULTS = ALL_RESULTS / "few_shot"
EPISODES = 600  # the papers' number
STEPS = 10
RATES = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)  # of fine-tuning, for the baselines that are tuned
TUNED = ("pre-training", "scratch")

Row = tuple[str | int | float, ...]


# Sine waves


def sinusoid(only: list[str], shots: list[int], runs: Path, as_is: bool) -> None:
    """Squared error on 600 new waves after 0 to 10 steps; and one wave before and after."""
    for name in only or SINUSOID:
        for count in shots or SHOTS:
            config = sinusoid_config(name, count)
            if name == "scratch":
                model = FewShotModel.of(config)
            else:
                model = trained(config, runs / f"sinusoid-{slug(name)}-{count}", as_is=as_is)
            if name in TUNED:
                model = tuned(model)
            evaluation = evaluate(model.algorithm, model.learner, EPISODES, STEPS)
            mean, interval = mean_and_interval(evaluation.losses)
            rows: list[Row] = [("algorithm", "shots", "step", "mse", "interval_95")]
            rows += [(name, count, step, f"{mean[step]:.6g}", f"{interval[step]:.6g}") for step in range(STEPS + 1)]
            path = RESULTS / "sinusoid.csv"
            save_part(path, ("algorithm", "shots"), rows, details(model))
            if name in SHOWN_WAVES and count == SHOWN_SHOTS:
                write(RESULTS / "waves.csv", replaced(read(RESULTS / "waves.csv"), wave(model, name), ("algorithm",)))
                save_provenance(path, f"waves of {name}", details(model))
            print(
                f"{name}, {count} shots: {mean[0]:.3f} before, {mean[1]:.3f} after 1 step, {mean[-1]:.3f} after {STEPS}"
            )


def wave(model: FewShotModel, name: str) -> list[dict[str, str]]:
    """A wave with the curves that are fitted to it: points to learn from; truth, fits after 0, 1 and 10 steps."""
    generator = torch_generator(1, "waves")
    drawn = model.learner.few_shot.episodes(2, generator, "test", 200)
    inputs, order = drawn.query[0].sort(1)
    truth = drawn.query[1].gather(1, order)
    fits = [
        adapted.predict(inputs) for adapted in model.algorithm.adapt(model.learner, drawn.support, STEPS, generator)
    ]
    points = {"x": drawn.support[0], "support": drawn.support[1]}
    curves = {"x": inputs, "truth": truth, "step 0": fits[0], "step 1": fits[1], f"step {STEPS}": fits[STEPS]}
    columns = ("x", "support", *list(curves)[1:])
    return [
        {
            "algorithm": name,
            **dict.fromkeys(columns, ""),
            **dict(zip(kinds, (f"{value:.4g}" for value in line), strict=True)),
        }
        for kinds in (points, curves)
        for line in zip(*(values[0, :, 0].tolist() for values in kinds.values()), strict=True)
    ]


def tuned(model: FewShotModel) -> FewShotModel:
    """The model with the fine-tuning rate whose error after 10 steps is the lowest on validation tasks."""
    models = [with_rate(model, lr) for lr in RATES]
    losses = [evaluate(each.algorithm, each.learner, 200, STEPS, split="validation").losses[:, -1] for each in models]
    return models[int(torch.stack(losses).mean(1).nan_to_num(torch.inf).argmin())]


def with_rate(model: FewShotModel, lr: float) -> FewShotModel:
    table = {**model.config.algorithm.to_table(), "lr": lr}
    algorithm = build_algorithm_options(table, "benchmarks/few_shot.py")
    changed = FewShotModel.of(dataclasses.replace(model.config, algorithm=algorithm))
    changed.algorithm.load_state_dict(model.algorithm.state_dict())
    changed.provenance = model.provenance
    return changed


# Omniglot


def omniglot(only: list[str], ways: int, shots: list[int], runs: Path, as_is: bool) -> None:
    """Accuracy on 600 episodes of new characters, batch norm transductive and not."""
    for name in only or [*OMNIGLOT, "scratch", "nearest neighbour"]:
        for count in shots or [1]:
            if name == "nearest neighbour":
                model = FewShotModel.of(few_shot_config(omniglot_tables("nearest-neighbour", ways, count)))
            elif name == "scratch":
                model = tuned(FewShotModel.of(few_shot_config(omniglot_tables("scratch", ways, count))))
            else:
                folder = runs / f"omniglot-{slug(name)}-{ways}-{count}"
                model = trained(omniglot_config(name, ways, count), folder, as_is=as_is)
            if name == "pre-training":
                judge_omniglot(nearest_in_features(model), "pre-training, nearest neighbour", ways, count)
                model = tuned(model)
            judge_omniglot(model, name, ways, count)


def judge_omniglot(model: FewShotModel, name: str, ways: int, shots: int) -> None:
    rows: list[Row] = [("algorithm", "ways", "shots", "batch_norm", "step", "accuracy", "interval_95")]
    for transductive in (True, False):
        evaluation = evaluate(model.algorithm, model.learner, EPISODES, STEPS, transductive=transductive)
        assert evaluation.accuracies is not None
        mean, interval = mean_and_interval(evaluation.accuracies)
        of_run = (name, ways, shots, evaluation.statistics)
        rows += [(*of_run, step, f"{mean[step]:.6g}", f"{interval[step]:.6g}") for step in range(len(mean))]
        print(*of_run, [round(float(value), 4) for value in mean], flush=True)
    save_part(RESULTS / "omniglot.csv", ("algorithm", "ways", "shots"), rows, details(model))


def omniglot_tables(algorithm: str, ways: int, shots: int) -> dict[str, object]:
    task = {"family": "omniglot", "ways": ways, "shots": shots, "network": "mlp"}
    return {"task": task, "steps": 1, "algorithm": {"name": algorithm}}


def nearest_in_features(model: FewShotModel) -> FewShotModel:
    """The nearest neighbour in the features of a pre-trained learner."""
    initial = model.algorithm.get_parameter("initial")
    return FewShotModel(model.config, NearestNeighbour(initial, pixels=False), model.provenance)


# Inner gradients

COMBINATIONS = {
    "g1": (1, 0, 0, 0),
    "g2": (0, 1, 0, 0),
    "g1 + g2": (1, 1, 0, 0),
    "g3": (0, 0, 1, 0),
    "g1 + g2 + g3": (1, 1, 1, 0),
    "g4": (0, 0, 0, 1),
    "g1 + g2 + g3 + g4": (1, 1, 1, 1),
}
"""Factors of the gradients of four inner steps, each of a minibatch of its own."""


def combinations(only: list[str], runs: Path, as_is: bool) -> None:
    """Accuracy during meta-training with each combination of inner gradients: 5-way 5-shot, as in the paper."""
    for name in only or COMBINATIONS:
        folder = runs / f"combination-{slug(name)}"
        model = trained(combination_config(COMBINATIONS[name]), folder, as_is=as_is)
        evaluation = evaluate(model.algorithm, model.learner, EPISODES, model.config.validation_steps)
        assert evaluation.accuracies is not None
        mean, interval = mean_and_interval(evaluation.accuracies[:, -1])
        judged = [row for row in read(folder / "metrics.csv") if row["validation"]]
        rows: list[Row] = [
            ("combination", "meta_step", "accuracy"),
            *((name, row["meta_step"], f"{float(row['validation/accuracy']):.6g}") for row in judged),
        ]
        test = {"test_accuracy": float(mean), "interval_95": float(interval)}
        save_part(RESULTS / "combinations.csv", ("combination",), rows, details(model) | test)
        print(f"{name}: {float(mean):.4f} ± {float(interval):.4f}")


def details(model: FewShotModel) -> dict[str, object]:
    return {
        "config": dataclasses.asdict(model.config),
        "meta_step": model.provenance.get("meta_step"),
        "training_seconds": model.provenance.get("seconds"),
        "episodes": EPISODES,
    }


def slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["sinusoid", "omniglot", "combinations", "cost", "figures"])
    parser.add_argument("--only", action="append", default=[], help="an algorithm or combination; may be repeated")
    parser.add_argument("--shots", action="append", type=int, default=[], help="may be repeated")
    parser.add_argument("--ways", type=int, default=5, help="of Omniglot (%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/few_shot"), help="folder of trainings (%(default)s)")
    parser.add_argument("--as-is", action="store_true", help="judge the best weights so far, without further training")
    options = parser.parse_args()
    if options.part == "sinusoid":
        sinusoid(options.only, options.shots, options.runs, options.as_is)
    elif options.part == "omniglot":
        omniglot(options.only, options.ways, options.shots, options.runs, options.as_is)
    elif options.part == "combinations":
        combinations(options.only, options.runs, options.as_is)
    elif options.part == "cost":
        cost(RESULTS)
    else:
        draw(RESULTS)


if __name__ == "__main__":
    main()
