"""The command ``learned-optim rules``: what a rule is, what it does, and copies of it."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from learned_optim.cli_common import (
    CommandError,
    Commands,
    add_command,
    add_group,
    need,
    print_json,
    print_table,
    printable,
)

RULE_HELP = "a shipped rule's name, a .safetensors file, or hf://OWNER/NAME"


def add_rules(commands: Commands) -> None:
    """Add the sub-command with its actions."""
    rules = add_command(
        commands,
        "rules",
        "list, show, draw and export rules",
        examples=["rules", "rules show default --plot default.png", "rules export default mine.safetensors"],
    )
    actions = add_group(rules, "ACTION", run=_list)
    listing = add_command(actions, "list", "rules that come with the package", examples=["rules list --json"])
    listing.set_defaults(run=_list)
    show = add_command(
        actions,
        "show",
        "architecture, memory and origin of a rule; what it does, as a picture",
        description="Print a rule's card. --plot draws its response to constant, sign-flipping and noisy gradients "
        "beside Adam's, its effective rate against the step count, and its step as a function of past and present "
        "gradients.",
        examples=["rules show default", "rules show runs/mine/best.safetensors --plot rule.png --steps 2000"],
    )
    show.add_argument("rule", help=RULE_HELP)
    show.add_argument("--plot", type=Path, metavar="FILE", help="draw what the rule does: .png, .svg or .pdf")
    show.add_argument("--steps", type=int, help="length of the drawn responses (1000)")
    show.add_argument("--scale", type=float, help="size of the gradients (1); only some rules heed it")
    show.set_defaults(run=_show)
    export = add_command(
        actions,
        "export",
        "write a copy of a rule",
        description="Write a copy of a rule: to a file, or to the Hugging Face hub.",
        examples=[
            "rules export default mine.safetensors",
            "rules export runs/mine/best.safetensors hf://me/my-rule",
        ],
    )
    export.add_argument("rule", help=RULE_HELP)
    export.add_argument("file", help=".safetensors file to write, or hf://OWNER/NAME")
    export.add_argument("--force", action="store_true", help="replace the file if it is there")
    export.set_defaults(run=_export)
    for action in (listing, show):
        action.add_argument("--json", action="store_true", help="print JSON")


def _list(options: argparse.Namespace) -> None:
    from learned_optim.checkpoint import available_rules
    from learned_optim.rules import ARCHITECTURES

    cards = [rule_card(name) for name in available_rules()]
    if getattr(options, "json", False):  # "rules" alone has no options
        print_json(cards)
        return
    for card in cards:
        facts = f"{card['architecture']}, {card['meta_parameters']:,} meta-parameters"
        print(printable(f"{card['rule']:22}{facts}. {card['origin'].get('description', '')}"))
    architectures = ", ".join(sorted(ARCHITECTURES))
    print(f"\nArchitectures, of which rules are meta-trained ([rule] architecture = NAME): {architectures}")


def _show(options: argparse.Namespace) -> None:
    if options.plot is None and (options.steps is not None or options.scale is not None):
        raise CommandError("--steps and --scale go with --plot FILE")
    card = rule_card(options.rule)
    if options.plot is not None:
        _plot(options)
        card["figure"] = str(options.plot)
    if options.json:
        print_json(card)
        return
    settings = ", ".join(f"{name}={value}" for name, value in card["settings"].items())
    facts = {**card, "settings": settings, **card["origin"]}
    shown = {name: value for name, value in facts.items() if name not in ("origin", "figure")}
    print_table([[name.replace("_", " "), _text(value)] for name, value in shown.items()])
    if options.plot is not None:
        print(f"written: {options.plot}")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def rule_card(source: str) -> dict[str, Any]:
    """What there is to say of a rule; for JSON."""
    import torch

    from learned_optim import LearnedOptimizer
    from learned_optim.checkpoint import available_rules, load_rule, locate, read_provenance

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
        "state_bytes_a_parameter": sum(state[entry].nbytes for entry in rule.state_features),
        "file": str(file),
        **({"card": str(file.with_suffix(".md"))} if source in available_rules() else {}),
        "origin": _origin(read_provenance(file)),
    }


def _origin(provenance: dict[str, Any]) -> dict[str, Any]:
    """How a rule came about: what its file says of the run that it was meta-trained in."""
    config = provenance.get("config")
    config = config if isinstance(config, dict) else {}  # whoever calls save_rule may put anything there
    found: dict[str, Any] = {"description": config["description"]} if config.get("description") else {}
    if "tasks" in config:
        tasks = config["tasks"] if isinstance(config["tasks"], list) else [config["tasks"]]
        families = Counter(str(_named(task, "family")) for task in tasks)
        found["tasks"] = ", ".join(f"{count} {name}" for name, count in families.items())
    if "estimator" in config:
        found["estimator"] = _named(config["estimator"], "name")
    if "seed" in config:
        found["seed"] = config["seed"]
    known = ("meta_steps", "best_validation", "seconds", "learned_optim", "torch")
    found |= {name: provenance[name] for name in known if name in provenance}
    return found or {"description": "its file does not say how it came about"}


def _named(value: Any, key: str) -> Any:
    """What a table says under this key; what is no table says itself."""
    return value.get(key, "unnamed") if isinstance(value, dict) else value


def _plot(options: argparse.Namespace) -> None:
    need("bench", "matplotlib")
    from learned_optim.meta_train.rule_plots import plot_rule

    given = {name: getattr(options, name) for name in ("steps", "scale") if getattr(options, name) is not None}
    plot_rule(options.rule, options.plot, **given)


def _export(options: argparse.Namespace) -> None:
    from learned_optim.checkpoint import SUFFIX, load_rule, locate, read_provenance, save_rule
    from learned_optim.hub import is_address

    if not is_address(options.file):
        if Path(options.file).suffix != SUFFIX:
            raise CommandError(f"the copy's name must end in {SUFFIX}, got {options.file}")
        if Path(options.file).exists() and not options.force:
            raise CommandError(f"{options.file} is there already; --force replaces it")
    file = locate(options.rule)
    save_rule(load_rule(file), options.file, read_provenance(file))
    print(f"written: {options.file}")
