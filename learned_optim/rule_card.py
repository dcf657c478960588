"""The facts about a rule that ``learned-optim rules`` prints."""

from collections import Counter
from typing import Any

import torch

from learned_optim.checkpoint import available_rules, load_rule, locate, read_provenance
from learned_optim.optimizer import LearnedOptimizer


def rule_card(source: str) -> dict[str, Any]:
    """Architecture, settings, size, memory, file and origin of a rule, as JSON holds them.

    Args:
        source: a name, path or address, as :func:`~learned_optim.checkpoint.load_rule` takes it and refuses it.
    """
    file = locate(source)
    rule = load_rule(file)
    # As in the optimizer, which may keep the recurrent part in less than float32.
    one = torch.nn.Parameter(torch.zeros(1))
    one.grad = torch.zeros(1)
    optimizer = LearnedOptimizer([one], rule)
    optimizer.step()
    state = optimizer.state[one]
    return {
        "rule": source,
        "architecture": rule.name,
        "settings": dict(rule.settings),
        "meta_parameters": sum(parameter.numel() for parameter in rule.parameters()),
        "state_bytes_a_parameter": sum(state[entry].nbytes for entry in optimizer.rule.state_features),
        "file": str(file),
        **({"card": str(file.with_suffix(".md"))} if source in available_rules() else {}),
        "origin": _origin(read_provenance(file)),
    }


def _origin(provenance: dict[str, Any]) -> dict[str, Any]:
    """The origin of a rule: its description, and the facts about its meta-training that its file holds."""
    config = provenance.get("config")
    found = _of_config(config) if isinstance(config, dict) else {}
    # Whoever calls save_rule may put in anything: what is not a configuration of ours is shown as it is.
    found |= {name: value for name, value in provenance.items() if name != "config" or not found}
    return found or {"description": "its file does not say how it came about"}


def _of_config(config: dict[str, Any]) -> dict[str, Any]:
    """The parts of a run's configuration that a card shows; parts of an unusual shape are kept as they are."""
    found = {
        name: config[name]
        for name in ("description", "tasks", "estimator", "seed")
        if config.get(name) not in ("", None)
    }
    match config:
        case {"tasks": [*tasks]} if tasks and all(isinstance(task, dict) for task in tasks):
            families = Counter(str(task.get("family", "unnamed")) for task in tasks)
            found["tasks"] = ", ".join(f"{count} {name}" for name, count in families.items())
    match config:
        case {"estimator": {"name": name}}:
            found["estimator"] = name
    return found
