"""The command ``learned-optim doctor``: what is installed, what was found, and whether a step is right here."""

import argparse
from collections.abc import Callable

from learned_optim.cli.common import CommandError, Commands, add_command, coloured, print_json

GREEN, RED, YELLOW, PLAIN = 32, 31, 33, 0


def add_to(commands: Commands) -> None:
    """Add the command with its options."""
    doctor = add_command(
        commands,
        "doctor",
        "check the installation: versions, GPU, data, and a step of every rule",
        description="Say what is installed, which devices and data sets there are, and hold a step of every shipped "
        "rule to its definition, on the CPU and on a GPU if there is one, by the fused kernels too. Exit status 1 if "
        "something is wrong; what is only missing is no error.",
        examples=["doctor", "doctor --json"],
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the command; raises a CommandError if something is wrong."""
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
                print(f"  {name:32}{coloured(finding, _colour(finding))}", flush=True)
    problems = [
        f"{name}: {finding}" for part in found.values() for name, finding in part.items() if _colour(finding) == RED
    ]
    if options.json:
        print_json({**found, "problems": problems})
    elif not problems:
        print(coloured("nothing is wrong", GREEN))
    if problems:
        raise CommandError("; ".join(problems))


def _colour(finding: str) -> int:
    if finding.startswith("WRONG"):
        return RED
    return YELLOW if finding.startswith("not ") else GREEN if finding.startswith("right") else PLAIN


def _data() -> dict[str, str]:
    from learned_optim.cli.data import data_set_entry
    from learned_optim.meta_train.data.datasets import DATA_SETS

    entries = {name: data_set_entry(name) for name in DATA_SETS}
    return {name: entry["folder"] or entry["remedy"] for name, entry in entries.items()}
