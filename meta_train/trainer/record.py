"""The record of a run, ``run.json`` beside its weights and metrics: what it takes to repeat it."""

import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import torch
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from learned_optim.files import json_object, write_atomically
from learned_optim.meta_train.common.module_search import search_in, searched_folders
from learned_optim.meta_train.common.provenance import provenance
from learned_optim.meta_train.common.strict import check_shape
from learned_optim.meta_train.config.load import Recorded

RECORD_FILE = "run.json"


class _Session(TypedDict):
    meta_step: int
    module_folders: NotRequired[list[str]]


class _Record(TypedDict):
    sessions: NotRequired[list[_Session]]


def record_session(folder: Path, config: Recorded, meta_step: int, device: torch.device) -> None:
    """Note that a run is begun, or resumed after ``meta_step`` meta-steps.

    ``run.json`` holds the configuration, seed included, and for every session: date, command line, versions, commit of
    the package's checkout, machine and device.
    """
    record = read_record(folder) if meta_step > 0 else {}
    session = {
        "meta_step": meta_step,
        **provenance(),
        "numpy": np.__version__,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "folder": os.getcwd(),
        "module_folders": [str(path) for path in searched_folders()],
        "machine": platform.node(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
    contents = {"config": json.loads(config.to_json()), "sessions": [*record.get("sessions", []), session]}
    write_atomically(folder / RECORD_FILE, json.dumps(contents, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """The record that :func:`record_session` has written; empty for a run of an older version.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return {}
    try:
        record = json_object(path.read_bytes(), str(path))
        check_shape(_Record, record, str(path))
    except ValueError as error:
        raise ValueError(f"{error}; delete it, the checkpoint does without") from error
    return record


def search_modules_of(folder: Path) -> None:
    """Look for modules where the run in this folder has found them."""
    for session in read_record(folder).get("sessions", []):
        for path in reversed(session.get("module_folders", [])):
            search_in(Path(path))
