"""A meta-training run on disk: tensors and counters in one file, from which the run continues bit-exactly."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from learned_optim.files import json_object, write_atomically
from learned_optim.meta_train.common.strict import check_shape
from learned_optim.meta_train.estimators import Trajectory
from learned_optim.meta_train.inner.unroll import InnerState

CHECKPOINT_FILE = "checkpoint.safetensors"


class _Progress(TypedDict):
    """Counters and scores that every run has; it has more of them."""

    meta_step: Annotated[int, Field(ge=0)]
    skipped: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    best_validation: float | None
    best_meta_step: NotRequired[int]
    curriculum: NotRequired[dict[str, Any] | None]
    baselines: NotRequired[dict[str, float | None]]


class RunCheckpoint(NamedTuple):
    """All that a resumed run needs."""

    config: dict[str, Any]
    """The run's configuration as nested tables."""
    progress: dict[str, Any]
    """Counters and scores: anything JSON can hold."""
    tensors: dict[str, Tensor]
    """Weights, state of the meta-optimizer and of the inner trainings, by dotted names."""


def write_checkpoint(folder: Path, checkpoint: RunCheckpoint) -> None:
    """Write ``checkpoint.safetensors`` into ``folder``, whole or not at all."""
    metadata = {
        "config": json.dumps(checkpoint.config, allow_nan=False),
        "progress": json.dumps(checkpoint.progress, allow_nan=False),
    }
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    write_atomically(folder / CHECKPOINT_FILE, save(contents, metadata))


def read_checkpoint(folder: Path, *, with_tensors: bool = True) -> RunCheckpoint:
    """Read what :func:`write_checkpoint` wrote; without tensors, which may be large, if these are not asked for.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or not a meta-training checkpoint.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: no {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys() if with_tensors else ()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not {"config", "progress"} <= metadata.keys():
        raise ValueError(f"{path} is not a meta-training checkpoint")
    config, progress = (json_object(metadata[name], str(path)) for name in ("config", "progress"))
    check_shape(_Progress, progress, str(path))
    return RunCheckpoint(config, progress, tensors)


@contextlib.contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """Say that a checkpoint lacks what its configuration needs, or has it in another shape, as one ``ValueError``."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        kind = type(error).__name__
        raise ValueError(f"{folder / CHECKPOINT_FILE} is damaged, or of another version ({kind}: {error})") from error


def flatten(state: Trajectory) -> dict[str, Tensor]:
    """The tensors of a trajectory by name."""
    tensors = {name: value for name, value in state.inner._asdict().items() if name != "rule_state"}
    tensors |= {f"rule_state.{entry}": tensor for entry, tensor in state.inner.rule_state.items()}
    return tensors | {f"memory.{name}": tensor for name, tensor in state.memory.items()}


def unflatten(tensors: Mapping[str, Tensor], device: torch.device) -> Trajectory:
    """The opposite of :func:`flatten`, on ``device``."""
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    plain = {name: tensor for name, tensor in moved.items() if "." not in name}
    inner = InnerState(**plain, rule_state=below("rule_state.", moved))
    return Trajectory(inner, below("memory.", moved))


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries whose name starts with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
