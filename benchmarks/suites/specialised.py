"""Worked specialisations: what the rules that ``learned-optim specialise`` made gain over the default rule.

    python -m benchmarks.suites.specialised NAME RUN       # after the command; adds the rows of that run

Copies the rows of RUN/comparison/gain.csv, and the provenance of the comparison. The first columns say what
meta-training took; how to repeat it says the configuration of the same name.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.results import RESULTS, Row, read, read_parts, replaced, write, write_parts
from learned_optim.checkpoint import read_provenance

ROWS = RESULTS / "meta_training" / "specialised.csv"
TITLES = {
    "specialised-pictures": "implicit pictures: a sine network for each photograph, 500 steps",
    "specialised-physics": "physics-informed networks for one equation, 1,000 steps",
    "specialised-mnist": "the network for MNIST of the paper of 2016, 200 steps",
    "specialised-neural-art": "pictures between a photograph and a painting, 128 steps",
    "specialised-characters": "recurrent networks on characters, 500 steps",
}
"""Rule -> what it is for, in the order of the table."""
SPECIALISED = "specialised"
"""The name of the rule itself in the rows of a run."""
CONSTANTS = "constants"
"""That of the control, see benchmarks/suites/specialised_control.py."""
OTHERS = {"Adam": "speed-up of tuned Adam", "AdamW-cosine": "of tuned AdamW, cosine"}


def add(name: str, run: Path, path: Path = ROWS) -> None:
    """Put the rows of a run in the place of those of the same name.

    Args:
        name: of the rule.
        run: folder that ``learned-optim specialise`` has written.
        path: file of the rows.

    Raises:
        FileNotFoundError: the run has not been compared with the default.
    """
    gained = run / "comparison" / "gain.csv"
    if not gained.exists():
        raise FileNotFoundError(f"no {gained}; finish the run with learned-optim specialise --resume {run}")
    made = read_provenance(run / "specialised.safetensors")
    took = {"rule": name, "meta_steps": made["config"]["steps"], "seconds": f"{made['seconds']:.0f}"}
    rows = [{**took, **row} for row in read(gained)]
    kept = [row for row in read(path) if row["rule"] != name or row["optimizer"] == CONSTANTS]
    write(
        path,
        replaced([*kept], [{key: str(value) for key, value in row.items()} for row in rows], ("rule", "optimizer")),
    )
    compared = json.loads((run / "comparison" / "provenance.json").read_text(encoding="utf-8"))
    details = path.with_suffix(".json")
    write_parts(details, {**read_parts(details), name: compared})


def table(path: Path = ROWS) -> str:
    """A row for each rule: its speed-ups over the default, and those of tuned baselines beside it."""
    rows = read(path)
    header = ["rule", "for", "minutes", "speed-up over the default", "in seconds", "final loss"]
    header += ["of the best constants: speed-up", "their final loss", *OTHERS.values()]
    lines: list[Sequence[str]] = [header, ["---"] * len(header)]
    for name, title in TITLES.items():
        found: Mapping[str, Row] = {row["optimizer"]: row for row in rows if row["rule"] == name}
        if not found:
            continue
        own = found[SPECIALISED]
        low, high = (float(own[end]) for end in ("low", "high"))
        speedup = f"{float(own['speedup']):.2f} ({low:.2f} to {high:.2f})"
        line = [f"`{name}`", title, f"{float(own['seconds']) / 60:.0f}", speedup]
        line += [f"{float(own[column]):.2f}" for column in ("in_seconds", "final_loss")]
        constants = found.get(CONSTANTS, {})
        line += [f"{float(constants[each]):.2f}" if constants else "" for each in ("speedup", "final_loss")]
        lines.append(line + [f"{float(found[other]['speedup']):.2f}" for other in OTHERS])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Add the rows of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TITLES, help="the rule's name")
    parser.add_argument("run", type=Path, help="folder of the run")
    arguments = parser.parse_args()
    add(arguments.name, arguments.run)


if __name__ == "__main__":
    main()
