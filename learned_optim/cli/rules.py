"""The command ``learned-optim rules``: what a rule is, what it does, and copies of it."""

import argparse
import json
from pathlib import Path
from typing import Any

from learned_optim.cli.common import CommandError, Commands, add_command, add_group, print_json, print_table, require
from learned_optim.terminal import say

VALUE_WIDTH = 300
"""Letters of a value that are shown of what a rule's file says; --json shows all."""
RULE_HELP = "a shipped rule's name, a .safetensors file, or hf://OWNER/NAME"


def add_to(commands: Commands) -> None:
    """Add the command with its actions."""
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
        examples=[
            "rules show default",
            "rules show runs/mine/best.safetensors --plot rule.png --steps 2000",
            "rules show default --source c",
        ],
    )
    show.add_argument("rule", help=RULE_HELP)
    show.add_argument("--plot", type=Path, metavar="FILE", help="draw what the rule does: .png, .svg or .pdf")
    show.add_argument("--steps", type=int, help="length of the drawn responses (1000)")
    show.add_argument("--scale", type=float, help="size of the gradients (1); rules that are free of scale ignore it")
    show.add_argument(
        "--source", choices=("c", "triton"), help="print the source of the step's kernel, made from the rule's forward"
    )
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
    from learned_optim.rule_card import rule_card
    from learned_optim.rules import ARCHITECTURES

    cards = [rule_card(name) for name in available_rules()]
    if getattr(options, "json", False):  # "rules" alone has no options
        print_json(cards)
        return
    width = max(len(card["rule"]) for card in cards) + 2
    for card in cards:
        facts = f"{card['architecture']}, {card['meta_parameters']:,} meta-parameters"
        say(f"{card['rule']:{width}}{facts}. {card['origin'].get('description', '')}")
    say("\nLearnedOptimizer(parameters, rule=...) takes one of these names, a .safetensors file, or hf://OWNER/NAME.")
    say(f"Architectures, which the rule of a configuration takes for meta-training: {', '.join(sorted(ARCHITECTURES))}")


def _show(options: argparse.Namespace) -> None:
    if options.plot is None and (options.steps is not None or options.scale is not None):
        raise CommandError("--steps and --scale go with --plot FILE")
    if options.source is not None:
        if options.plot is not None or options.json:
            raise CommandError("--source prints a source alone; leave out --plot and --json")
        _source(options)
        return
    from learned_optim.rule_card import rule_card

    card = rule_card(options.rule)
    if options.plot is not None:
        _plot(options)
        card["figure"] = str(options.plot)
    if options.json:
        print_json(card)
        return
    settings = ", ".join(f"{name}={value}" for name, value in card["settings"].items())
    facts = {name: value for name, value in card.items() if name not in ("origin", "figure")}
    rows = [*(facts | {"settings": settings}).items(), *card["origin"].items()]
    print_table([[name.replace("_", " "), _text(value)] for name, value in rows])
    if options.plot is not None:
        say(f"written: {options.plot}")


def _source(options: argparse.Namespace) -> None:
    import torch

    from learned_optim.checkpoint import load_rule
    from learned_optim.step.programs import sources_of

    sources = sources_of(load_rule(options.rule).pruned(), torch.float32)  # what an optimizer runs
    if isinstance(sources, str):
        raise CommandError(f"no kernel can be made of this rule: {sources}")
    say((sources.c if options.source == "c" else sources.triton).text)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= VALUE_WIDTH else f"{text[: VALUE_WIDTH - 1]}…"


def _plot(options: argparse.Namespace) -> None:
    require("bench", "matplotlib")
    from learned_optim.meta_train.reports.rule_plots import plot_rule

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
    say(f"written: {options.file}")
