"""Rules on disk: weights, architecture and provenance in one ``.safetensors`` file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from learned_optim.files import write_atomically
from learned_optim.rules import ARCHITECTURES, UpdateRule

FORMAT = "learned-optim-rule"
VERSION = 1
SUFFIX = ".safetensors"
SHIPPED = Path(__file__).parent / "weights"


def available_rules() -> list[str]:
    """Names of the meta-trained rules that come with the package, for ``LearnedOptimizer(rule=name)``."""
    return sorted(path.stem for path in SHIPPED.glob(f"*{SUFFIX}"))


def save_rule(rule: UpdateRule, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write a rule's weights, architecture and settings to ``path``, whole or not at all.

    Args:
        rule: the rule, on any device.
        path: file to write, by custom ``NAME.safetensors``.
        provenance: anything JSON can hold: tasks, configuration, seed, cost, results.
    """
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "architecture": rule.name,
        "settings": json.dumps(dict(rule.settings)),
        "provenance": json.dumps(dict(provenance or {})),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in rule.state_dict().items()}
    write_atomically(Path(path), save(tensors, metadata))


def load_rule(source: str | Path) -> UpdateRule:
    """Load a rule: a shipped one by name, or a file by path.

    Args:
        source: one of :func:`available_rules`, or the path of a ``.safetensors`` file.

    Returns:
        The rule on the CPU, its weights in float32 and not requiring gradients.

    Raises:
        ValueError: unknown name, or a file that holds no rule of this package (foreign, truncated, from a newer
            version, weights that do not fit the architecture).
        FileNotFoundError: no file at the path.
    """
    path = _locate(source)
    metadata, tensors = _read(path)
    architecture = metadata.get("architecture", "")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    try:
        with torch.device("cpu"):  # whatever torch.set_default_device says
            rule = ARCHITECTURES[architecture](**json.loads(metadata["settings"]))
        rule.float().load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: weights do not fit the architecture {architecture!r}: {error}") from error
    return rule.requires_grad_(False)


def read_provenance(source: str | Path) -> dict[str, Any]:
    """How a stored rule came about, as given to :func:`save_rule`; raises like :func:`load_rule`."""
    metadata, _ = _read(_locate(source))
    provenance: dict[str, Any] = json.loads(metadata.get("provenance", "{}"))
    return provenance


def _locate(source: str | Path) -> Path:
    if isinstance(source, str) and source in available_rules():
        return SHIPPED / f"{source}{SUFFIX}"
    path = Path(source)
    if path.is_file():
        return path
    if isinstance(source, str) and path.name == source and path.suffix != SUFFIX:
        raise ValueError(
            f"unknown rule {source!r}; known names: {', '.join(available_rules())}; or give the path of a {SUFFIX} file"
        )
    raise FileNotFoundError(f"no rule file at {path}")


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} holds no learned-optim rule (no such entry in its metadata)")
            if metadata.get("version") != str(VERSION):
                found = metadata.get("version")
                raise ValueError(f"{path} has format version {found}, this learned-optim reads {VERSION}: upgrade it")
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole .safetensors file (truncated or of another kind): {error}") from error
