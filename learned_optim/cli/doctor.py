"""The command ``learned-optim doctor``: what is installed, whether a step is right here, and what it costs a model."""

import argparse
from collections.abc import Callable

from learned_optim.cli.common import (
    CommandError,
    Commands,
    add_command,
    check_device,
    coloured,
    import_from_here,
    print_json,
    require,
)
from learned_optim.terminal import say

GREEN, RED, YELLOW, PLAIN = 32, 31, 33, 0


def add_to(commands: Commands) -> None:
    """Add the command with its options."""
    doctor = add_command(
        commands,
        "doctor",
        "check the installation, or the seconds that a step takes on your model",
        description="Say what is installed, which devices and data sets there are, and hold a step of every shipped "
        "rule to its definition, on the CPU and on a GPU if there is one, by the fused kernels too. Exit status 1 if "
        "something is wrong; what is only missing is no error. With --model, measure instead what share of a training "
        "step of your model the optimizer takes, and how many steps the default rule must save to pay in seconds.",
        examples=["doctor", "doctor --model my_model.py:MyModel"],
    )
    doctor.add_argument(
        "--model",
        metavar="FILE.py:CLASS",
        help="a task, family or module of your own, or a function that returns a module, as for benchmark",
    )
    doctor.add_argument("--device", help="where --model is trained (cpu)")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the command; raises a CommandError if something is wrong."""
    if options.model is not None:
        _measure(options)
        return
    if options.device is not None:
        raise CommandError("--device goes with --model; without it all devices are checked")
    from learned_optim import installation

    sections: dict[str, Callable[[], dict[str, str]]] = {
        "versions": installation.versions,
        "devices": installation.devices,
        "data": _data,
        "a step of each rule": installation.steps,
    }
    found = {}
    for title, section in sections.items():
        found[title] = section()
        if not options.json:
            print(title)
            for name, finding in found[title].items():
                print(f"  {name:31} {coloured(finding, _colour(finding))}", flush=True)
    problems = [
        f"{name}: {finding}" for part in found.values() for name, finding in part.items() if _colour(finding) == RED
    ]
    if options.json:
        print_json({**found, "problems": problems})
    elif not problems:
        print(coloured("nothing is wrong", GREEN))
    if problems:
        raise CommandError("; ".join(problems))


def _measure(options: argparse.Namespace) -> None:
    """Print the seconds of a training step of a user's model."""
    require("bench", "pydantic")
    from learned_optim.meta_train.benchmark.optimizer_share import measure_shares

    import_from_here()
    device = options.device or "cpu"
    check_device(device)
    shares = measure_shares(options.model, device)
    if options.json:
        print_json(shares.as_dict())
    else:
        say(str(shares))
    if shares.warning:
        say(shares.warning, error=True)


def _colour(finding: str) -> int:
    if finding.startswith("WRONG"):
        return RED
    return YELLOW if finding.startswith("not ") else GREEN if finding.startswith("right") else PLAIN


def _data() -> dict[str, str]:
    from learned_optim.cli.data import data_set_entry
    from learned_optim.meta_train.data.datasets import DATA_SETS

    entries = {name: data_set_entry(name) for name in DATA_SETS}
    return {name: entry["folder"] or entry["remedy"] for name, entry in entries.items()}
