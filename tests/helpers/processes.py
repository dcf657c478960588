"""Running a function in several processes that form a torch.distributed group."""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

SECONDS = 240  # for one start of all processes; ten on a quiet machine


def work(function: Callable[[Path], None], rank: int, ranks: int, folder: Path, store: str) -> None:
    """Run the function as one process of the group, and write its traceback or ``done`` into the folder."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no look-up of the machine's own name
    torch.set_num_threads(1)
    report = folder / f"{store}-{rank}"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / store}",  # no port that another program could take
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=SECONDS / 2),
        )
        function(folder)
        dist.barrier()
        report.write_text("done")
    except BaseException:
        report.write_text(traceback.format_exc())
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_in_processes(function: Callable[[Path], None], ranks: int, folder: Path) -> None:
    """Run ``function(folder)`` in each of ``ranks`` processes; an AssertionError has the tracebacks of those that fail.

    The function must be importable. The processes talk over gloo through a file in the folder.
    """
    # A fork server imports once for all tests; torch's compiler is among what an optimizer imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # Python 3.11 and 3.12 do not hand it on
        forkserver.ensure_running()
    store = f"store-{time.monotonic_ns()}"
    arguments = [(function, rank, ranks, folder, store) for rank in range(ranks)]
    processes = [context.Process(target=work, args=each, daemon=True) for each in arguments]
    deadline = time.monotonic() + SECONDS
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            if any(process.exitcode not in (None, 0) for process in processes):
                break  # the others would wait for it
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.is_alive():
                process.join(1.0)
            process.kill()
            process.join()
    reports = [folder / f"{store}-{rank}" for rank in range(ranks)]
    texts = [report.read_text() if report.exists() else "did not end" for report in reports]
    assert texts == ["done"] * ranks, "\n".join(texts)
