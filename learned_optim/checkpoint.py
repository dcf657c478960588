"""Rules on disk: weights, architecture and provenance in one ``.safetensors`` file."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils._python_dispatch import _disable_current_modes

from learned_optim import hub
from learned_optim.files import json_object, write_atomically
from learned_optim.rules import ARCHITECTURES, UpdateRule

RULE_FORMAT = "learned-optim-rule"
RULE_FORMAT_VERSION = 1
SUFFIX = ".safetensors"
LARGEST_FILE = 64 << 20
"""Bytes of the largest file that is read; rules have thousands of weights, so that a larger file holds no rule."""
LARGEST_SIZE = 4096
"""The largest whole number among a rule's settings, such as units or layers: a few digits in a file must not demand all
memory."""
FLOATS = {"F64", "F32", "F16", "BF16"}
WEIGHTS_FOLDER = Path(__file__).parent / "weights"


def available_rules() -> list[str]:
    """Names of the meta-trained rules that come with the package, for ``LearnedOptimizer(rule=name)``."""
    return sorted(path.stem for path in WEIGHTS_FOLDER.glob(f"*{SUFFIX}"))


def save_rule(rule: UpdateRule, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write a rule's weights, architecture and settings to ``path``, whole or not at all.

    Args:
        rule: the rule, on any device.
        path: file to write, by custom ``NAME.safetensors``; or a place on the Hugging Face hub,
            ``hf://OWNER/NAME[@REVISION][/FILE]``, whose repository is made if it does not exist.
        provenance: anything JSON can hold: tasks, configuration, seed, cost, results.

    Raises:
        ValueError: the provenance holds a number that is infinite or NaN, which JSON does not know.
        ImportError: a place on the hub without huggingface_hub.
        OSError: the file cannot be written.
        TypeError: ``rule`` is no rule, but its name for instance.
    """
    if not isinstance(rule, UpdateRule):
        raise TypeError(f"rule must be an UpdateRule, got {rule!r}; load_rule gives one by its name")
    metadata = {
        "format": RULE_FORMAT,
        "version": str(RULE_FORMAT_VERSION),
        "architecture": rule.name,
        "settings": json.dumps(dict(rule.settings)),
        "provenance": json.dumps(dict(provenance or {}), allow_nan=False),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in rule.state_dict().items()}
    content = save(tensors, metadata)
    if hub.is_address(path):
        hub.upload(path, content, rule.name)
    else:
        write_atomically(Path(path), content)


def load_rule(source: str | Path) -> UpdateRule:
    """Load a rule: a shipped one by name, a file by path, or one from the Hugging Face hub.

    Args:
        source: one of :func:`available_rules`, the path of a ``.safetensors`` file, or
            ``hf://OWNER/NAME[@REVISION][/FILE]``; the file is ``rule.safetensors`` if none is named.

    Returns:
        The rule on the CPU, its weights in float32 and not requiring gradients.

    Raises:
        ValueError: unknown name, or a file that holds no rule of this package (foreign, truncated, from a newer
            version, weights that do not fit the architecture).
        FileNotFoundError: no file at the path.
        ImportError: a place on the hub without huggingface_hub.
        OSError: the hub has no such file, or cannot be reached.
    """
    path = locate(source)
    # Modes such as FakeTensorMode would put tensors without values in place of those in the file.
    with _disable_current_modes(), _opened(path) as (file, metadata):
        architecture = metadata.get("architecture", "")
        if architecture not in ARCHITECTURES:
            raise ValueError(f"{path}: unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
        try:
            settings = _checked_settings(metadata["settings"])
            with torch.device("meta"):
                _check_weights(file, ARCHITECTURES[architecture](**settings))
            with torch.device("cpu"):  # whatever torch.set_default_device says
                rule = ARCHITECTURES[architecture](**settings)
            rule.float().load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: weights do not fit the architecture {architecture!r}: {error}") from error
        if not all(parameter.isfinite().all() for parameter in rule.parameters()):
            raise ValueError(f"{path} is damaged: it holds weights that are NaN or infinite")
        return rule.requires_grad_(False)


def read_provenance(source: str | Path) -> dict[str, Any]:
    """The provenance of a stored rule, as it was given to :func:`save_rule`; raises like :func:`load_rule`."""
    path = locate(source)
    with _opened(path) as (_, metadata):
        return json_object(metadata.get("provenance", "{}"), f"{path}: provenance")


def locate(source: str | Path) -> Path:
    """The file of a rule, fetched from the hub if it is there; raises like :func:`load_rule`."""
    if hub.is_address(source):
        return hub.download(source)
    if isinstance(source, str) and source in available_rules():
        return WEIGHTS_FOLDER / f"{source}{SUFFIX}"
    path = Path(source)
    if path.is_file():
        return path
    if source in ARCHITECTURES:
        trained = [name for name in available_rules() if _architecture_of(WEIGHTS_FOLDER / f"{name}{SUFFIX}") == source]
        raise ValueError(
            f"{source!r} is an architecture, not a rule with weights; rules of it that come with the package: "
            f"{', '.join(trained) or 'none'}; an untrained one is {ARCHITECTURES[str(source)].__name__}()"
        )
    if isinstance(source, str) and path.name == source and path.suffix != SUFFIX:
        raise ValueError(
            f"unknown rule {source!r}; known names: {', '.join(available_rules())}; "
            f"or give the path of a {SUFFIX} file, or hf://OWNER/NAME"
        )
    hint = f": it is a folder; a run keeps its rule in best{SUFFIX} there" if path.is_dir() else ""
    raise FileNotFoundError(f"no rule file at {path}{hint}")


def _architecture_of(path: Path) -> str:
    with _opened(path) as (_, metadata):
        return metadata.get("architecture", "")


def _checked_settings(text: str) -> dict[str, Any]:
    settings = json_object(text, "settings")
    for name, value in settings.items():
        if isinstance(value, int) and value > LARGEST_SIZE:
            raise ValueError(f"{name} must be at most {LARGEST_SIZE}, got {value}")
    return settings


def _check_weights(file: Any, rule: UpdateRule) -> None:
    """Compare what the file says it holds with what the rule, on the meta device, needs; nothing is allocated."""
    needed = {name: tuple(tensor.shape) for name, tensor in rule.state_dict().items()}
    headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    found = {name: tuple(header.get_shape()) for name, header in headers.items()}
    different = sorted(name for name in needed.keys() | found.keys() if needed.get(name) != found.get(name))
    if different:
        name = different[0]
        raise ValueError(f"the shape of {name} is {found.get(name)} in the file, must be {needed.get(name)}")
    if not {header.get_dtype() for header in headers.values()} <= FLOATS:
        raise ValueError(f"weights must be of dtype {', '.join(sorted(FLOATS))}")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """The file, of which only the header has been read, and the rule's metadata."""
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{path} holds no learned-optim rule: it has {size:,} bytes, rules at most {LARGEST_FILE:,}")
    try:
        with safe_open(path, framework="pt") as file:  # maps the file, and holds the header to its size
            metadata = file.metadata() or {}
            if metadata.get("format") != RULE_FORMAT:
                raise ValueError(f"{path} holds no learned-optim rule (no such entry in its metadata)")
            if metadata.get("version") != str(RULE_FORMAT_VERSION):
                found = metadata.get("version")
                raise ValueError(
                    f"{path} has format version {found}, this learned-optim reads {RULE_FORMAT_VERSION}: upgrade it"
                )
            yield file, metadata
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole .safetensors file (truncated or of another kind): {error}") from error
