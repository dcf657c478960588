"""The command ``learned-optim data``."""

import argparse
from pathlib import Path
from typing import Any

from learned_optim.cli.common import Commands, add_command, add_group, print_json
from learned_optim.terminal import say


def add_to(commands: Commands) -> None:
    """Add the command with its actions."""
    data = add_command(
        commands,
        "data",
        "list or download data sets",
        description="Data sets are looked for in the folder LEARNED_OPTIM_DATA and in the user's cache "
        "(~/.cache/learned_optim/data).",
        examples=["data list", "data fetch mnist"],
    )
    actions = add_group(data, "ACTION")
    listing = add_command(
        actions, "list", "data sets and where they were found", examples=["data list", "data list --json"]
    )
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=_list)
    fetch = add_command(
        actions,
        "fetch",
        "download data sets from their official addresses",
        description="Download data sets from their official addresses. Every file is held to its SHA-256, a download "
        "that was cut off continues where it stopped, and what is there already is kept. Prints the folder of each.",
        examples=[
            "data fetch mnist",
            "data fetch mnist cifar10 --output /data",
            "data fetch mnist --mirror http://host/",
        ],
    )
    fetch.add_argument("name", nargs="+", help="see: learned-optim data list")
    fetch.add_argument("--output", type=Path, metavar="FOLDER", help="put NAME/ there (in the user's cache)")
    fetch.add_argument(
        "--mirror", action="append", metavar="URL", help="folder to download from instead; may be repeated"
    )
    fetch.set_defaults(run=_fetch)


def _list(options: argparse.Namespace) -> None:
    from learned_optim.meta_train.data.datasets import DATA_SETS

    found = {name: data_set_entry(name) for name in DATA_SETS}
    if options.json:
        print_json(found)
        return
    for name, entry in found.items():
        note = f" ({entry['note']})" if entry["note"] else ""
        say(f"{name:15}{entry['description']}{note}\n{'':15}{entry['folder'] or entry['remedy']}")


def data_set_entry(name: str) -> dict[str, Any]:
    """Description, licence, note and folder of a data set; under ``remedy``, how to get one that was not found."""
    from learned_optim.meta_train.data.datasets import DATA_SETS, DataNotFoundError, find

    data_set = DATA_SETS[name]
    folder, remedy = None, "nothing to fetch"
    if data_set.layouts:
        try:
            folder = str(find(name))
        except DataNotFoundError:
            remedy = f"not here: {data_set.by_hand or f'learned-optim data fetch {name}'}"
    return {
        "description": data_set.description,
        "licence": data_set.licence,
        "note": data_set.note,
        "folder": folder,
        "remedy": None if folder else remedy,
    }


def _fetch(options: argparse.Namespace) -> None:
    from learned_optim.meta_train.data.datasets import data_set_named
    from learned_optim.meta_train.data.fetch import fetch

    for name in options.name:
        data_set_named(name)  # a misspelt name is refused before a long download
    for name in options.name:
        say(fetch(name, options.output, mirrors=options.mirror))
