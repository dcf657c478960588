"""A meta-trained few-shot learner for use: load it, adapt it to a task, predict."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from learned_optim.files import json_object, write_atomically
from learned_optim.meta_train.common.seeds import cpu_by_default
from learned_optim.meta_train.few_shot.algorithms import Adapted, Algorithm
from learned_optim.meta_train.few_shot.algorithms.gradient import AdaptedParameters
from learned_optim.meta_train.few_shot.learner import Learner
from learned_optim.meta_train.few_shot.settings import FewShotConfig, few_shot_config

FEW_SHOT_FORMAT = "learned-optim-few-shot"
FEW_SHOT_FORMAT_VERSION = 1


class FewShotModel:
    """A learner and what was learned for adapting it.

    ::

        model = FewShotModel.load("runs/maml-omniglot/best.safetensors")
        adapted = model.adapt(images, labels)  # (n, 1, 28, 28) and (n,)
        logits = adapted.predict(more_images)

    Args:
        config: says which learner and which algorithm.
        algorithm: the algorithm, with what it has learned.
        provenance: how it came about.
    """

    @cpu_by_default()
    def __init__(
        self, config: FewShotConfig, algorithm: Algorithm, provenance: Mapping[str, Any] | None = None
    ) -> None:
        self.config, self.algorithm, self.provenance = config, algorithm, dict(provenance or {})
        self.learner = Learner(config.task.build(), config.seed)

    @classmethod
    @cpu_by_default()
    def load(cls, path: str | Path) -> "FewShotModel":
        """Read what a run has written: ``best.safetensors`` or ``latest.safetensors``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, or holds no few-shot learner.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole .safetensors file: {error}") from error
        if metadata.get("format") != FEW_SHOT_FORMAT:
            raise ValueError(
                f"{path} holds no few-shot learner; learned-optim meta-train writes one from a configuration"
            )
        if metadata.get("version") != str(FEW_SHOT_FORMAT_VERSION):
            found = metadata.get("version")
            raise ValueError(
                f"{path} has format version {found}, this learned-optim reads {FEW_SHOT_FORMAT_VERSION}: upgrade it"
            )
        config = few_shot_config(json_object(metadata.get("config", ""), str(path)), str(path), resuming=True)
        task = config.task.build()
        algorithm = config.algorithm.build(task, Learner(task, config.seed).fresh_parameters, config.seed, fresh=True)
        try:
            algorithm.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{path}: weights do not fit its configuration: {error}") from error
        provenance = json_object(metadata.get("provenance", "{}"), f"{path}: provenance")
        return cls(config, algorithm.requires_grad_(False), provenance)

    @classmethod
    @cpu_by_default()
    def of(cls, config: FewShotConfig) -> "FewShotModel":
        """The model that a configuration starts with, which is all there is to the untrained baselines."""
        task = config.task.build()
        initial = Learner(task, config.seed).fresh_parameters
        return cls(config, config.algorithm.build(task, initial, config.seed).requires_grad_(False), {})

    @cpu_by_default()
    def to(self, device: torch.device | str) -> "FewShotModel":
        """Move it to ``device``, where it takes its inputs from then on."""
        self.algorithm.to(device)
        self.learner = Learner(self.learner.few_shot, self.config.seed, device=device)
        return self

    def save(self, path: str | Path) -> None:
        """Write a file that :meth:`load` reads."""
        save_few_shot(self.algorithm, self.config, Path(path), self.provenance)

    def adapt(self, inputs: Tensor, targets: Tensor, steps: int | None = None, *, seed: int = 0) -> "AdaptedModel":
        """The learner adapted to one task.

        Args:
            inputs: examples ``(n, ...)``.
            targets: their values ``(n, 1)``, or labels ``(n,)`` from 0 to ``ways - 1``.
            steps: inner steps; None: as in the run's validation.
            seed: seed of the order of minibatches, for an algorithm that takes these.

        Raises:
            ValueError: not as many targets as inputs, a label out of range, or inputs of another shape than the
                learner's.
        """
        check_input_shape(self.learner, inputs)
        if len(inputs) != len(targets):
            raise ValueError(f"each input needs a target, got {len(inputs)} and {len(targets)}")
        ways = self.learner.few_shot.ways
        if ways is not None and not 0 <= int(targets.min()) <= int(targets.max()) < ways:
            raise ValueError(f"labels must run from 0 to {ways - 1}, got {int(targets.min())} to {int(targets.max())}")
        steps = self.config.validation_steps if steps is None else steps
        generator = torch.Generator().manual_seed(seed)
        *_, adapted = self.algorithm.adapt(self.learner, (inputs[None], targets[None]), steps, generator)
        return AdaptedModel(adapted, self.learner)


class AdaptedModel:
    """A learner that has been adapted to one task."""

    def __init__(self, adapted: Adapted, learner: Learner) -> None:
        self.adapted, self.learner = adapted, learner

    @torch.no_grad()
    def predict(self, inputs: Tensor, *, transductive: bool = False) -> Tensor:
        """Predictions ``(n, outputs)`` for ``inputs`` ``(n, ...)``: values, or logits of the classes.

        ``transductive``: whether batch norm may take its statistics from all inputs together; if not, a prediction does
        not depend on what else is predicted.

        Raises:
            ValueError: inputs of another shape than the learner's.
        """
        check_input_shape(self.learner, inputs)
        return self.adapted.predict(inputs[None], transductive=transductive)[0]

    def module(self) -> nn.Module:
        """The adapted learner as an ordinary module.

        Raises:
            TypeError: the algorithm adapts no parameters.
        """
        if not isinstance(self.adapted, AdaptedParameters):
            raise TypeError("this algorithm compares examples and adapts no parameters: use predict()")
        return self.adapted.learner.module_with(self.adapted.parameters[0])


def check_input_shape(learner: Learner, inputs: Tensor) -> None:
    """Raise ``ValueError`` for inputs ``(n, ...)`` that the learner cannot take."""
    expected = learner.few_shot.input_shape
    if expected is not None and tuple(inputs.shape[1:]) != expected:
        wanted = ", ".join(map(str, ("n", *expected)))
        raise ValueError(f"this learner takes inputs of shape ({wanted}), got {tuple(inputs.shape)}")


def save_few_shot(algorithm: Algorithm, config: FewShotConfig, path: Path, provenance: Mapping[str, Any]) -> None:
    """Write a learner's algorithm and configuration to ``path``, whole or not at all."""
    metadata = {
        "format": FEW_SHOT_FORMAT,
        "version": str(FEW_SHOT_FORMAT_VERSION),
        "config": config.to_json(),
        "provenance": json.dumps(dict(provenance), allow_nan=False),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in algorithm.state_dict().items()}
    write_atomically(path, save(tensors, metadata))
