"""The trainings behind benchmarks/few_shot/run.py: their configurations, and run folders that can be gone on with."""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learned_optim.meta_train.config.load import load_tables
from learned_optim.meta_train.few_shot.model import FewShotModel
from learned_optim.meta_train.few_shot.settings import FewShotConfig, few_shot_config, shipped_few_shot_configs
from learned_optim.meta_train.few_shot.trainer import FewShotTrainer
from learned_optim.meta_train.trainer.progress import run_with_progress

META_ADAM = {"name": "adam", "lr": 1e-3, "schedule": "cosine"}
SHOTS = (5, 10, 20)
RULE = {"architecture": "schedule-free-lstm", "start_from": "default"}

# What the sinusoid runs differ in; all the rest is shared.
SINUSOID: dict[str, dict[str, Any]] = {
    "maml": {"algorithm": {"name": "maml", "lr": 0.01}},
    "fomaml": {"algorithm": {"name": "fomaml", "lr": 0.01}},
    "meta-sgd": {"algorithm": {"name": "meta-sgd", "lr": 0.01}},
    "reptile": {
        "algorithm": {"name": "reptile", "steps": 10, "lr": 0.02},
        "meta_optimizer": {"name": "sgd", "lr": 0.5, "schedule": "linear"},
        "steps": 3_000,
    },
    "leap": {"algorithm": {"name": "leap", "steps": 10, "lr": 0.02}, "steps": 3_000},
    "meta-lstm": {
        "algorithm": {"name": "meta-lstm", "steps": 10},
        "meta_optimizer": META_ADAM | {"clip_value": 0.25},
        "episodes": 5,
        "steps": 3_000,
    },
    "maml, default rule": {
        "algorithm": {"name": "maml", "steps": 3, "optimizer": "rule", "rule": RULE},
        "episodes": 10,
        "steps": 2_000,
    },
    "maml, rule trained too": {
        "algorithm": {"name": "maml", "steps": 3, "optimizer": "rule", "rule": RULE, "train_rule": True},
        "episodes": 10,
        "steps": 2_000,
    },
    "pre-training": {"algorithm": {"name": "pretraining", "lr": 0.01}},
    "scratch": {"algorithm": {"name": "scratch", "lr": 0.01}},
}
SINUSOID_STEPS = 10_000


def sinusoid_config(name: str, shots: int) -> FewShotConfig:
    tables: dict[str, Any] = {
        "task": {"family": "sinusoid", "shots": shots, "queries": shots},
        "steps": SINUSOID_STEPS,
        "episodes": 25,
        "meta_optimizer": META_ADAM,
        "validation": {"every": 1_000, "episodes": 200},
        **SINUSOID[name],
    }
    return few_shot_config(copy.deepcopy(tables))


# What two cores can do: a quarter of the paper's episodes in a meta-step, a fifth of its meta-steps.
CONVOLUTIONAL = ("episodes=8", "steps=12_000", "meta_optimizer.schedule=cosine", "validation.every=500")
# Five queries of each class for one and a higher rate: 600 meta-steps of FOMAML come further than 1,500 did.
FIVE_QUERIES = ("task.queries=5", "meta_optimizer.lr=3e-3")

# The Omniglot runs: a shipped configuration and what is changed in it.
OMNIGLOT: dict[str, tuple[str, tuple[str, ...]]] = {
    "maml": ("maml-omniglot-mlp", ()),
    "fomaml": ("maml-omniglot-mlp", ("algorithm.name=fomaml",)),
    "maml, 5 queries": ("maml-omniglot-mlp", ("steps=24_000", "algorithm.steps=3", *FIVE_QUERIES)),
    "fomaml, 5 queries": (
        "maml-omniglot-mlp",
        ("steps=24_000", "algorithm.name=fomaml", "algorithm.steps=3", *FIVE_QUERIES),
    ),
    "reptile": ("reptile-omniglot-mlp", ()),
    "meta-sgd": ("maml-omniglot-mlp", ("algorithm.name=meta-sgd",)),
    "prototypical": ("prototypical-omniglot-mlp", ()),
    "matching": ("prototypical-omniglot-mlp", ("algorithm.name=matching",)),
    "pre-training": ("pretraining-omniglot-mlp", ()),
    "maml, conv": ("maml-omniglot", (*CONVOLUTIONAL, *FIVE_QUERIES)),
    "fomaml, conv": ("maml-omniglot", ("algorithm.name=fomaml", "algorithm.steps=3", *CONVOLUTIONAL, *FIVE_QUERIES)),
    "meta-sgd, conv": ("maml-omniglot", ("algorithm.name=meta-sgd", *CONVOLUTIONAL)),
    "reptile, conv": ("reptile-omniglot-mlp", ("task.network=conv", "steps=12_000")),
}


def omniglot_config(name: str, ways: int, shots: int) -> FewShotConfig:
    source, changes = OMNIGLOT[name]
    tables: Mapping[str, Any] = load_tables(
        source, [*changes, f"task.ways={ways}", f"task.shots={shots}"], shipped_few_shot_configs()
    )
    return few_shot_config(tables, source)


def combination_config(factors: Sequence[float]) -> FewShotConfig:
    """5-way 5-shot, four inner steps of ten images each (Nichol et al. 2018, section 6.2, on our small network)."""
    tables: dict[str, Any] = {
        "task": {"family": "omniglot", "ways": 5, "shots": 8, "network": "mlp"},
        "steps": 2_000,
        "episodes": 5,
        "algorithm": {
            "name": "reptile",
            "steps": 4,
            "batch_size": 10,
            "lr": 0.1,
            "combination": list(factors),
        },
        "meta_optimizer": {"name": "sgd", "lr": 0.1, "schedule": "linear"},
        "validation": {"every": 200, "episodes": 100},
    }
    return few_shot_config(tables)


def trained(config: FewShotConfig, folder: Path, *, as_is: bool = False) -> FewShotModel:
    """The model of a configuration: read from ``folder``, gone on with there, or trained from the start.

    ``as_is`` takes the best weights so far of a run that is under way.
    """
    if as_is:
        return FewShotModel.load(folder / "best.safetensors")
    if (folder / "checkpoint.safetensors").is_file():
        trainer = FewShotTrainer.resume(folder)
    else:
        trainer = FewShotTrainer(config, folder)
    if trainer.config != config:
        raise ValueError(f"{folder} holds a run of another configuration; remove it")
    if not trainer.finished:
        run_with_progress(trainer)
    with contextlib.suppress(FileNotFoundError):
        return FewShotModel.load(folder / "best.safetensors")
    raise RuntimeError(f"{folder}: no validation loss was a number")
